"""Any Jinja chat template, with generation tags or without."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nemotron_sft.data.chat.environment import CLOSE, OPEN, TAG, compile_template, unmarked
from nemotron_sft.data.chat.forms import Forms
from nemotron_sft.data.chat.messages import (
    ChatError,
    answer_of,
    checked_messages,
    checked_tools,
    plain_content,
    reasoning_of,
)
from nemotron_sft.data.chat.template import Span, Template
from nemotron_sft.errors import UserError

_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that turns reasoning on
_QUESTION, _ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
_STOP = re.compile(r"\s*(?:<[^<>\s]{1,60}>|\[[A-Z_/]{1,30}\])")  # a special token, as far as its looks tell


@dataclass
class _Sequence:
    """A training sequence to be: its text, how many messages it holds, and where each trained answer ends."""

    text: str
    messages: int
    ends: dict[int, int]  # {index of the answer: length of the text up to its end}
    past: tuple[str, int] = ("", 0)  # what stands for the first characters of the messages' rendering, and how many


class _Rewritten(Exception):
    """An answer that changes how the messages before it are written: its index, and a sequence of its own."""


class JinjaTemplate(Template):
    """A user's Jinja template, rendered in the environment that transformers gives to chat templates.

    Every trained answer stands in the context that the model would see: where the conversation up to it is
    written differently once it goes on (whatever the cause), that answer has a sequence of its own, cut after it.
    With `{% generation %}` tags (transformers' convention) the tags say what of an answer is trained. Without
    them an answer begins where the generation prompt for the messages before it ends. Spans that are not trained
    carry the role "context" or "history".

    Raises ChatError "spans undetermined" where an answer does not continue a prompt, and "... not rendered" where
    the template leaves out the reasoning, the tool calls or the text of an answer to train.
    """

    @cached_property
    def _marked(self) -> bool:
        return bool(TAG.search(self.source))

    @property
    def _compiled(self) -> Any:
        return self._opened[0]

    @property
    def _switches(self) -> list[str]:
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Any, list[str]]:
        """The compiled template, and those of _SWITCHES that it reads."""
        compiled, unknown = compile_template(self.name, self.source)
        if self.special_tokens is None and (needed := sorted(unknown & {"bos_token", "eos_token"})):
            raise UserError(f"{self.name}: the template prints {' and '.join(needed)}: set template.special_tokens")
        return compiled, [name for name in _SWITCHES if name in unknown]

    @cached_property
    def _forms(self) -> Forms:
        return Forms(lambda messages, tools: self._text(messages, tools, {}))

    def _read(self, messages: list[dict], tools: list[dict] | None) -> tuple[list[dict], list[dict]]:
        return self._forms.adapt(checked_messages(messages), checked_tools(tools), self.reasoning_field)

    # --- text ---

    def _rendered(self, messages: list[dict], tools: list[dict], variables: dict, prompt: bool = False) -> str:
        """The rendering, with OPEN and CLOSE around what generation tags enclose."""
        if self.history == "keep":
            variables = {"truncate_history_thinking": False, **variables}
        if variables:
            if "enable_thinking" in variables and "thinking" in self._switches:
                variables = {"thinking": variables["enable_thinking"], **variables}
            variables = {"chat_template_kwargs": variables, **variables}
        try:
            return self._compiled.render(
                **{
                    **(self.special_tokens or {}),
                    **variables,
                    "messages": messages,
                    "tools": tools or None,
                    "documents": None,
                    "add_generation_prompt": prompt,
                }
            )
        except UserError:
            raise
        except Exception as error:  # whatever the template's own expressions raise on this conversation
            raise ChatError("template error", f"{type(error).__name__}: {error}") from error

    def _text(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        return unmarked(self._rendered(messages, tools, variables))

    def _prompt(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        return unmarked(self._rendered(messages, tools, variables, prompt=True))

    # --- sequences ---

    def _sequences(
        self, messages: list[dict], tools: list[dict], trained: list[bool], variables: dict
    ) -> list[list[Span]]:
        self._compiled  # noqa: B018 -- finds the template's switches
        answers = [i for i, value in enumerate(trained) if value]
        if not answers:
            return [[("context", self._text(messages, tools, variables))]]
        cut = self._cut(messages, tools, answers, variables)
        return [spans for sequence in cut for spans in self._spans(sequence, messages, tools, variables)]

    def _spans(self, sequence: _Sequence, messages: list[dict], tools: list[dict], variables: dict) -> list[list[Span]]:
        """The spans of a sequence, and of those that leave it: answers that change how their own past is written."""
        find = self._spans_by_tags if self._marked else self._spans_by_prompts
        left: list[list[Span]] = []
        while sequence.ends:
            try:
                spans = find(sequence, messages, tools, variables)
                return [*left, [span for span in spans if span[1]]]
            except _Rewritten as answer:
                i, own = answer.args
                del sequence.ends[i]
                left += self._spans(own, messages, tools, variables)
        return left

    def _cut(self, messages: list[dict], tools: list[dict], answers: list[int], variables: dict) -> list[_Sequence]:
        """The sequences in which every answer sees the past that it would see at inference, as few as there can be."""
        whole = self._text(messages, tools, variables)
        found: list[_Sequence] = []
        for i in reversed(answers):
            upto = whole if i + 1 == len(messages) else self._upto(i, whole, messages, tools, variables)
            fitting = next((sequence for sequence in reversed(found) if sequence.text.startswith(upto)), None)
            if fitting is None:
                last = not found and whole.startswith(upto)
                fitting = _Sequence(whole, len(messages), {}) if last else _Sequence(upto, i + 1, {})
                found.append(fitting)
            fitting.ends[i] = len(upto)
        return found[::-1]

    def _upto(self, i: int, whole: str, messages: list[dict], tools: list[dict], variables: dict) -> str:
        """The text of the conversation up to the end of answer i.

        A template that insists on a question cannot render an answer before the first one by itself; that ends in
        the whole text where other answers end.
        """
        try:
            return self._text(messages[: i + 1], tools, variables)
        except ChatError:
            if any(message["role"] not in ("system", "developer") for message in messages[:i]):
                raise
            opened = self._text([_QUESTION, {**_ANSWER, "content": "answerq"}], [], variables)
            closing, start = opened.rpartition("answerq")[2], self._start(whole, 0, [], tools, variables)
            end = whole.find(closing, start) if closing.strip() and start is not None else -1
            if end < 0:
                raise
            return whole[: end + len(closing)]

    def _check_past(
        self, i: int, sequence: _Sequence, messages: list[dict], tools: list[dict], variables: dict
    ) -> None:
        """Raise _Rewritten if answer i has, in the sequence, another past than in the prompt that asks for it.

        gpt-oss forgets the reasoning before a tool call once there is a last answer, but not in the prompt for it.
        The answer begins behind the last of `messages`, the same in both.
        """
        past, text = self._past(messages, tools, variables), sequence.text[: sequence.ends[i]]
        if sequence.past[0] or text.startswith(past):
            return
        if any(map(text.startswith, self._prompts(messages, tools, variables))):
            return
        last = past[_common(past, self._past(messages[:-1], tools, variables)) :]
        if last.strip() and (at := text.rfind(last)) >= 0:
            whole = past + text[at + len(last) :]
            raise _Rewritten(i, _Sequence(whole, i + 1, {i: len(whole)}, (past, at + len(last))))

    def _spans_by_tags(
        self, sequence: _Sequence, messages: list[dict], tools: list[dict], variables: dict
    ) -> list[Span]:
        """Spans of a template with generation tags: what they enclose within the sequence's answers is trained."""
        past, replaced = sequence.past
        marked = self._rendered(messages[: sequence.messages], tools, variables)
        parts = (past + _behind(marked, replaced)).split(OPEN)
        regions = []
        for i in sorted(sequence.ends):
            before = self._past(messages[:i], tools, variables)
            start = _common(sequence.text, before)
            if start < len(before):
                self._check_past(i, sequence, messages[:i], tools, variables)
            regions.append((start, sequence.ends[i]))
            self._check_shown(messages[i], i, sequence.text[start : sequence.ends[i]])
        everything = all(m["role"] != "assistant" or i in sequence.ends for i, m in enumerate(messages))
        spans, done = [("context", parts[0])], len(parts[0])
        for part in parts[1:]:
            answer, _, after = part.partition(CLOSE)
            end = done + len(answer)
            inside = [max(a, done) for a, b in regions if max(a, done) < min(b, end)]
            untrained = 0 if everything else min(inside, default=end) - done
            spans += [("history", answer[:untrained]), ("assistant", answer[untrained:]), ("context", after)]
            done = end + len(after)
        return spans

    def _past(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        """The rendering of the messages before an answer, "" where the template has none."""
        try:
            return self._text(messages, tools, variables) if messages else ""
        except ChatError:
            return ""

    def _spans_by_prompts(
        self, sequence: _Sequence, messages: list[dict], tools: list[dict], variables: dict
    ) -> list[Span]:
        """Spans of a template without tags: an answer is what follows the prompt for the messages before it."""
        text, done, spans = sequence.text, 0, []
        for i in sorted(sequence.ends):
            end = sequence.ends[i]
            start = self._start(text[:end], done, messages[:i], tools, variables)
            if start is None:
                self._check_past(i, sequence, messages[:i], tools, variables)
                raise ChatError(
                    "spans undetermined",
                    f"{self.name} renders answer {i} differently from what follows its prompt; mark the answers in "
                    "the template with {% generation %} ... {% endgeneration %}",
                )
            self._check_shown(messages[i], i, text[start:end])
            end, stop = self._stopped(text, end, messages[i])
            if self.train_generation_prompt:
                start = max(done, _common(text, self._past(messages[:i], tools, variables)))
            spans += [("context", text[done:start]), ("assistant", text[start:end] + stop)]
            done = end
        return [*spans, ("context", text[done:])]

    def _start(self, text: str, done: int, messages: list[dict], tools: list[dict], variables: dict) -> int | None:
        """Where the answer that ends `text` begins: behind the longest prompt for the messages before it.

        Where the template cannot render those alone (there are none, or it insists on a question), behind the
        opening that a prompt adds. Where a finished answer lacks a part of the opening (DeepSeek R1's <think>), where
        it departs from the prompt. None if there is no such place.
        """
        if prompts := self._prompts(messages, tools, variables):
            starts = [len(prompt) for prompt in prompts if text.startswith(prompt)]
            start = max((start for start in starts if done <= start < len(text)), default=None)
            return self._departure(text, prompts, messages, tools, variables) if start is None else start
        places = [(at, -len(opening)) for opening in self._openings(variables) if (at := text.find(opening, done)) >= 0]
        if places and (start := min(places)[0] - min(places)[1]) < len(text):
            return start
        return None

    def _departure(
        self, text: str, prompts: list[str], messages: list[dict], tools: list[dict], variables: dict
    ) -> int | None:
        """Where a text departs from its prompt, if that is within what the prompt adds to the messages."""
        before = self._text(messages, tools, variables)
        start = max(_common(text, prompt) for prompt in prompts)
        return start if text.startswith(before) and len(before) < start < len(text) else None

    def _prompts(self, messages: list[dict], tools: list[dict], variables: dict) -> list[str]:
        """The prompts for an answer to these messages; none where the template cannot render them."""
        found = []
        for choice in self._choices(variables) if messages else ():
            with suppress(ChatError):
                found.append(self._prompt(messages, tools, choice))
        return found

    def _choices(self, variables: dict) -> list[dict]:
        """The variables with which the prompt of an answer may have been rendered: reasoning on or off."""
        if any(name in variables for name in _SWITCHES):
            return [variables]
        return [variables, *({**variables, name: value} for name in self._switches for value in (True, False))]

    def _openings(self, variables: dict) -> set[str]:
        """What prompts add to the messages, and what finished answers have of that, earlier ones and the last."""
        found = set()
        for choice in self._choices(variables):
            text, prompt = self._text([_QUESTION], [], choice), self._prompt([_QUESTION], [], choice)
            shared = _common(text, prompt)
            answered = [self._past([_QUESTION, _ANSWER, *more], [], choice) for more in ([], [_QUESTION])]
            found |= {prompt[shared:], *(prompt[shared : _common(prompt, each)] for each in answered)}
        return found - {""}

    # --- stop tokens ---

    def _stopped(self, text: str, end: int, message: dict) -> tuple[int, str]:
        """Where an answer really ends, and what to add to the text there.

        Some templates (GLM's) write no end of turn: a model stops by giving the token of the next role. That
        token is then part of the answer, and is added where nothing follows.
        """
        usual = self._stop_tokens[bool(message.get("tool_calls"))]
        if not usual:
            return end, ""
        if end == len(text):
            return end, usual
        following = _STOP.match(text, end)
        return (following.end() if following else end), ""

    @cached_property
    def _stop_tokens(self) -> tuple[str, str]:
        """The tokens of the next role that end a plain answer and a tool call; "" where an answer ends by itself."""
        answer = {**_ANSWER, "content": "answerq"}
        call = {"id": "call00001", "type": "function", "function": {"name": "toolq", "arguments": {}}}
        result = {"role": "tool", "name": "toolq", "tool_call_id": "call00001", "content": "r"}
        plain = self._stop_token([_QUESTION, answer], _QUESTION)
        if not plain:
            return "", ""
        called = self._stop_token([_QUESTION, {**answer, "content": "", "tool_calls": [call]}], result)
        return plain, called or plain

    def _stop_token(self, messages: list[dict], following: dict) -> str:
        """What special token `following` puts behind the last message, if that ends without one."""
        try:
            text, longer = self._text(messages, [], {}), self._text([*messages, following], [], {})
        except ChatError:
            return ""
        plain = "tool_calls" not in messages[-1]
        if not longer.startswith(text) or (plain and text.rpartition("answerq")[2].strip()):
            return ""
        found = _STOP.match(longer, len(text))
        return found.group() if found else ""

    # --- what a conversation has must be in its text ---

    def _check_context(self, messages: list[dict], sequences: list[list[Span]]) -> None:
        text = "".join(text for spans in sequences for _, text in spans)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" or not (line := _longest_line(message["content"])) or line in text:
                continue
            quoted = (json.dumps(line, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
            if not any(each in text for each in quoted):
                raise ChatError(
                    "message not rendered", f"message {i}, a {message['role']}'s: {self.name} leaves out {line[:40]!r}"
                )

    def _check_shown(self, message: dict, index: int, text: str) -> None:
        """Raise ChatError if a part of a trained answer is not in its text: it would be lost without a word."""
        reasoning = reasoning_of(message, index).strip()
        if reasoning and reasoning not in text:
            name = self._forms.reasoning
            hint = f"it reads {name}: set template.reasoning_field={name}" if name else "it has no place for it"
            raise ChatError("reasoning not rendered", f"message {index}: {self.name} leaves the reasoning out; {hint}")
        for call in message.get("tool_calls", ()):
            name = call.get("function", call)["name"]
            if name not in text:
                raise ChatError("tool call not rendered", f"message {index}: {self.name} leaves out the call of {name}")
        if (answer := answer_of(message)) not in text:
            raise ChatError(
                "answer not rendered", f"message {index}: {self.name} leaves out or changes {answer[:40]!r}"
            )


def _longest_line(content: Any) -> str:
    """The longest line of a message, as a template may trim it."""
    return max((line.strip() for line in plain_content(content).splitlines()), key=len, default="")


def _behind(marked: str, length: int) -> str:
    """What follows the first `length` characters, OPEN and CLOSE not counted."""
    at = 0
    while length:
        for mark in (OPEN, CLOSE):
            if marked.startswith(mark, at):
                at += len(mark)
                break
        else:
            at, length = at + 1, length - 1
    return marked[at:].removeprefix(CLOSE)


def _common(text: str, other: str) -> int:
    """Length of what two texts begin with alike."""
    if text.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
