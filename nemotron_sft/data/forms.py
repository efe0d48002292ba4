"""The forms in which datasets write conversations down, and how each becomes messages and tools.

    openai     messages with role and content, tools; also the old functions, function_call and role function
    sharegpt   messages with from (human, gpt, ...) and value
    alpaca     instruction, input, output, and perhaps a history of earlier pairs
    pairs      a prompt and its answer under one of several names, as texts or as lists of messages

Messages of the first two may name roles and keys in either way, also within one file (speakers.py). A dataset's form is
found from its first records (`detect`), or named in the blend. What stands in a list may be JSON text at any level: all
messages, each message, the tool calls, the tools and their parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from nemotron_sft.data.blend import FORMS, Dataset
from nemotron_sft.data.chat import RECORD_KEYS, ROLES, ChatError
from nemotron_sft.data.chat.flags import MESSAGE_FLAGS
from nemotron_sft.data.chat.messages import REASONING
from nemotron_sft.data.jsontext import NotJSON, loads_text
from nemotron_sft.data.speakers import (
    CONTENT,
    SPEAKER,
    SPEAKERS,
    as_object,
    first_of,
    parsed,
    read_messages,
    read_tools,
    told_tools,
)
from nemotron_sft.errors import UserError

TITLES = {"openai": "OpenAI messages", "sharegpt": "ShareGPT", "alpaca": "Alpaca", "pairs": "prompt and answer"}
MESSAGES = ("messages", "conversations", "conversation", "chat", "contents")  # where lists of messages are found
_SYSTEM = ("system", "system_prompt", "systemInstruction", "system_instruction")
_TOOLS = ("tools", "functions", "available_tools")
_CHAT = {"messages": MESSAGES, "tools": _TOOLS, "system": _SYSTEM}
_BESIDE = {"system": _SYSTEM, "history": ("history",), "reasoning": REASONING, "tools": ("tools",)}
_PROMPTS, _ANSWERS = ("prompt", "question", "query", "input"), ("completion", "response", "answer", "output")
# Per form and part, the fields where it is looked for. Parts in NEEDED have to be there.
PARTS = {
    "openai": _CHAT,
    "sharegpt": _CHAT,
    "alpaca": {"prompt": ("instruction",), "input": ("input", "context"), "answer": ("output", "response", "answer"),
               **_BESIDE},
    "pairs": {"prompt": _PROMPTS, "input": ("context",), "answer": _ANSWERS, **_BESIDE},
}  # fmt: skip
NEEDED = {"openai": ("messages",), "sharegpt": ("messages",), "alpaca": ("prompt", "answer"),
          "pairs": ("prompt", "answer")}  # fmt: skip
_KNOWN = frozenset(ROLES)
_both = itemgetter("role", "content")
_last = itemgetter(-1)
_ENDS = frozenset("]> \n")  # of a text that may be the JSON of blocks, or end with a mark of a template
_KEYS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", *MESSAGE_FLAGS, *REASONING))
NOTED = {*MESSAGE_FLAGS, "reasoning", "reasoning_content", "thinking", "tool_calls"}


@dataclass(frozen=True)
class Form:
    """How one dataset's records hold conversations: a key of PARTS, and (part, field) of every part that is there.

    unread: the fields of its first records that nothing reads; unread_keys: those of their messages.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    unread: tuple[str, ...] = ()
    unread_keys: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The fields that are read."""
        return [field for _, field in self.parts]

    def is_plain(self, messages: list, record: dict) -> bool:
        """Whether messages that `conversation` gave are those of the record, as they were: known roles and texts, of
        which none ends as a mark of a template does (chat/marks.py). Most are so, and this takes no time."""
        return messages is record.get(self.parts[0][1])

    def __str__(self) -> str:
        return f"{TITLES[self.name]} ({', '.join(self.columns)})"

    def conversation(self, record: dict, seen: Counter | None = None) -> tuple[list, list]:
        """A record's messages and tools. What is no message stays as it is, for the template to refuse.

        seen counts the records whose messages have a key of NOTED. Raises ChatError.
        """
        parts = dict(self.parts)
        messages = _READERS[self.name](record, parts, seen)
        system = _value(record, parts, "system")
        if system and not (messages and type(messages[0]) is dict and messages[0].get("role") == "system"):
            first = {"role": "system", "content": system}
            if type(system) is not str:  # blocks, or Gemini's {"parts": blocks}
                first = {"role": "system", **system} if type(system) is dict else first
                [first] = read_messages([first])
            messages = [first, *messages]
        if seen is not None and not _brief(messages):
            more = [m for m in messages if type(m) is dict and len(m) > 2]
            seen.update({key for message in more for key in NOTED & message.keys() if message[key] is not None})
        tools = _value(record, parts, "tools")
        if not tools and messages and type(messages[0]) is dict and len(messages[0]) > 2:
            messages, tools = told_tools(messages)
        return messages, read_tools(tools) if tools else []

    def aligned(self, turns: Any, record: dict, messages: list) -> Any:
        """A record's train_turns, one for each of `messages`, also where a system message comes from another field."""
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if not isinstance(turns, list) or len(turns) != len(messages) - 1 or first.get("role") != "system":
            return turns
        system = _value(record, dict(self.parts), "system")
        return [False, *turns] if system and first.get("content") is system else turns


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
        parts = {"messages": "messages", **given}
        return Form(dataset.form or "openai", tuple((part, field) for part, field in parts.items() if field))
    name, field = (dataset.form, None) if dataset.form else _most_likely(records, given)
    if field:
        given["prompt" if name == "pairs" else "messages"] = field
    if name is None:
        raise UserError(
            f"dataset {dataset.name}: no conversations recognised in its first records, which have "
            f"{listed(there)}; say form ({', '.join(FORMS)}) and fields, or messages_field (docs/data.md)"
            + _preference(records[0])
        )
    if unknown := [part for part in dataset.fields if part not in PARTS[name]]:
        raise UserError(
            f"dataset {dataset.name}: form {name} has no part {unknown[0]}: known are {', '.join(PARTS[name])}"
        )
    parts = _parts(name, given, records, there)
    for part in NEEDED[name]:
        if parts[part] not in there:
            wanted = parts[part] or " or ".join(PARTS[name][part])
            raise UserError(
                f"dataset {dataset.name}: form {name} needs a field for {part}, and no record has {wanted}, only "
                f"{listed(there)}; say fields: {{{part}: NAME}}"
            )
    read = {*parts.values(), *RECORD_KEYS, dataset.weight_field, *dataset.filter}
    found = tuple((part, field) for part, field in parts.items() if field)
    form = Form(name, found, tuple(field for field in there if field not in read))
    return replace(form, unread_keys=_unread_keys(form, records))


def _unread_keys(form: Form, records: list[dict]) -> tuple[str, ...]:
    """The keys of messages that nothing here reads."""
    keys: dict[str, None] = {}
    for record in records:
        with suppress(ChatError):
            for message in form.conversation(record)[0]:
                if isinstance(message, dict):
                    keys |= {key: None for key, value in message.items() if value is not None and key not in _KEYS}
    return tuple(keys)


def _parts(name: str, given: dict, records: list[dict], there: Counter) -> dict[str, str | None]:
    """The field of each part, as given or else by its usual names; a part that is given as null is left out."""
    parts: dict[str, str | None] = {}
    for part, choices in PARTS[name].items():
        free = (choice for choice in choices if choice in there and choice not in parts.values())
        parts[part] = given[part] if part in given else next(free, None)
    field = parts.get("reasoning")
    if field and "reasoning" not in given and not any(_is_prose(record.get(field)) for record in records):
        parts["reasoning"] = None  # "on" or "off" in some datasets
    return parts


def _is_prose(value: Any) -> bool:
    return isinstance(value, str) and len(value.split(maxsplit=1)) > 1


def _preference(record: dict) -> str:
    """What to say of data that has good and bad answers."""
    if "chosen" not in record:
        return ""
    if isinstance(record["chosen"], list):
        return "; messages_field: chosen trains on the chosen answers"
    return "; fields: {prompt: prompt, answer: chosen} trains on the chosen answers" if "prompt" in record else ""


def _most_likely(records: list[dict], given: dict[str, str | None]) -> tuple[str | None, str | None]:
    """The form that most records have, and the field of their messages."""
    votes = Counter(found for record in records if (found := _form_of(record, given)))
    return votes.most_common(1)[0][0] if votes else (None, None)


def _form_of(record: dict, given: dict[str, str | None]) -> tuple[str, str | None] | None:
    """The form that one record has and the field of its messages, None for no form that is known.

    Messages that wait for the answer in a field beside them are the prompt of a pair.
    """
    if {"prompt", "answer"} <= given.keys():
        return ("alpaca" if {"input", "history"} & given.keys() else "pairs"), None
    has = {key for key, value in record.items() if value is not None}
    for field in [given["messages"]] if "messages" in given else MESSAGES:
        if field in record and (form := _kind_of_messages(record[field])):
            waits = "messages" not in given and not has.isdisjoint(_ANSWERS) and _waits(record[field])
            return ("pairs" if waits else form), field
    if "messages" in given:
        return None
    if "instruction" in has and not has.isdisjoint(PARTS["alpaca"]["answer"]):
        return "alpaca", None
    if not has.isdisjoint(_PROMPTS) and not has.isdisjoint(_ANSWERS):
        return "pairs", None
    return None


def _kind_of_messages(value: Any) -> str | None:
    """ "openai" or "sharegpt", by the keys of the first message."""
    try:
        first = next(iter(_messages(value)), None)
        first = as_object(first, "bad message")
    except ChatError:
        return None
    if not isinstance(first, dict):
        return None
    return (
        "openai" if "role" in first else "sharegpt" if first_of(first, SPEAKER) and first_of(first, CONTENT) else None
    )


def _waits(value: Any) -> bool:
    """Whether the last of these messages is not an answer."""
    last = as_object(_messages(value)[-1], "bad message")
    role = last.get(first_of(last, SPEAKER) or "role") if isinstance(last, dict) else None
    return isinstance(role, str) and SPEAKERS.get(role.lower().strip()) in ("user", "tool")


def listed(there: Iterable[str]) -> str:
    """Names of fields, the first 20 and each cut to 40 characters, in one line."""
    names = [name if len(name) < 40 else name[:37] + "..." for name in there]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "no fields"


# --- messages ----------------------------------------------------------------------------------------------


def _openai(record: dict, parts: dict[str, str], seen: Counter | None) -> list:
    field = parts["messages"]
    if field not in record:
        names = listed(record)
        raise ChatError("no messages", f"the record has no {field} (messages_field), only {names}")
    messages = record[field]
    if type(messages) is not list:
        messages = _messages(messages)
    return _as_it_is(messages) or read_messages(messages, seen)


def _as_it_is(messages: list) -> list | None:
    """The messages, if they are objects with a known role and no more than a text beside it, as nearly all are.

    The list itself if no text ends as a mark of a template does, otherwise another one (see Form.is_plain). None for
    others, and where a text looks like the JSON of blocks.
    """
    try:
        roles, contents = zip(*map(_both, messages), strict=True)
        if _KNOWN.issuperset(roles) and max(map(len, messages)) == 2:
            if _ENDS.isdisjoint(map(_last, contents)):
                return messages
            return None if any(text[:2] == "[{" for text in contents) else [*messages]
    except (TypeError, KeyError, ValueError, IndexError):  # no objects, other keys, no messages, no text
        pass
    return None


def _brief(messages: list) -> bool:
    """Whether all messages are objects with no more than role and content."""
    return set(map(type, messages)) == {dict} and max(map(len, messages)) <= 2


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


def _pairs(record: dict, parts: dict[str, str], seen: Counter | None) -> list:
    prompt, answer = _said(record.get(parts["prompt"])), _said(record.get(parts["answer"]))
    more = _text(record, parts, "input")
    before = _history(record, parts)
    if isinstance(prompt, list):  # of messages: what was said before is not trained
        if more:
            raise ChatError("bad input", f"{parts['input']} beside a prompt of messages")
        said = read_messages(prompt, seen)
        before += [{"weight": 0, **m} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in said]
    else:
        texts = [text for text in (_text(record, parts, "prompt"), more) if text]
        before.append({"role": "user", "content": None if prompt is None and not more else "\n\n".join(texts)})
    return before + (read_messages(answer, seen) if isinstance(answer, list) else [_answer(record, parts)])


def _history(record: dict, parts: dict[str, str]) -> list:
    """What was said before, as pairs of texts or as messages."""
    found = []
    history = _value(record, parts, "history") or []
    if isinstance(history, str) and history.lstrip()[:1] in ("", "["):
        history = parsed(history, "bad history") or []
    for entry in history if isinstance(history, list) else [history]:
        if isinstance(entry, dict):
            found += read_messages([entry])
        elif isinstance(entry, list) and len(entry) == 2:
            found += [{"role": "user", "content": entry[0]}, {"role": "assistant", "content": entry[1]}]
        else:
            raise ChatError("bad history", "not a list of pairs of texts; fields: {history: null} leaves it out")
    return found


def _said(value: Any) -> Any:
    """A prompt or an answer: messages as a list, also if they are one object or JSON text; a text as it is."""
    if isinstance(value, str) and value.lstrip()[:2] == "[{":
        try:
            messages = loads_text(value)
        except NotJSON:
            return value
        spoken = all(isinstance(m, dict) and first_of(m, SPEAKER) and first_of(m, CONTENT) for m in messages)
        return messages if spoken else value
    return [value] if isinstance(value, dict) else value


_READERS: dict[str, Callable[[dict, dict[str, str], Counter | None], list]] = {
    "openai": _openai, "sharegpt": _openai, "alpaca": _pairs, "pairs": _pairs,
}  # fmt: skip


def _messages(value: Any) -> list:
    """Messages given as a list, as JSON text, or as an object of equally long lists (as Hugging Face datasets stores
    a Sequence)."""
    value = parsed(value, "bad messages")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise ChatError("bad messages", "lists of different lengths")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if value is None or value == "":
        raise ChatError("no messages")
    if not isinstance(value, list):
        raise ChatError("bad messages", f"a {type(value).__name__}, not a list")
    return value
