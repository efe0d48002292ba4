"""NVIDIA's Nemotron 3 Nano template.

The same text as templates/nano3.jinja, written out in Python: rendering runs once for every record of a
blend, and this takes a twelfth of the time. The tests hold the two together.
"""

from __future__ import annotations

import json
from typing import Any

from nemotron_sft.data.chat.messages import thinks
from nemotron_sft.data.chat.template import Span, Template, answered_turns, last_user

_ANSWER = "<|im_start|>assistant\n"
_END = "<|im_end|>\n"
_OPENINGS = ("<think></think>", "<think>\n")  # what a generation prompt puts after _ANSWER: thinking off, on
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


class Nano3(Template):
    """NVIDIA's Nemotron 3 Nano template."""

    def _text(self, messages: list[dict], tools: list[dict]) -> str:
        system, rest = _opening_block(messages, tools)
        return system + self._joined(rest, 0, len(rest), last_user(rest))

    def _prompt(self, messages: list[dict], tools: list[dict], thinking: bool) -> str:
        return self._text(messages, tools) + _ANSWER + _OPENINGS[thinking]

    def _sequences(self, messages: list[dict], tools: list[dict], trained: list[bool]) -> list[list[Span]]:
        system, rest = _opening_block(messages, tools)
        trained = trained[len(messages) - len(rest) :]
        if self.history == "keep" or not thinks(messages):
            spans = [("system", system)]
            self._append(spans, rest, 0, len(rest), last_user(rest), trained)
            return [spans]
        found, past, done = [], "", 0
        for start, end in answered_turns(rest):
            past += self._joined(rest, done, start, start)
            done = start
            if rest[start]["role"] == "user":
                spans = [("system", system), ("user", past + _block(rest, start))]
                self._append(spans, rest, start + 1, end, start, trained)
            else:  # answers before the first user message
                spans = [("system", system)]
                self._append(spans, rest, start, end, start, trained)
            found.append(spans)
        return found

    def _joined(self, rest: list[dict], start: int, end: int, last_user: int) -> str:
        """The text of messages start..end of `rest`."""
        keep = self.history == "keep"
        return "".join(
            _ANSWER + _answer(rest[i], i < last_user and not keep) + _END
            if rest[i]["role"] == "assistant"
            else _block(rest, i)
            for i in range(start, end)
        )

    def _append(
        self, spans: list[Span], rest: list[dict], start: int, end: int, last_user: int, trained: list[bool]
    ) -> None:
        """Append the spans of messages start..end of `rest`.

        The opening of an answer belongs to the context before it, and consecutive tool results are one span.
        """
        keep = self.history == "keep"
        for i in range(start, end):
            role = rest[i]["role"]
            before, text = spans[-1]
            if role == "assistant":
                answer = _answer(rest[i], i < last_user and not keep)
                opening = _opening(answer)
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


def _opening(answer: str) -> str:
    """What of an answer the generation prompt holds already."""
    for opening in _OPENINGS:
        if answer.startswith(opening):
            return opening
    return ""


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


def _answer(message: dict, forget: bool) -> str:
    """The text of an answer between its two ChatML lines; `forget` takes its reasoning out."""
    content, reasoning = message["content"], message.get("reasoning_content")
    if not reasoning and not message.get("tool_calls") and "think>" not in content:  # most are so: the rest in brief
        return f"<think></think>{content}".rstrip()
    if isinstance(reasoning, str) and reasoning.strip():
        content = f"<think>\n{reasoning}\n</think>\n{content}"
    elif "<think>" not in content and "</think>" not in content:
        content = "<think></think>" + content
    if calls := message.get("tool_calls"):
        if forget:
            content = content.rpartition("</think>")[2] if "</think>" in content else content.partition("<think>")[0]
            content = "<think></think>" + content.strip()
        return content.strip() + "\n" + "".join(_call(call) for call in calls)
    if forget and "<think>" in content and "</think>" in content:
        content = "<think></think>" + content.rpartition("</think>")[2]
    return content.strip()


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
