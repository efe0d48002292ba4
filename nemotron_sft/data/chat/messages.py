"""A conversation as it is given: checked, and for the built-in templates brought to one form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

ROLES = ("user", "assistant", "system", "tool", "developer")
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names of an answer's reasoning, first wins
_REASONING = frozenset(REASONING)
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning")


class ChatError(ValueError):
    """A conversation that cannot be rendered; `reason` is a short fixed phrase to count drops by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple:
        return ChatError, (self.reason, self.detail)


def checked_messages(messages: Any) -> list[dict]:
    """Check a conversation, and leave it as it is but for what says nothing; the input is not changed.

    Keys that are null count as absent, an answer without content has content null, a tool's null result is
    empty text, and the old `function_call` is a tool call. Raises ChatError.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("no messages")
    return [_checked(message, index) for index, message in enumerate(messages)]


def _checked(message: Any, index: int) -> dict:
    if not isinstance(message, dict):
        raise ChatError("bad message", f"message {index} is a {type(message).__name__}, not an object")
    if None in message.values():
        message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role == "function":  # OpenAI's old name
        message, role = {**message, "role": "tool"}, "tool"
    if role not in ROLES:
        raise ChatError("unknown role", f"message {index}: {role!r}")
    if content is None:
        if role not in ("assistant", "tool"):
            raise ChatError("no content", f"message {index}, a {role}'s, has no content")
        message = {**message, "content": None if role == "assistant" else ""}
    elif role == "tool" and isinstance(content, (bool, int, float)):
        message = {**message, "content": json.dumps(content)}
    elif not isinstance(content, str):
        _check_content(content, role, index)
    elif role == "assistant":
        message = _said_once(message, content)
    return _called(message, index)


def _called(message: dict, index: int) -> dict:
    """The message with its calls checked, and the old function_call as one of them."""
    if "function_call" in message:
        message = {**message, "tool_calls": [{"type": "function", "function": message["function_call"]}]}
        del message["function_call"]
    if "tool_calls" in message:
        message = {**message, "tool_calls": _checked_calls(message["tool_calls"], index)}
        if not message["tool_calls"]:
            del message["tool_calls"]
    return message


def _said_once(message: dict, content: str) -> dict:
    """An answer without the reasoning at the start of its content, where its own field has the same."""
    before, closed, rest = content.partition("</think>")
    if not closed or _REASONING.isdisjoint(message):
        return message
    inline = before.strip().removeprefix("<think>").strip()
    if inline and any(isinstance(message.get(name), str) and message[name].strip() == inline for name in REASONING):
        return {**message, "content": rest.lstrip()}
    return message


def reasons_twice(message: dict) -> bool:
    """Whether a checked answer begins its content with other reasoning than its own field has."""
    content = message["content"]
    if not isinstance(content, str) or not content.lstrip().startswith("<think>"):
        return False
    inline = content.partition("</think>")[0].lstrip().removeprefix("<think>").strip()
    return bool(inline) and any(isinstance(message.get(name), str) and message[name].strip() for name in REASONING)


def _check_content(content: Any, role: str, index: int) -> None:
    """Content that is not text: parts, or a tool's result as an object."""
    parts = isinstance(content, list)
    if role == "tool" and (isinstance(content, dict) or (parts and not any(map(_is_text, content)))):
        return
    if not parts:
        raise ChatError("bad content", f"message {index}: content is a {type(content).__name__}")
    for part in content:
        if not (_is_text(part) or (role == "assistant" and _is_thinking(part))):
            raise ChatError("bad content", f"message {index} has {_described(part)}: only text can be trained on")
    if not content and role in ("user", "system", "developer"):
        raise ChatError("no content", f"message {index}, a {role}'s, has no content")


def _described(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS:
        return f"a part of type {kind} without a text"
    return f"a part of type {str(kind)[:40]}" if kind else f"a part that is {str(part)[:40]!r}"


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)


def _is_thinking(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in THINKING_PARTS and _thinking_of(part) is not None


def _thinking_of(part: dict) -> str | None:
    """The text of a thinking part, which some write as text parts again; None if there is none."""
    found = next((part[key] for key in ("thinking", "reasoning", "text") if part.get(key) is not None), None)
    if isinstance(found, list) and all(map(_is_text, found)):
        return "".join(inner["text"] for inner in found)
    return found if isinstance(found, str) else None


def _checked_calls(calls: Any, index: int) -> list[dict]:
    """Tool calls without null keys, their arguments an object or its JSON text, which may be empty."""
    if not isinstance(calls, list):
        raise ChatError("bad tool call", f"message {index}: tool_calls is a {type(calls).__name__}")
    checked = []
    for call in calls:
        if not isinstance(call, dict):
            raise ChatError("bad tool call", f"message {index}: a tool call is a {type(call).__name__}")
        call = {key: value for key, value in call.items() if value is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError("bad tool call", f"message {index}: a tool call without a function name")
        as_object(function.get("arguments"), index)
        function = {"arguments": {}, **{key: value for key, value in function.items() if value is not None}}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def as_object(arguments: Any, index: int) -> dict:
    """Tool call arguments, given as an object or as its JSON text; null and empty text are an empty object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ChatError("bad tool arguments", f"message {index}: {error}") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise ChatError("bad tool arguments", f"message {index}: a {type(arguments).__name__}")
    return arguments


def calls_with(message: dict, convert: Callable[[Any], Any]) -> dict:
    """The message with the arguments of its tool calls converted: convert(arguments) -> arguments."""
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        function = {**function, "arguments": convert(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


# --- one form, for the built-in templates -------------------------------------------------------------------


def clean_messages(messages: Any) -> list[dict]:
    """Check a conversation and bring it to one form; the input is not changed.

    Content becomes a string (null is empty, text parts are joined, a tool's object becomes JSON text), tool call
    arguments become objects, and an answer's reasoning is in `reasoning_content`, whatever it was called before
    and whether it had its own field or was a part of the content. Raises ChatError.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("no messages")
    plain = [
        type(message) is dict
        and len(message) == 2
        and type(message.get("content")) is str
        and message.get("role") in ROLES
        for message in messages
    ]
    if all(plain):  # most are so
        return messages
    return [
        message if plain[index] else _cleaned(_checked(message, index), index) for index, message in enumerate(messages)
    ]


def _cleaned(message: dict, index: int) -> dict:
    content = message["content"]
    if message["role"] == "assistant":
        reasoning = reasoning_of(message, index)
        message = {key: value for key, value in message.items() if key not in REASONING}
        if reasoning:
            message["reasoning_content"] = reasoning
    if not isinstance(content, str):
        message = {**message, "content": plain_content(content)}
    if "tool_calls" in message:
        message = calls_with(message, lambda arguments: as_object(arguments, index))
    return message


def plain_content(content: Any) -> str:
    """Checked content as one text: null is empty, text parts are joined, any other object is JSON text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(_is_text(part) or _is_thinking(part) for part in content):
        return "".join(part["text"] for part in content if _is_text(part))
    return json.dumps(content, ensure_ascii=False)


def reasoning_of(message: dict, index: int = 0) -> str:
    """An answer's reasoning: its own field, or the thinking parts of its content. Raises ChatError if it has two."""
    content = message["content"]
    parts = [_thinking_of(part) or "" for part in content if _is_thinking(part)] if isinstance(content, list) else []
    found = [message[name] for name in REASONING if message.get(name)] + ["\n".join(parts)] * bool(parts)
    if not all(isinstance(value, str) for value in found):
        raise ChatError("bad reasoning", f"message {index}: reasoning is not text")
    if len({value.strip() for value in found}) > 1:
        raise ChatError("bad reasoning", f"message {index} has two different ones")
    return found[0] if found else ""


def is_empty(message: dict) -> bool:
    """Whether an answer has neither an answer (answer_of) nor a tool call."""
    content = message["content"]
    if type(content) is str and content:  # mostly no tag begins or ends it: then there is text outside of all tags
        first, last = content[0], content[-1]
        if first != "<" and last != ">" and not first.isspace() and not last.isspace():
            return False
    return not message.get("tool_calls") and not answer_of(message)


def answer_of(message: dict) -> str:
    """What an answer says behind its reasoning: '' for reasoning without an end, or with nothing behind it."""
    content = plain_content(message["content"])
    _, closed, rest = content.rpartition("</think>")
    if closed:
        return rest.strip()
    before, opened, _ = content.partition("<think>")
    return before.strip() if opened else content.strip()


# --- tools --------------------------------------------------------------------------------------------------


def checked_tools(tools: Any) -> list[dict]:
    """Tool definitions as they are, but MCP's (and OpenCode's) in OpenAI's form. Raises ChatError."""
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ChatError("bad tools", "tools is not a list of objects")
    if any(schema in tool or None in tool.values() for tool in tools for schema in _SCHEMAS):
        tools = [_openai({key: value for key, value in tool.items() if value is not None}) for tool in tools]
    return tools


def check_named(tools: list[dict]) -> None:
    """Raise ChatError for a tool that a model could not call: without a name, or with parameters of no form."""
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ChatError("bad tools", f"a tool without a name: {str(tool)[:60]}")
        if not isinstance(function.get("parameters", {}), dict):
            raise ChatError("bad tools", f"the parameters of {name} are a {type(function['parameters']).__name__}")


_SCHEMAS = ("inputSchema", "input_schema")  # MCP and the AI SDK that OpenCode uses; Anthropic


def _openai(tool: dict) -> dict:
    """A tool whose parameters are called inputSchema or input_schema, as OpenAI writes it; others unchanged."""
    schema = next((tool[name] for name in _SCHEMAS if name in tool), None)
    if schema is None:
        return tool
    if isinstance(schema, dict) and isinstance(schema.get("jsonSchema"), dict):
        schema = schema["jsonSchema"]
    name = tool.get("name") or tool.get("id")
    if not isinstance(name, str) or not isinstance(schema, dict):
        raise ChatError("bad tools", "a tool with an inputSchema but no name, or whose schema is not an object")
    function = {"name": name}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": {**function, "parameters": schema}}


def wrapped(tools: list[dict]) -> list[dict]:
    """Tool definitions inside OpenAI's {"type": "function", "function": ...}."""
    return [tool if "function" in tool else {"type": "function", "function": _inner(tool)} for tool in tools]


def _inner(tool: dict) -> dict:
    return {key: value for key, value in tool.items() if key != "type"}


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
