"""Chat messages to text: what a model reads, and which part of it is trained.

    template = load_template("nano3")
    template.render(messages, tools)             the whole conversation
    template.sequences(messages, tools)          training sequences, each a list of (role, text) spans
    template.generation_prompt(messages, tools)  what the model is given to answer these messages

The texts of a sequence's spans concatenate to its text. Spans of role "assistant" are trained and nothing
else is, so a mask policy is a matter of roles alone: with `mask="last_turn"` earlier answers carry the role
"history", with `mask="all"` every span carries the role "assistant". A trained span begins where the
generation prompt ends and includes the turn's terminator: what the model has to produce at inference.

A template that drops earlier reasoning shows every turn a different past. A conversation with reasoning then
gives one sequence per user turn, cut after that turn's answer and trained on that answer alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemotron_sft.errors import UserError

Span = tuple[str, str]  # (role, text)

ROLES = ("user", "assistant", "system", "tool", "developer")
MASKS = ("assistant", "last_turn", "all")
HISTORIES = ("truncate", "keep")


class ChatError(ValueError):
    """A conversation that cannot be rendered; `reason` is a short fixed phrase to count drops by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return ChatError, (self.reason, self.detail)


# --- checking the input ------------------------------------------------------------------------------------


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


def _checked_tools(tools: Any) -> list[dict]:
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ChatError("bad tools", "tools is not a list of objects")
    return tools


def _thinks(messages: list[dict]) -> bool:
    """Whether an answer carries reasoning, in its own field or written into the content."""
    for message in messages:
        if message.get("reasoning_content"):
            return True
        content = message["content"]
        if message["role"] == "assistant" and "</think>" in content and _inline_thinking.search(content):
            return True
    return False


_inline_thinking = re.compile(r"<think>(?!</think>).*</think>", re.DOTALL)


# --- templates ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A chat template with its training options. Plain data: pickles to worker processes.

    mask: which answers are trained, "assistant" (all of them), "last_turn", or "all" (every token there is).
    history: "truncate" drops the reasoning of earlier turns, "keep" leaves it (where the template can).
    train_generation_prompt: also train the tokens that open an answer.
    thinking: whether `generation_prompt` asks for reasoning.
    special_tokens: {"bos_token": "<s>", ...}, what a Jinja file may print of the tokenizer's own tokens.
    """

    name: str
    source: str = field(repr=False)
    mask: str = "assistant"
    history: str = "truncate"
    train_generation_prompt: bool = False
    thinking: bool = True
    special_tokens: dict[str, str] | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the template's source and of every option that changes the training sequences."""
        options = [self.mask, self.history, self.train_generation_prompt, self.special_tokens]
        return hashlib.sha256(json.dumps([self.source, options], sort_keys=True).encode()).hexdigest()

    def __getstate__(self):
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """The text of the whole conversation. Raises ChatError."""
        return self._text(clean_messages(messages), _checked_tools(tools))

    def generation_prompt(
        self, messages: list[dict], tools: list[dict] | None = None, thinking: bool | None = None
    ) -> str:
        """What the model is given to answer `messages`, up to the opening of an answer. Raises ChatError."""
        thinking = self.thinking if thinking is None else thinking
        return self._prompt(clean_messages(messages), _checked_tools(tools), thinking)

    def sequences(self, messages: list[dict], tools: list[dict] | None = None) -> list[list[Span]]:
        """The sequences of a conversation. One without any answer is a single untrained sequence.

        Raises ChatError.
        """
        found = self._sequences(clean_messages(messages), _checked_tools(tools))
        if self.mask == "last_turn":
            found = found[-1:]
        elif self.mask == "all":
            found = [[("assistant", text) for _, text in spans] for spans in found]
        return found

    def training_sequences(self, messages: list[dict], tools: list[dict] | None = None) -> list[list[Span]]:
        """The sequences with text to train on, at least one. Raises ChatError, also when there is none."""
        found = [s for s in self.sequences(messages, tools) if any(r == "assistant" and t for r, t in s)]
        if not found:
            raise ChatError("no assistant turn")
        return found

    def _text(self, messages: list[dict], tools: list[dict]) -> str:
        raise NotImplementedError

    def _prompt(self, messages: list[dict], tools: list[dict], thinking: bool) -> str:
        raise NotImplementedError

    def _sequences(self, messages: list[dict], tools: list[dict]) -> list[list[Span]]:
        raise NotImplementedError


def _last_user(messages: list[dict]) -> int:
    """Index of the last user message, -1 without one."""
    return next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "user"), -1)


def _turns(messages: list[dict]) -> list[tuple[int, int]]:
    """(start, end) of every turn with an answer: from a user message to the next, and before the first."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" or i == 0]
    turns = pairwise([*starts, len(messages)])
    return [(a, b) for a, b in turns if any(message["role"] == "assistant" for message in messages[a:b])]


# --- Nemotron 3 Nano ---------------------------------------------------------------------------------------
# The same text as templates/nano3.jinja, written out in Python: rendering runs once for every record of a
# blend, and this takes a twelfth of the time. The tests hold the two together.

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
        return system + self._joined(rest, 0, len(rest), _last_user(rest))

    def _prompt(self, messages: list[dict], tools: list[dict], thinking: bool) -> str:
        return self._text(messages, tools) + _ANSWER + _OPENINGS[thinking]

    def _sequences(self, messages: list[dict], tools: list[dict]) -> list[list[Span]]:
        system, rest = _opening_block(messages, tools)
        if self.history == "keep" or not _thinks(messages):
            turns = _turns(rest) if self.mask == "last_turn" else []
            first_trained = turns[-1][0] if turns else 0
            spans = [("system", system)]
            self._append(spans, rest, 0, len(rest), _last_user(rest), first_trained)
            return [spans]
        found, past, done = [], "", 0
        for start, end in _turns(rest):
            past += self._joined(rest, done, start, start)
            done = start
            if rest[start]["role"] == "user":
                spans = [("system", system), ("user", past + _block(rest, start))]
                self._append(spans, rest, start + 1, end, start, start)
            else:  # answers before the first user message
                spans = [("system", system)]
                self._append(spans, rest, start, end, start, start)
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
        self, spans: list[Span], rest: list[dict], start: int, end: int, last_user: int, first_trained: int
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
                role = "assistant" if i >= first_trained else "history"
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


# --- any other template ------------------------------------------------------------------------------------

# `{% generation %}` blocks become plain Jinja that prints these around the trained text; random, so that no
# conversation can contain them.
_OPEN, _CLOSE = (f"\x02{secrets.token_hex(8)}\x03" for _ in range(2))
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def _marker(tag: re.Match) -> str:
    left, end, right = tag.groups()
    if end:
        return f"{{%{left} if true %}}{_CLOSE}{{% endif %}}{{% endwith {right}%}}"
    return f"{{%{left} with %}}{{% if true %}}{_OPEN}{{% endif {right}%}}"


class JinjaTemplate(Template):
    """A user's Jinja template, rendered in the environment that transformers gives to chat templates.

    With `{% generation %}` tags (transformers' convention) a sequence is rendered once and the tags enclose
    what is trained. Without them the answers are found by rendering prefixes of the conversation, as far as
    a prefix of the messages gives a prefix of the text; ChatError "spans undetermined" otherwise. Spans that
    are not trained carry the role "context" or "history".
    """

    @cached_property
    def _marked(self) -> bool:
        return bool(_TAG.search(self.source))

    @cached_property
    def _compiled(self):
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.meta import find_undeclared_variables
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            source = _TAG.sub(_marker, self.source)
            unknown = find_undeclared_variables(environment.parse(source))
            compiled = environment.from_string(source)
        except TemplateSyntaxError as error:
            message = error.message.replace("endwith", "endgeneration")
            raise UserError(f"{self.name}:{error.lineno}: not a valid Jinja template: {message}") from None
        if self.special_tokens is None and (needed := sorted(unknown & {"bos_token", "eos_token"})):
            raise UserError(f"{self.name}: the template prints {' and '.join(needed)}: set template.special_tokens")
        return compiled

    def _marked_text(self, messages: list[dict], tools: list[dict], prompt: bool = False, thinking: bool = True):
        """The rendering, with _OPEN and _CLOSE around what generation tags enclose."""
        options = {"enable_thinking": thinking, "truncate_history_thinking": self.history == "truncate"}
        try:
            return self._compiled.render(
                **(self.special_tokens or {}),
                **options,
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                chat_template_kwargs=options,
            )
        except UserError:
            raise
        except Exception as error:  # whatever the template's own expressions raise on this conversation
            raise ChatError("template error", f"{type(error).__name__}: {error}") from error

    def _text(self, messages: list[dict], tools: list[dict]) -> str:
        return self._marked_text(messages, tools).replace(_OPEN, "").replace(_CLOSE, "")

    def _prompt(self, messages: list[dict], tools: list[dict], thinking: bool) -> str:
        text = self._marked_text(messages, tools, prompt=True, thinking=thinking)
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def _sequences(self, messages: list[dict], tools: list[dict]) -> list[list[Span]]:
        turns = _turns(messages)
        if not turns:
            return [[("context", self._text(messages, tools))]]
        if self._rewrites_history(messages, tools, turns):
            return [self._spans(messages[:end], tools, start) for start, end in turns]
        return [self._spans(messages, tools, turns[-1][0] if self.mask == "last_turn" else 0)]

    def _rewrites_history(self, messages: list[dict], tools: list[dict], turns: list[tuple[int, int]]) -> bool:
        """Whether some turn's text changes once the conversation goes on."""
        ends = [end for _, end in turns if end < len(messages)]
        if not ends or (self._marked and not _thinks(messages)):
            return False
        text = self._text(messages, tools)
        return not all(text.startswith(self._text(messages[:end], tools)) for end in ends)

    def _spans(self, messages: list[dict], tools: list[dict], first_trained: int) -> list[Span]:
        find = self._spans_by_markers if self._marked else self._spans_by_prefixes
        return [span for span in find(messages, tools, first_trained) if span[1]]

    def _spans_by_markers(self, messages: list[dict], tools: list[dict], first_trained: int) -> list[Span]:
        text, *generated = self._marked_text(messages, tools).split(_OPEN)
        answers = [message["role"] == "assistant" for message in messages]
        if first_trained and len(generated) != sum(answers):
            raise ChatError("spans undetermined", f"{sum(answers)} answers, {len(generated)} generation blocks")
        spans, earlier = [("context", text)], sum(answers[:first_trained])
        for index, part in enumerate(generated):
            answer, _, after = part.partition(_CLOSE)
            spans += [("history" if index < earlier else "assistant", answer), ("context", after)]
        return spans

    def _spans_by_prefixes(self, messages: list[dict], tools: list[dict], first_trained: int) -> list[Span]:
        text, done, spans = self._text(messages, tools), 0, []
        for i in range(first_trained, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            prompts = [self._prompt(messages[:i], tools, thinking) for thinking in (True, False)]
            start = max((len(prompt) for prompt in prompts if text.startswith(prompt)), default=-1)
            upto = self._text(messages[: i + 1], tools)
            if start < done or len(upto) <= start or not text.startswith(upto):
                raise ChatError(
                    "spans undetermined",
                    f"{self.name} renders the messages before answer {i} differently from the conversation; "
                    "mark the answers in the template with {% generation %} ... {% endgeneration %}",
                )
            if self.train_generation_prompt:
                start = len(self._text(messages[:i], tools))
            spans += [("context", text[done:start]), ("assistant", text[start : len(upto)])]
            done = len(upto)
        return [*spans, ("context", text[done:])]


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def load_template(name: str = "nano3", **options: Any) -> Template:
    """A built-in template ("nano3") or the path of a Jinja file; `options` are the fields of Template.

    Raises UserError for a name or option that does not exist and for a file that is not valid Jinja.
    """
    known = {field.name for field in fields(Template)} - {"name", "source"}
    for option in options.keys() - known:
        from nemotron_sft.config import unknown_key

        raise unknown_key(f"template.{option}", sorted(known | {"name"}))
    for option, choices in (("mask", MASKS), ("history", HISTORIES)):
        if options.get(option, choices[0]) not in choices:
            raise UserError(f"template.{option}={options[option]}: choose from {', '.join(choices)}")
    if name == "nano3":
        source = resources.files("nemotron_sft").joinpath("templates/nano3.jinja").read_text()
        return Nano3(name, source, **options)
    try:
        source = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"template.name={name}: neither nano3 nor a readable Jinja file") from None
    template = JinjaTemplate(str(name), source, **options)
    if template._marked and template.train_generation_prompt:
        raise UserError(
            f"{name}: its generation tags decide what is trained: enclose the opening of an answer in them "
            "instead of setting train_generation_prompt"
        )
    template._compiled  # noqa: B018 -- report a broken file now
    return template
