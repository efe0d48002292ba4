"""What every chat template offers: text, spans by role, and the prompt for an answer."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from nemotron_sft.data.chat.flags import trained_messages
from nemotron_sft.data.chat.marks import SPECIAL, Marks, find_marks
from nemotron_sft.data.chat.messages import (
    ChatError,
    check_named,
    checked_tools,
    clean_messages,
    is_empty,
    reasons_twice,
)

Span = tuple[str, str]  # (role, text)
Messages = list[dict]
Tools = list[dict] | None
Flags = list[bool] | None  # per message
Kwargs = dict[str, Any] | None
MASKS = ("assistant", "last_turn", "all")
HISTORIES = ("truncate", "keep")
EMPTY_ANSWERS = ("drop", "train")
_LAST = frozenset("> \n")  # what a text ends with whose end may be a mark


@dataclass(frozen=True)
class Template:
    """A chat template with its training options. Plain data: pickles to worker processes.

    mask: which answers are trained, "assistant" (all of them), "last_turn", or "all" (every token there is).
    history: "truncate" drops the reasoning of earlier turns, "keep" leaves it (where the template can).
    train_generation_prompt: also train the tokens that open an answer.
    empty_answers: whether an answer without text or tool calls makes a conversation unusable ("drop").
    thinking: whether reasoning is asked for; None leaves that to the template.
    kwargs: further variables for the template, as a record's own chat_template_kwargs, which go before them.
    special_tokens: {"bos_token": "<s>", ...}, what a Jinja file may print of the tokenizer's own tokens.
    reasoning_field: the name under which a Jinja file reads an answer's reasoning; None: as the data has it.
    """

    name: str
    source: str = field(repr=False)
    mask: str = "assistant"
    history: str = "truncate"
    train_generation_prompt: bool = False
    empty_answers: str = "drop"
    thinking: bool | None = None
    kwargs: dict[str, Any] | None = None
    special_tokens: dict[str, str] | None = None
    reasoning_field: str | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the template's source and of every option that changes the training sequences."""
        options = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "name"}
        if not self._thinking_shows:
            del options["thinking"]
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()

    @classmethod
    def jinja(cls) -> str:
        """A built-in template as Jinja, for whatever serves the model."""
        raise NotImplementedError

    _skips = True  # whether it may leave a message out
    _thinking_shows = True  # whether `thinking` changes the text of a finished conversation

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def render(self, messages: Messages, tools: Tools = None, chat_template_kwargs: Kwargs = None) -> str:
        """The text of the whole conversation. Raises ChatError."""
        return self._text(*self._read(messages, tools), self._variables(chat_template_kwargs))

    def generation_prompt(
        self,
        messages: Messages,
        tools: Tools = None,
        thinking: bool | None = None,
        effort: str | int | None = None,
        chat_template_kwargs: Kwargs = None,
    ) -> str:
        """What the model is given to answer `messages`, up to the opening of an answer. Raises ChatError.

        effort: how much it may reason, in the template's own words ("low", ...) or as a number of tokens.
        """
        given = {"enable_thinking": thinking, "reasoning_effort": effort}
        given = {key: value for key, value in given.items() if value is not None}
        variables = self._variables({**(chat_template_kwargs or {}), **given})
        return self._prompt(*self._read(messages, tools), variables)

    def sequences(
        self, messages: Messages, tools: Tools = None, *, train_turns: Flags = None, chat_template_kwargs: Kwargs = None
    ) -> list[list[Span]]:
        """The sequences of a conversation. One without any trained answer is a single untrained sequence.

        train_turns: per message, whether it may be trained, beside what the messages say themselves (flags.py).
        chat_template_kwargs: for this conversation's template. Raises ChatError.
        """
        messages, tools = self._read(messages, tools)
        trained = self._trained(messages, train_turns)
        return self._found(messages, tools, trained, chat_template_kwargs)

    def training_sequences(
        self, messages: Messages, tools: Tools = None, *, train_turns: Flags = None, chat_template_kwargs: Kwargs = None
    ) -> list[list[Span]]:
        """The sequences with text to train on, at least one. Raises ChatError, also when there is none.

        Arguments: see `sequences`; `chat.per_record(record)` gives the last two.
        """
        messages, tools = self._read(messages, tools)
        trained = self._trained(messages, train_turns)
        if tools:
            check_named(tools)
        drop = self.empty_answers == "drop"
        for index, message in enumerate(messages):
            if trained[index] and ((drop and is_empty(message)) or len(message) > 2):
                self._check_answer(index, message)
        found = self._found(messages, tools, trained, chat_template_kwargs)
        if not _has_training(found[-1]):
            if any(message["role"] == "assistant" for message in messages):
                raise ChatError("no trained answer", "the record says of every answer that it is not trained")
            raise ChatError("no assistant turn")
        if self._skips:
            last = max((index for index, value in enumerate(trained) if value), default=0)
            self._check_context(messages[:last], found)
        return found

    def _check_answer(self, index: int, message: dict) -> None:
        """Raise ChatError for an answer to train that is empty, reasons in two ways, or calls what has no name."""
        if self.empty_answers == "drop" and is_empty(message):
            hint = "template.empty_answers=train trains such answers"
            raise ChatError("empty answer", f"message {index} has neither an answer nor a tool call; {hint}")
        if reasons_twice(message):
            raise ChatError("bad reasoning", f"message {index} has one in its content and another in its field")
        if any(not call.get("function", call)["name"] for call in message.get("tool_calls", ())):
            raise ChatError("bad tool call", f"message {index}: a tool call without a function name")

    def _check_context(self, messages: list[dict], sequences: list[list[Span]]) -> None:
        """Raise ChatError if the template leaves out one of `messages`, those before the last trained answer."""

    @cached_property
    def _marks(self) -> Marks:
        return find_marks(self.render)

    def unmarked(self, messages: list) -> tuple[list, set[str]]:
        """Messages without the marks that this template writes itself (marks.py), and which those were."""
        found: set[str] = set()
        for index, message in enumerate(messages):
            content = message.get("content") if type(message) is dict else None
            if type(content) is str and content[-1:] in _LAST:
                content, mark = self._marks.bare(str(message.get("role")), content)
                if mark:
                    messages = [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]
                    found.add(mark)
        return messages, found

    def written_tokens(self) -> list[str]:
        """The special tokens that this template writes into a plain conversation, as far as their looks tell."""
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        system = {"role": "system", "content": "s"}
        for chat in ([system, question, answer, question], [question, answer, question], [question]):
            with suppress(ChatError):
                text = self.generation_prompt(chat) + self.render([*chat, answer])
                own = [token for token in (self.special_tokens or {}).values() if token and token in text]
                return sorted({*SPECIAL.findall(text), *own})
        return []

    def _found(self, messages: list[dict], tools: list[dict], trained: list[bool], kwargs: Any) -> list[list[Span]]:
        """The sequences that train something, or one that does not; see `sequences`."""
        found = self._sequences(messages, tools, trained, self._variables(kwargs))
        found = [spans for spans in found if _has_training(spans)] or found[-1:]
        if self.mask == "all":
            found = [[("assistant", text) for _, text in spans] for spans in found]
        return found

    def _trained(self, messages: Messages, train_turns: Flags) -> list[bool]:
        """Per message, whether it is an answer to train: what the record says, within what `mask` says."""
        trained = trained_messages(messages, train_turns)
        if self.mask == "all" and trained != [message["role"] == "assistant" for message in messages]:
            raise ChatError("bad training flag", "mask=all trains every token, but an answer is marked as untrained")
        if self.mask == "last_turn" and (turns := answered_turns(messages)):
            start = turns[-1][0]
            trained = [value and index >= start for index, value in enumerate(trained)]
        return trained

    def _variables(self, kwargs: dict | None) -> dict:
        """The template's variables of one conversation: the template's own options, then the record's."""
        if kwargs is not None and not isinstance(kwargs, dict):
            raise ChatError("bad chat_template_kwargs", f"a {type(kwargs).__name__} instead of an object")
        if not kwargs and not self.kwargs and self.thinking is None:
            return {}
        asked = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return {**asked, **(self.kwargs or {}), **(kwargs or {})}

    def _read(self, messages: Messages, tools: Tools) -> tuple[list[dict], list[dict]]:
        """Messages and tools, checked and in the form that the template takes."""
        return clean_messages(messages), checked_tools(tools)

    def _text(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        raise NotImplementedError

    def _prompt(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        raise NotImplementedError

    def _sequences(
        self, messages: list[dict], tools: list[dict], trained: list[bool], variables: dict
    ) -> list[list[Span]]:
        raise NotImplementedError


def _has_training(spans: list[Span]) -> bool:
    return any(role == "assistant" and text for role, text in spans)


def last_user(messages: list[dict]) -> int:
    """Index of the last user message, -1 without one."""
    return next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "user"), -1)


def answered_turns(messages: list[dict]) -> list[tuple[int, int]]:
    """(start, end) of every turn with an answer: from a user message to the next, and before the first."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" or i == 0]
    turns = pairwise([*starts, len(messages)])
    return [(a, b) for a, b in turns if any(message["role"] == "assistant" for message in messages[a:b])]
