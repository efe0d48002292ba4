"""Any Jinja chat template, with generation tags or without."""

from __future__ import annotations

import json
import re
import secrets
from functools import cached_property
from typing import Any

from nemotron_sft.data.chat.messages import ChatError, thinks
from nemotron_sft.data.chat.template import Span, Template, answered_turns
from nemotron_sft.errors import UserError

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

    def _sequences(self, messages: list[dict], tools: list[dict], trained: list[bool]) -> list[list[Span]]:
        turns = answered_turns(messages)
        if not turns:
            return [[("context", self._text(messages, tools))]]
        if self._rewrites_history(messages, tools, turns):
            alone = [[value and i >= start for i, value in enumerate(trained[:end])] for start, end in turns]
            return [self._spans(messages[: len(t)], tools, t) for t in alone]
        return [self._spans(messages, tools, trained)]

    def _rewrites_history(self, messages: list[dict], tools: list[dict], turns: list[tuple[int, int]]) -> bool:
        """Whether some turn's text changes once the conversation goes on."""
        ends = [end for _, end in turns if end < len(messages)]
        if not ends or (self._marked and not thinks(messages)):
            return False
        text = self._text(messages, tools)
        return not all(text.startswith(self._text(messages[:end], tools)) for end in ends)

    def _spans(self, messages: list[dict], tools: list[dict], trained: list[bool]) -> list[Span]:
        find = self._spans_by_markers if self._marked else self._spans_by_prefixes
        return [span for span in find(messages, tools, trained) if span[1]]

    def _spans_by_markers(self, messages: list[dict], tools: list[dict], trained: list[bool]) -> list[Span]:
        text, *generated = self._marked_text(messages, tools).split(_OPEN)
        answers = [value for message, value in zip(messages, trained, strict=True) if message["role"] == "assistant"]
        if not all(answers) and len(generated) != len(answers):
            raise ChatError("spans undetermined", f"{len(answers)} answers, {len(generated)} generation blocks")
        spans = [("context", text)]
        for index, part in enumerate(generated):
            answer, _, after = part.partition(_CLOSE)
            kept = all(answers) or answers[index]
            spans += [("assistant" if kept else "history", answer), ("context", after)]
        return spans

    def _spans_by_prefixes(self, messages: list[dict], tools: list[dict], trained: list[bool]) -> list[Span]:
        text, done, spans = self._text(messages, tools), 0, []
        for i in range(len(messages)):
            if not trained[i]:
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
