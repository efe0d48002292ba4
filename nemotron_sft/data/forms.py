"""The forms in which datasets write conversations down, and how each becomes messages and tools.

    openai     messages with role and content, tools; also the old functions, function_call and role function
    sharegpt   messages with from (human, gpt, ...) and value
    alpaca     instruction, input, output, and perhaps a history of earlier pairs
    pairs      a prompt and its answer under one of several names, as texts or as lists of messages

A dataset's form is found from its first records (`detect`), or named in the blend. What stands in a list may be JSON
text at any level: all messages, each message, the tool calls, the tools and their parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nemotron_sft.data.blend import FORMS, Dataset
from nemotron_sft.data.chat import ChatError
from nemotron_sft.data.chat.flags import MESSAGE_FLAGS
from nemotron_sft.data.jsontext import NotJSON, loads_text
from nemotron_sft.errors import UserError

TITLES = {"openai": "OpenAI messages", "sharegpt": "ShareGPT", "alpaca": "Alpaca", "pairs": "prompt and answer"}
MESSAGES = ("messages", "conversations", "conversation", "chat")  # where lists of messages are found
# Per form and part, the fields where it is looked for. Parts in NEEDED have to be there.
PARTS = {
    "openai": {"messages": MESSAGES, "tools": ("tools", "functions"), "system": ("system", "system_prompt")},
    "sharegpt": {"messages": MESSAGES, "tools": ("tools", "functions"), "system": ("system", "system_prompt")},
    "alpaca": {
        "prompt": ("instruction",), "input": ("input", "context"), "answer": ("output", "response"),
        "system": ("system", "system_prompt"), "history": ("history",), "reasoning": (), "tools": ("tools",),
    },
    "pairs": {
        "prompt": ("prompt", "question", "query", "input"),
        "answer": ("completion", "response", "answer", "output"),
        "system": ("system", "system_prompt"), "reasoning": (), "tools": ("tools",),
    },
}  # fmt: skip
NEEDED = {"openai": ("messages",), "sharegpt": ("messages",), "alpaca": ("prompt", "answer"),
          "pairs": ("prompt", "answer")}  # fmt: skip
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
         ("input", "output"))  # fmt: skip
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "ai", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    "system": "system",
    "developer": "developer",
}
NOTED = {*MESSAGE_FLAGS, "reasoning", "reasoning_content", "thinking", "tool_calls"}


@dataclass(frozen=True)
class Form:
    """How one dataset's records hold conversations: a key of PARTS, and (part, field) of every part that is there."""

    name: str
    parts: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> list[str]:
        """The fields that are read."""
        return [field for _, field in self.parts]

    def __str__(self) -> str:
        return f"{TITLES[self.name]} ({', '.join(self.columns)})"

    def conversation(self, record: dict, seen: Counter | None = None) -> tuple[list, list]:
        """A record's messages and tools. What is no message stays as it is, for the template to refuse.

        seen counts the records whose messages have a key of NOTED. Raises ChatError.
        """
        parts = dict(self.parts)
        messages = _READERS[self.name](record, parts)
        system = _value(record, parts, "system")
        if system and not (messages and type(messages[0]) is dict and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": system}, *messages]
        if seen is not None and not _brief(messages):
            more = [m for m in messages if type(m) is dict and len(m) > 2]
            seen.update({key for message in more for key in NOTED & message.keys() if message[key] is not None})
        tools = _value(record, parts, "tools")
        return messages, _tools(tools) if tools else []


# --- which form --------------------------------------------------------------------------------------------


def detect(dataset: Dataset, records: Iterable[dict], messages_field: str, tools_field: str) -> Form:
    """The form of a dataset, from what its blend entry says and its first records.

    messages_field, tools_field: of the run; the dataset's own come before them. Raises UserError, with the fields
    that there are, when nothing is recognised.
    """
    records = list(records)
    there = Counter(key for record in records for key, value in record.items() if value is not None)
    given = {**dataset.fields}
    for part, own, general in (
        ("messages", dataset.messages_field, messages_field),
        ("tools", dataset.tools_field, tools_field),
    ):
        name = own or (general if general != part else None)
        if name and part not in given:
            given[part] = name
    if not records:
        return Form(dataset.form or "openai", tuple({"messages": "messages", **given}.items()))
    name, field = (dataset.form, None) if dataset.form else _most_likely(records, given)
    if field:
        given["messages"] = field
    if name is None:
        raise UserError(
            f"dataset {dataset.name}: no conversations recognised in its first records, which have "
            f"{_listed(there)}; say form ({', '.join(FORMS)}) and fields, or messages_field (docs/data.md)"
        )
    if unknown := [part for part in dataset.fields if part not in PARTS[name]]:
        raise UserError(
            f"dataset {dataset.name}: form {name} has no part {unknown[0]}: known are {', '.join(PARTS[name])}"
        )
    parts = {part: given.get(part) or _present(choices, there) for part, choices in PARTS[name].items()}
    if name == "pairs" and not {"prompt", "answer"} & given.keys():
        parts |= next((dict(zip(("prompt", "answer"), p, strict=True)) for p in PAIRS if set(p) <= set(there)), {})
    for part in NEEDED[name]:
        if parts[part] not in there:
            wanted = parts[part] or " or ".join(PARTS[name][part])
            raise UserError(
                f"dataset {dataset.name}: form {name} needs a field for {part}, and no record has {wanted}, only "
                f"{_listed(there)}; say fields: {{{part}: NAME}}"
            )
    return Form(name, tuple((part, field) for part, field in parts.items() if field))


def _most_likely(records: list[dict], given: dict[str, str]) -> tuple[str | None, str | None]:
    """The form that most records have, and the field of their messages."""
    votes = Counter(found for record in records if (found := _form_of(record, given)))
    return votes.most_common(1)[0][0] if votes else (None, None)


def _form_of(record: dict, given: dict[str, str]) -> tuple[str, str | None] | None:
    """The form that one record has and the field of its messages, None for no form that is known."""
    if {"prompt", "answer"} <= given.keys():
        return ("alpaca" if {"input", "history"} & given.keys() else "pairs"), None
    for field in [given["messages"]] if "messages" in given else MESSAGES:
        if field in record and (form := _kind_of_messages(record[field])):
            return form, field
    if "messages" in given:
        return None
    if "instruction" in record and ("output" in record or "response" in record):
        return "alpaca", None
    if any(prompt in record and answer in record for prompt, answer in PAIRS):
        return "pairs", None
    return None


def _kind_of_messages(value: Any) -> str | None:
    """ "openai" or "sharegpt", by the keys of the first message."""
    try:
        first = next(iter(_messages(value)), None)
        first = _object(first, "bad message")
    except ChatError:
        return None
    if not isinstance(first, dict):
        return None
    return "openai" if "role" in first else "sharegpt" if "from" in first and "value" in first else None


def _present(choices: tuple[str, ...], there: Counter) -> str | None:
    return next((choice for choice in choices if choice in there), None)


def _listed(there: Counter) -> str:
    names = [name if len(name) < 40 else name[:37] + "..." for name in there]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "no fields"


# --- messages ----------------------------------------------------------------------------------------------


def _openai(record: dict, parts: dict[str, str]) -> list:
    field = parts["messages"]
    if field not in record:
        names = _listed(Counter(record.keys()))
        raise ChatError("no messages", f"the record has no {field} (messages_field), only {names}")
    messages = record[field]
    if type(messages) is not list:
        messages = _messages(messages)
    return messages if _brief(messages) else [_openai_message(message) for message in messages]


def _brief(messages: list) -> bool:
    """Whether all messages are objects with no more than role and content."""
    return set(map(type, messages)) == {dict} and max(map(len, messages)) <= 2


def _openai_message(message: Any) -> Any:
    """One message with its tool calls as objects, the old function calls as tool calls."""
    message = _object(message, "bad message")
    if not isinstance(message, dict):
        return message
    if isinstance(message.get("tool_calls"), (str, list)) and message["tool_calls"]:
        message = {**message, "tool_calls": _calls(message["tool_calls"])}
    if "function_call" in message:
        message = {**message}
        if call := message.pop("function_call"):
            message["tool_calls"] = [*(message.get("tool_calls") or []), *_calls(call)]
    if message.get("role") == "function":
        message = {**message, "role": "tool"}
    return message


def _calls(value: Any) -> list:
    """Tool calls: one or several, each an object, JSON text, or {"name", "arguments"} by itself."""
    value = _parsed(value, "bad tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = _object(call, "bad tool call")
        if isinstance(call, dict) and isinstance(call.get("function"), str):
            call = {**call, "function": _object(call["function"], "bad tool call")}
        if isinstance(call, dict) and "function" not in call:
            kept = {key: call[key] for key in ("id",) if key in call}
            call = {**kept, "type": "function", "function": {k: v for k, v in call.items() if k not in ("id", "type")}}
        calls.append(call)
    return calls


def _sharegpt(record: dict, parts: dict[str, str]) -> list:
    return [_sharegpt_message(message) for message in _openai(record, parts)]


def _sharegpt_message(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, content = message["from"], message.get("value")
    role = SPEAKERS.get(speaker.lower().strip(), speaker) if isinstance(speaker, str) else speaker
    if role == "call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(content), **rest}
    return {"role": role, "content": content, **rest}


def _alpaca(record: dict, parts: dict[str, str]) -> list:
    texts = [_text(record, parts, part) for part in ("prompt", "input")]
    messages = []
    history = _parsed(_value(record, parts, "history"), "bad history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ChatError("bad history", "not a list of pairs of texts")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = "\n\n".join(text for text in texts if text)
    return [*messages, {"role": "user", "content": prompt}, _answer(record, parts)]


def _value(record: dict, parts: dict[str, str], part: str) -> Any:
    """What a record has for a part, None where the form has no field for it."""
    return record.get(parts[part]) if part in parts else None


def _text(record: dict, parts: dict[str, str], part: str) -> str:
    """One field's text, "" where there is none."""
    value = _value(record, parts, part)
    if value is not None and not isinstance(value, str):
        raise ChatError(f"bad {part}", f"{parts[part]} is a {type(value).__name__}, not a text")
    return value or ""


def _answer(record: dict, parts: dict[str, str]) -> dict:
    """The answer of a record that has one."""
    answer = {"role": "assistant", "content": record.get(parts["answer"])}
    if not isinstance(answer["content"], (str, type(None))):
        raise ChatError("bad answer", f"{parts['answer']} is a {type(answer['content']).__name__}, not a text")
    if reasoning := _text(record, parts, "reasoning"):
        answer["reasoning_content"] = reasoning
    return answer


def _pairs(record: dict, parts: dict[str, str]) -> list:
    prompt, answer = record.get(parts["prompt"]), record.get(parts["answer"])
    if isinstance(prompt, list):  # of messages: what was said before is not trained
        before = [_sharegpt_message(_openai_message(message)) for message in prompt]
        before = [{"weight": 0, **m} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in before]
    else:
        before = [{"role": "user", "content": _text(record, parts, "prompt") if prompt else prompt}]
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        return before + [_sharegpt_message(_openai_message(message)) for message in answer]
    return [*before, _answer(record, parts)]


_READERS: dict[str, Callable[[dict, dict[str, str]], list]] = {
    "openai": _openai, "sharegpt": _sharegpt, "alpaca": _alpaca, "pairs": _pairs,
}  # fmt: skip


def _messages(value: Any) -> list:
    """Messages given as a list, as JSON text, or as an object of equally long lists (as Hugging Face datasets stores
    a Sequence)."""
    value = _parsed(value, "bad messages")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise ChatError("bad messages", "lists of different lengths")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if value is None or value == "":
        raise ChatError("no messages")
    if not isinstance(value, list):
        raise ChatError("bad messages", f"a {type(value).__name__}, not a list")
    return value


# --- tools and JSON text -----------------------------------------------------------------------------------


def _tools(value: Any) -> list:
    """Tool definitions, each an object whose parts are objects too."""
    value = _parsed(value, "bad tools")
    if isinstance(value, dict):  # one tool by itself
        value = [value]
    if not value:
        return []
    if not isinstance(value, list):
        raise ChatError("bad tools", f"a {type(value).__name__}, not a list")
    return [_tool(tool) for tool in value]


def _tool(tool: Any) -> Any:
    tool = _object(tool, "bad tools")
    if isinstance(tool, dict):
        for key in ("function", "parameters", "inputSchema", "input_schema"):
            if isinstance(tool.get(key), (str, dict)) and tool[key]:
                inner = _object(tool[key], "bad tools")
                tool = {**tool, key: _tool(inner) if key == "function" else inner}
    return tool


def _object(value: Any, reason: str) -> Any:
    """What may be an object's JSON text, as the object; any other value as it is."""
    return _parsed(value, reason) if isinstance(value, str) and value.lstrip()[:1] == "{" else value


def _parsed(value: Any, reason: str) -> Any:
    """What may be JSON text, parsed; blank text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return loads_text(value)
    except NotJSON as error:
        raise ChatError(reason, f"text that is not JSON: {error}") from None
