"""Messages and tools in OpenAI's form, by whatever names a dataset has for roles, keys, calls and arguments."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nemotron_sft.data.blocks import NAME as BLOCKS
from nemotron_sft.data.blocks import blocks_in_text, read_blocks, read_item
from nemotron_sft.data.chat import ChatError
from nemotron_sft.data.chat.flags import MESSAGE_FLAGS
from nemotron_sft.data.chat.messages import REASONING
from nemotron_sft.data.jsontext import NotJSON, loads_text

_ANSWERS = ("gpt", "assistant", "chatgpt", "chatbot", "model", "bot", "ai", "bing", "bard", "claude")
_CALLS = ("function_call", "tool_call", "function_calls", "tool_calls")
_RESULTS = ("tool", "observation", "function", "ipython", "environment", "function_response", "tool_response",
            "observations", "tool_result", "tool_results", "tool_output", "function_result")  # fmt: skip
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(_ANSWERS, "assistant"),
    **dict.fromkeys(_RESULTS, "tool"),
    **dict.fromkeys(_CALLS, "call"),
    "system": "system",
    "developer": "developer",
}
SPEAKER, CONTENT = ("role", "from", "speaker"), ("content", "value", "text", "parts")  # keys of a message, first wins
_ARGUMENTS = ("arguments", "parameters", "input", "args")  # of a tool call
_UNREAD = ("function_calls", "toolCalls", "reasoning_details", "thought", "thoughts", "channel")  # of an answer


def read_messages(messages: list, seen: Counter | None = None) -> list:
    """Messages in OpenAI's form. Calls that are messages of their own belong to the answer before them.

    seen counts conversations with calls or results as content blocks. Raises ChatError.
    """
    found: list = []
    unblocked = False
    for message in messages:
        message, is_call = _message(message)
        content = message.get("content") if type(message) is dict else None
        if type(content) is str and content.startswith("[{") and content.endswith("]"):
            blocks = blocks_in_text(content, message.get("role"))
            message, unblocked = ({**message, "content": blocks}, True) if blocks else (message, unblocked)
        if type(message) is dict and type(message.get("content")) is list:
            several = read_blocks(message)
            unblocked = unblocked or several != [message]
            found += several
            continue
        before = found[-1] if is_call and found and isinstance(found[-1], dict) else {}
        alike = all(before.get(flag) == message.get(flag) for flag in MESSAGE_FLAGS) if before else False
        if alike and before.get("role") == "assistant" and not (before.get("content") and message["content"]):
            content = before.get("content") or message["content"]
            calls = [*(before.get("tool_calls") or []), *message["tool_calls"]]
            found[-1] = {**before, "content": content, "tool_calls": calls}
        else:
            found.append(message)
    if seen is not None and unblocked:
        seen[BLOCKS] += 1
    return found


def _message(message: Any) -> tuple[Any, bool]:
    """One message in OpenAI's form, with tool calls as objects, and whether its role was that of a call."""
    message = as_object(message, "bad message")
    if not isinstance(message, dict):
        return message, False
    if (speaker := first_of(message, SPEAKER)) is None:
        message = read_item(message)
        speaker = first_of(message, SPEAKER)
    content = first_of(message, CONTENT)
    role = message.get(speaker or "role")
    role = SPEAKERS.get(role.lower().strip(), role) if isinstance(role, str) else role
    if (speaker, content) != ("role", "content") or role != message["role"]:
        named = {"role": role, "content": message[content]} if content else {"role": role}
        message = {**named, **{key: value for key, value in message.items() if key not in (speaker, content)}}
    if role == "call":
        thought, calls = _thought(message.get("content"))
        return {**message, "role": "assistant", "content": thought or None, "tool_calls": _calls(calls)}, True
    if role == "assistant":
        _refuse_unread(message)
    if "tool_calls" in message:
        calls = _calls(message["tool_calls"])
        message = {**message, "tool_calls": calls}
        if not calls:
            del message["tool_calls"]
    if "function_call" in message:
        message = {**message}
        if call := message.pop("function_call"):
            message["tool_calls"] = [*(message.get("tool_calls") or []), *_calls(call)]
    return message, False


def _thought(value: Any) -> tuple[str, Any]:
    """The reasoning, with its tags, that stands before the JSON of a call, and the call."""
    if not isinstance(value, str) or not value.lstrip().startswith("<think>"):
        return "", value
    thought, closed, calls = value.partition("</think>")
    return thought + closed, calls


def _refuse_unread(message: dict) -> None:
    """Raises ChatError for a part of an answer that has a name which no template reads."""
    for key in _UNREAD:
        if not message.get(key) or (key == "channel" and message[key] == "final"):
            continue
        if key == "reasoning_details" and any(message.get(name) for name in REASONING):
            continue  # the same once more
        belongs = "reasoning belongs in reasoning_content, calls in tool_calls"
        raise ChatError("unread field", f"an answer has {key}, which is not read; {belongs}")


def told_tools(messages: list) -> tuple[list, Any]:
    """The messages and the tools that the first of them, a system's, has as a key."""
    first = messages[0]
    key = next((key for key in ("tools", "functions") if first.get(key)), None)
    if key is None or first.get("role") not in ("system", "developer"):
        return messages, None
    return [{name: value for name, value in first.items() if name != key}, *messages[1:]], first[key]


def _calls(value: Any) -> list:
    """Tool calls: one or several, each an object, JSON text, or {"name", "arguments"} by itself."""
    value = parsed(value, "bad tool call")
    calls = []
    for call in value if isinstance(value, list) else [] if value is None else [value]:
        call = as_object(call, "bad tool call")
        if isinstance(call, dict) and isinstance(call.get("function"), str):
            call = {**call, "function": as_object(call["function"], "bad tool call")}
        if isinstance(call, dict) and "function" not in call:
            kept = {key: call[key] for key in ("id",) if key in call}
            call = {**kept, "type": "function", "function": {k: v for k, v in call.items() if k not in ("id", "type")}}
        if isinstance(call, dict) and isinstance(call["function"], dict):
            call = {**call, "function": _with_arguments(call["function"])}
        calls.append(call)
    return calls


def _with_arguments(function: dict) -> dict:
    """A called function whose arguments are called so."""
    key = next((name for name in _ARGUMENTS if function.get(name) is not None), "arguments")
    if key == "arguments":
        return function
    return {**{name: value for name, value in function.items() if name not in _ARGUMENTS}, "arguments": function[key]}


def first_of(there: dict, names: tuple[str, ...]) -> str | None:
    """The first of the names that is a key."""
    return next((name for name in names if name in there), None)


# --- tools and JSON text -----------------------------------------------------------------------------------


def read_tools(value: Any) -> list:
    """Tool definitions, each an object whose parts are objects too."""
    value = parsed(value, "bad tools")
    if isinstance(value, dict):  # one tool by itself
        if not {"name", "function", "id"} & value.keys():
            raise ChatError("bad tools", "an object without a name, not a list of tools")
        value = [value]
    if not value:
        return []
    if not isinstance(value, list):
        raise ChatError("bad tools", f"a {type(value).__name__}, not a list")
    return [_without_null(tool) if _has_null(tool) else tool for tool in map(_tool, value)]


_VALUES = frozenset(("default", "const", "examples", "enum"))  # of a schema: null may be one


def _has_null(value: Any) -> bool:
    """Whether a key that says nothing is null, at any depth."""
    if isinstance(value, dict):
        if None in value.values() and any(item is None and key not in _VALUES for key, item in value.items()):
            return True
        value = [item for item in value.values() if type(item) is dict or type(item) is list]
    return isinstance(value, list) and any(map(_has_null, value))


def _without_null(value: Any) -> Any:
    """The value without such keys, as Parquet's columns and to_json() give them to every tool."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None or key in _VALUES}
    return list(map(_without_null, value)) if isinstance(value, list) else value


def _tool(tool: Any) -> Any:
    tool = as_object(tool, "bad tools")
    if isinstance(tool, dict):
        for key in ("function", "parameters", "inputSchema", "input_schema"):
            if isinstance(tool.get(key), (str, dict)) and tool[key]:
                inner = as_object(tool[key], "bad tools")
                tool = {**tool, key: _tool(inner) if key == "function" else inner}
    return tool


def as_object(value: Any, reason: str) -> Any:
    """What may be an object's JSON text, as the object; any other value as it is."""
    return parsed(value, reason) if isinstance(value, str) and value.lstrip()[:1] == "{" else value


def parsed(value: Any, reason: str) -> Any:
    """What may be JSON text, parsed; blank text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return loads_text(value)
    except NotJSON as error:
        raise ChatError(reason, f"text that is not JSON: {error}") from None
