"""A conversation as it is given: checked, and brought to one form."""

from __future__ import annotations

import json
import re
from typing import Any

ROLES = ("user", "assistant", "system", "tool", "developer")


class ChatError(ValueError):
    """A conversation that cannot be rendered; `reason` is a short fixed phrase to count drops by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return ChatError, (self.reason, self.detail)


def clean_messages(messages: Any) -> list[dict]:
    """Check a conversation and bring it to one form; the input is not changed.

    Content becomes a string (None is empty, lists of text parts are joined) and tool call arguments given as
    JSON text become objects. Raises ChatError.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("no messages")
    cleaned = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ChatError("bad message", f"message {index} is a {type(message).__name__}, not an object")
        if message.get("role") not in ROLES:
            raise ChatError("unknown role", f"message {index}: {message.get('role')!r}")
        content = message.get("content")
        if not isinstance(content, str):
            message = {**message, "content": _text_of(content, index)}
        if message.get("tool_calls"):
            message = {**message, "tool_calls": _parsed_calls(message["tool_calls"], index)}
        cleaned.append(message)
    return cleaned


def _text_of(content: Any, index: int) -> str:
    """The text of a list of {"type": "text", "text": ...} parts; None is empty."""
    if content is None:
        return ""
    if not isinstance(content, list):
        raise ChatError("bad content", f"message {index}: content is a {type(content).__name__}")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ChatError("bad content", f"message {index}: only text parts can be trained on")
    return "".join(part["text"] for part in content)


def _parsed_calls(calls: Any, index: int) -> list[dict]:
    """Tool calls with their arguments as objects; absent or empty arguments are an empty object."""
    if not isinstance(calls, list):
        raise ChatError("bad tool call", f"message {index}: tool_calls is a {type(calls).__name__}")
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError("bad tool call", f"message {index}: a tool call without a function name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ChatError("bad tool arguments", f"message {index}: {error}") from None
        if not isinstance(arguments, dict):
            raise ChatError("bad tool arguments", f"message {index}: a {type(arguments).__name__}")
        function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def checked_tools(tools: Any) -> list[dict]:
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ChatError("bad tools", "tools is not a list of objects")
    return tools


def thinks(messages: list[dict]) -> bool:
    """Whether an answer carries reasoning, in its own field or written into the content."""
    for message in messages:
        if message.get("reasoning_content"):
            return True
        content = message["content"]
        if message["role"] == "assistant" and "</think>" in content and _inline_thinking.search(content):
            return True
    return False


_inline_thinking = re.compile(r"<think>(?!</think>).*</think>", re.DOTALL)
