"""NVIDIA's Nemotron 3 templates: Nano, Super, and 3.5 Lightning, whose text Ultra shares.

The same text as templates/nemotron3.jinja, written out in Python: rendering runs once for every record of a
blend, and this takes a twelfth of the time. The tests hold the two together.

Mostly one training sequence holds the whole conversation. Where the template drops earlier reasoning, or marks the
last question with an effort, there is one per turn. An answer that closes a <think> which the prompt had opened
(so do answers taken from a model as they came) is trained behind that prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, ClassVar

from nemotron_sft.data.chat.messages import ChatError, thinks
from nemotron_sft.data.chat.template import Span, Template, answered_turns, last_user

_ANSWER = "<|im_start|>assistant\n"
_END = "<|im_end|>\n"
_OFF, _ON = "<think></think>", "<think>\n"  # what a generation prompt puts after _ANSWER
_TOOL_RULES = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested \
within <tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, \
but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and \
do not tell the user about function calls
</IMPORTANT>"""


@dataclass(frozen=True)
class _Style:
    """How a conversation is written: what its template, its options and the conversation's own say."""

    keep: bool  # the reasoning of earlier turns
    note: str  # behind the last user message: how much to reason
    thinking: bool  # whether a prompt asks for reasoning
    gap: str  # around </think>
    trims: bool  # whitespace of an earlier answer before its tool calls

    def answer(self, message: dict, forget: bool) -> str:
        """The text of an answer between its two ChatML lines; `forget` takes its reasoning out."""
        content, reasoning = message["content"], message.get("reasoning_content")
        calls = message.get("tool_calls")
        if not reasoning and not calls and "think>" not in content:  # most are so: the rest in brief
            return f"<think></think>{content}".rstrip()
        if isinstance(reasoning, str) and reasoning.strip():
            content = f"<think>\n{reasoning}{self.gap}</think>{self.gap}{content}"
        elif "<think>" not in content and "</think>" not in content:
            content = "<think></think>" + content
        forget = forget and not self.keep
        if not calls:
            if forget and "<think>" in content and "</think>" in content:
                content = "<think></think>" + content.rpartition("</think>")[2]
            return content.strip()
        if forget:
            content = content.rpartition("</think>")[2] if "</think>" in content else content.partition("<think>")[0]
            content = "<think></think>" + (content.strip() if self.trims else content)
        content = content if forget and not self.trims else content.strip()
        return content + "\n" + "".join(map(_call, calls))

    def as_given(self, message: dict) -> dict:
        """An answer that writes its own think tags, as the model gave it: its text begins with a prompt's opening."""
        if message["role"] != "assistant" or "think>" not in message["content"]:
            return message
        if self.answer(message, False).startswith((_OFF, _ON)):
            return message
        content = message["content"].strip()
        if content.startswith("<think>"):
            content = _ON + content.removeprefix("<think>")
        elif "<think>" not in content.partition("</think>")[0]:  # the opening is in the prompt that it answered
            content = _ON + content
        else:
            content = _OFF + content
        return {**message, "content": content}


class Nano3(Template):
    """Nemotron 3 Nano."""

    _gap, _trims = "\n", True
    _jinja_note = "'{thinking token budget: ' ~ reasoning_budget ~ '}' if reasoning_budget is defined"
    _notes: ClassVar[dict] = {}  # {effort: (the variable that the published template reads, what it writes)}
    _budgets = True  # whether an effort may be a number of tokens
    _thinking_shows = _skips = False

    @classmethod
    def jinja(cls) -> str:
        """The template as Jinja, for whatever serves the model."""
        body = resources.files("nemotron_sft.data.chat").joinpath("templates/nemotron3.jinja").read_text()
        return (
            f"{{%- set gap, trims = {json.dumps(cls._gap)}, {str(cls._trims).lower()} %}}\n"
            f"{{%- set note = {cls._jinja_note} %}}\n"
            "{%- set note = '\\n\\n' ~ note if note else '' %}\n" + body
        )

    @cached_property
    def _plain(self) -> _Style:
        return self._style_of({})

    def _text(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        style = self._style(variables)
        system, rest = _opening_block(messages, tools)
        last = last_user(rest)
        return system + _joined(style, _noted(style, rest, last), 0, len(rest), last)

    def _prompt(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        opening = _ON if self._style(variables).thinking else _OFF
        return self._text(messages, tools, variables) + _ANSWER + opening

    def _sequences(
        self, messages: list[dict], tools: list[dict], trained: list[bool], variables: dict
    ) -> list[list[Span]]:
        style = self._style(variables)
        system, rest = _opening_block(messages, tools)
        trained = trained[len(messages) - len(rest) :]
        if not style.note and not self.train_generation_prompt and (spans := _in_brief(system, rest, trained)):
            return [spans]
        rest = [style.as_given(message) for message in rest]
        last = last_user(rest)
        if (thinks(rest) and not style.keep) or style.note or _forgets(style, rest, last):
            return self._per_turn(style, system, rest, trained)
        return [self._append([("system", system)], style, rest, 0, len(rest), last, trained)]

    def _per_turn(self, style: _Style, system: str, rest: list[dict], trained: list[bool]) -> list[list[Span]]:
        """One sequence per turn with an answer, cut after it; what came before is context."""
        found, past, done = [], "", 0
        for start, end in answered_turns(rest):
            past += _joined(style, rest, done, start, start)
            done = start
            if rest[start]["role"] == "user":
                question = _block(_noted(style, rest, start), start)
                spans = [("system", system), ("user", past + question)]
                found.append(self._append(spans, style, rest, start + 1, end, start, trained))
            else:  # answers before the first user message
                found.append(self._append([("system", system)], style, rest, start, end, start, trained))
        return found or [[("system", system), ("user", _joined(style, rest, 0, len(rest), last_user(rest)))]]

    def _append(
        self, spans: list[Span], style: _Style, rest: list[dict], start: int, end: int, last: int, trained: list[bool]
    ) -> list[Span]:
        """Append the spans of messages start..end of `rest`, and return all.

        The opening of an answer belongs to the context before it, and consecutive tool results are one span.
        """
        for i in range(start, end):
            role = rest[i]["role"]
            before, text = spans[-1]
            if role == "assistant":
                answer = style.answer(rest[i], i < last)
                opening = _OFF if answer.startswith(_OFF) else _ON if answer.startswith(_ON) else ""
                role = "assistant" if trained[i] else "history"
                if self.train_generation_prompt:
                    spans.append((role, _ANSWER + opening))
                elif before in ("assistant", "history"):
                    spans.append(("prompt", _ANSWER + opening))
                else:
                    spans[-1] = (before, text + _ANSWER + opening)
                spans.append((role, answer[len(opening) :] + _END))
            elif role == before == "tool":
                spans[-1] = (before, text + _block(rest, i))
            else:
                spans.append((role, _block(rest, i)))
        return spans

    def _style(self, variables: dict) -> _Style:
        return self._style_of(variables) if variables else self._plain

    def _style_of(self, variables: dict) -> _Style:
        """What the variables say. Raises ChatError for one that this template does not have."""
        keep, note, thinking = self.history == "keep", "", True
        for name, value in variables.items():
            if name in ("enable_thinking", "truncate_history_thinking") and not isinstance(value, bool):
                raise ChatError("bad chat_template_kwargs", f"{name} is {value!r}, not true or false")
            if name == "enable_thinking":
                thinking = value
            elif name == "truncate_history_thinking":
                keep = not value
            elif value:
                note = "\n\n" + self._note(name, value)
        return _Style(keep, note, thinking, self._gap, self._trims)

    def _note(self, name: str, value: Any) -> str:
        """What an effort writes behind the last question. Raises ChatError for one that the template does not have."""
        for effort, (variable, note) in self._notes.items():
            if (name, value) in (("reasoning_effort", effort), (variable, True)):
                return note
        if self._budgets and name in ("reasoning_effort", "reasoning_budget") and type(value) is int:
            return f"{{thinking token budget: {value}}}"
        raise ChatError("bad chat_template_kwargs", f"{self.name} has no {name}={value!r}")


class Super3(Nano3):
    """Nemotron 3 Super: Nano's text, and a low effort."""

    _notes: ClassVar[dict] = {"low": ("low_effort", "{reasoning effort: low}")}
    _jinja_note = "'{reasoning effort: low}' if low_effort is defined and low_effort"
    _budgets = False


class Lightning35(Nano3):
    """Nemotron 3.5 Lightning and Nemotron 3 Ultra."""

    _gap, _trims = "", False
    _notes: ClassVar[dict] = {"medium": ("medium_effort", "{reasoning effort: efficient}")}
    _jinja_note = "'{reasoning effort: efficient}' if medium_effort is defined and medium_effort"
    _budgets = False


class Lightning35HF(Lightning35):
    """Nemotron 3.5 Lightning as published beside its weights: without an effort."""

    _notes: ClassVar[dict] = {}
    _jinja_note = "none"


def _in_brief(system: str, rest: list[dict], trained: list[bool]) -> list[Span] | None:
    """The spans of a conversation, None if it has reasoning, tool calls, tools or think tags: most have none.

    The same as Nano3._append gives, in less time.
    """
    found, role, text = [], "system", system
    for message, train in zip(rest, trained, strict=True):
        speaker, content = message["role"], message["content"]
        if speaker == "assistant":
            if len(message) > 2 or "think>" in content:
                return None
            if role in ("assistant", "history"):
                found.append((role, text))
                role, text = "prompt", ""
            found.append((role, text + _ANSWER + _OFF))
            role, text = "assistant" if train else "history", content.rstrip() + _END
        elif speaker == "tool":
            return None
        else:
            found.append((role, text))
            role, text = speaker, f"<|im_start|>{speaker}\n{content}{_END}"
    found.append((role, text))
    return found


def _forgets(style: _Style, rest: list[dict], last: int) -> bool:
    """Whether an answer is written differently once the conversation has gone on to another question."""
    return any(
        style.answer(message, True) != style.answer(message, False)
        for message in rest[: max(last, 0)]
        if message["role"] == "assistant" and ("tool_calls" in message or "think>" in message["content"])
    )


def _noted(style: _Style, rest: list[dict], last: int) -> list[dict]:
    """The messages, with the note behind the question `last`."""
    if not style.note or last < 0:
        return rest
    return [*rest[:last], {**rest[last], "content": rest[last]["content"] + style.note}, *rest[last + 1 :]]


def _joined(style: _Style, rest: list[dict], start: int, end: int, last: int) -> str:
    """The text of messages start..end of `rest`; `last` is the question whose answers keep their reasoning."""
    return "".join(
        _ANSWER + style.answer(rest[i], i < last) + _END if rest[i]["role"] == "assistant" else _block(rest, i)
        for i in range(start, end)
    )


def _opening_block(messages: list[dict], tools: list[dict]) -> tuple[str, list[dict]]:
    """The system block, which is there even when it is empty, and the messages after it."""
    system, rest = "", messages
    if messages[0]["role"] == "system":
        system, rest = messages[0]["content"], messages[1:]
    listing = _tool_listing(tools) if tools else ""
    gap = "\n\n" if system and listing else ""
    return f"<|im_start|>system\n{system}{gap}{listing}{_END}", rest


def _block(rest: list[dict], i: int) -> str:
    """The text of message i, which is not an answer. A run of tool results shares one user block."""
    role, content = rest[i]["role"], rest[i]["content"]
    if role != "tool":
        return f"<|im_start|>{role}\n{content}{_END}"
    opens = i > 0 and rest[i - 1]["role"] != "tool"
    closes = i + 1 == len(rest) or rest[i + 1]["role"] != "tool"
    head, tail = "<|im_start|>user\n" if opens else "", _END if closes else ""
    return f"{head}<tool_response>\n{content}\n</tool_response>\n{tail}"


def _call(call: dict) -> str:
    function = call.get("function", call)
    parameters = "".join(
        f"<parameter={name}>\n{_value(value)}\n</parameter>\n" for name, value in function["arguments"].items()
    )
    return f"<tool_call>\n<function={function['name']}>\n{parameters}</function>\n</tool_call>\n"


def _value(value: Any) -> str:
    """Containers as JSON, everything else as Python prints it (True, None)."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def _tool_listing(tools: list[dict]) -> str:
    """The functions offered to the model, and how to call them."""
    parts = ["# Tools\n\nYou have access to the following functions:\n\n<tools>"]
    for tool in tools:
        tool = tool.get("function", tool)
        parts.append(f"\n<function>\n<name>{tool.get('name', '')}</name>")
        parts.append(_description(tool))
        parts.append("\n<parameters>")
        schema = tool.get("parameters")
        schema = schema if isinstance(schema, dict) else {}
        properties = schema.get("properties")
        for name, spec in properties.items() if isinstance(properties, dict) else ():
            parts.append(f"\n<parameter>\n<name>{name}</name>")
            if isinstance(spec, dict):
                if "type" in spec:
                    parts.append(f"\n<type>{spec['type']}</type>")
                parts.append(_description(spec))
                if "enum" in spec:
                    parts.append(f"\n<enum>{json.dumps(spec['enum'], ensure_ascii=False)}</enum>")
                parts.append(_other_keys(spec, ("name", "type", "description", "enum")))
            parts.append("\n</parameter>")
        parts.append(_other_keys(schema, ("type", "properties", "required")))
        if "required" in schema:
            parts.append(f"\n<required>{json.dumps(schema['required'], ensure_ascii=False)}</required>")
        parts.append("\n</parameters>")
        parts.append(_other_keys(tool, ("type", "name", "description", "parameters")))
        parts.append("\n</function>")
    return "".join(parts) + "\n</tools>" + _TOOL_RULES


def _description(spec: dict) -> str:
    return f"\n<description>{str(spec['description']).strip()}</description>" if "description" in spec else ""


def _other_keys(spec: dict, written: tuple[str, ...]) -> str:
    return "".join(f"\n<{key}>{_value(value)}</{key}>" for key, value in spec.items() if key not in written)
