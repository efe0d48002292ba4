"""Messages whose content holds calls and results as blocks, in OpenAI's form.

Anthropic's tool_use and tool_result, the AI SDK's tool-call and tool-result (OpenCode's, too), Bedrock's toolUse and
toolResult, and Gemini's functionCall and functionResponse. A text block may come without a type, and all blocks as
JSON text. Calls and results of OpenAI's Responses API are items of their own.
"""

from __future__ import annotations

from typing import Any

from nemotron_sft.data.chat import ChatError
from nemotron_sft.data.chat.messages import TEXT_PARTS, THINKING_PARTS
from nemotron_sft.data.jsontext import NotJSON, loads_text

NAME = "content blocks"  # what reports call them
_KEYS = ("toolUse", "functionCall", "toolResult", "functionResponse")  # of a block, instead of a type
_CALLS = ("tool_use", "tool-call", *_KEYS[:2])
_RESULTS = ("tool_result", "tool-result", *_KEYS[2:])
_BLOCKS = frozenset((*_CALLS, *_RESULTS))
_KNOWN = _BLOCKS.union(TEXT_PARTS, THINKING_PARTS)
_OUTPUTS = ("content", "output", "result", "response")  # of a result's block, first wins


def read_item(message: dict) -> dict:
    """A call or a result as the Responses API has it, as a message of a role of its own; any other as it is."""
    number = message.get("call_id")
    if message.get("type") == "function_call":
        call = {key: message[key] for key in ("name", "arguments") if key in message}
        return {"role": "tool_call", "content": {"id": number, **call} if number else call}
    if message.get("type") == "function_call_output":
        return {"role": "tool", "content": message.get("output"), "tool_call_id": number}
    return message


def blocks_in_text(content: str, role: Any) -> list | None:
    """The blocks that a text is the JSON of, None for any other text."""
    try:
        blocks = loads_text(content)
    except NotJSON:
        return None
    kinds = {str(block.get("type")) if isinstance(block, dict) else "" for block in blocks}
    return blocks if kinds <= _KNOWN and (role != "tool" or kinds & _BLOCKS) else None


def read_blocks(message: dict) -> list[dict]:
    """A message as one or more without blocks; results and what is said beside them keep their order.

    Raises ChatError for what has no place in OpenAI's form.
    """
    blocks = message["content"]
    if message.get("role") != "tool" or any(isinstance(block, dict) and block.keys() & _KEYS for block in blocks):
        blocks = [_typed(block) for block in blocks]  # otherwise a tool's result is any list
    kinds = {str(block.get("type")) for block in blocks if isinstance(block, dict)}
    if _BLOCKS.isdisjoint(kinds):
        return [message if blocks == message["content"] else {**message, "content": blocks}]
    if message.get("role") == "assistant":
        return [_calling(message, blocks)]
    found: list[dict] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in _RESULTS:
            found.append({**message, "role": "tool", **_result(block)})
        elif found and found[-1]["role"] == message.get("role") != "tool":
            found[-1]["content"].append(block)
        else:
            found.append({**message, "content": [block]})
    return found


def _typed(block: Any) -> Any:
    """A block of Bedrock's, or a bare text, with its type as a key."""
    if not isinstance(block, dict) or "type" in block:
        return block
    if block.keys() == {"text"}:
        return {"type": "text", **block}
    kind = next((kind for kind in _KEYS if isinstance(block.get(kind), dict)), None)
    return {"type": kind, **block[kind]} if kind else block


def _calling(message: dict, blocks: list) -> dict:
    """An answer with its calls as tool_calls."""
    given, said = message.get("tool_calls") or [], []
    if not isinstance(given, list):
        raise ChatError("bad tool calls", "calls are in the content, and tool_calls beside it is no list")
    calls = list(given)
    for block in blocks:
        if isinstance(block, dict) and block.get("type") in _CALLS:
            calls.append(_call(block))
        elif calls and not (isinstance(block, dict) and block.get("text") == ""):
            raise ChatError("bad content", "an answer says more behind a call: no template has a place for that")
        else:
            said.append(block)
    return {**message, "content": said or None, "tool_calls": calls}


def _call(block: dict) -> dict:
    function = {"name": _first(block, "name", "toolName"), "arguments": _first(block, "input", "args", "arguments")}
    number = _first(block, "id", "toolCallId", "toolUseId")
    return {**({"id": number} if number else {}), "type": "function", "function": function}


def _result(block: dict) -> dict:
    """The keys of a tool's message."""
    content, name = _first(block, *_OUTPUTS), _first(block, "name", "toolName")
    if isinstance(content, dict) and {"type", "value"} <= content.keys():  # the AI SDK's, since its version 5
        content = content["value"]
    if isinstance(content, list):
        content = [_typed(part) for part in content]
    number = _first(block, "tool_use_id", "toolCallId", "toolUseId")
    named = {"tool_call_id": number, "name": name}
    return {"content": "" if content is None else content, **{k: v for k, v in named.items() if v is not None}}


def _first(block: dict, *keys: str) -> Any:
    """The first of the keys that is not null."""
    return next((block[key] for key in keys if block.get(key) is not None), None)
