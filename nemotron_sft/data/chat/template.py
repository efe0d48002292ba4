"""What every chat template offers: text, spans by role, and the prompt for an answer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from nemotron_sft.data.chat.flags import trained_messages
from nemotron_sft.data.chat.messages import ChatError, checked_tools, clean_messages

Span = tuple[str, str]  # (role, text)
MASKS = ("assistant", "last_turn", "all")
HISTORIES = ("truncate", "keep")


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

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, chat_template_kwargs: dict | None = None
    ) -> str:
        """The text of the whole conversation. Raises ChatError."""
        return self._text(clean_messages(messages), checked_tools(tools))

    def generation_prompt(
        self, messages: list[dict], tools: list[dict] | None = None, thinking: bool | None = None
    ) -> str:
        """What the model is given to answer `messages`, up to the opening of an answer. Raises ChatError."""
        thinking = self.thinking if thinking is None else thinking
        return self._prompt(clean_messages(messages), checked_tools(tools), thinking)

    def sequences(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        *,
        train_turns: list[bool] | None = None,
        chat_template_kwargs: dict | None = None,
    ) -> list[list[Span]]:
        """The sequences of a conversation. One without any trained answer is a single untrained sequence.

        train_turns: per message, whether it may be trained, beside what the messages say themselves (flags.py).
        chat_template_kwargs: for this conversation's template. Raises ChatError.
        """
        messages, tools = clean_messages(messages), checked_tools(tools)
        trained = self._trained(messages, train_turns)
        found = self._sequences(messages, tools, trained)
        found = [spans for spans in found if _has_training(spans)] or found[-1:]
        if self.mask == "all":
            found = [[("assistant", text) for _, text in spans] for spans in found]
        return found

    def training_sequences(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        *,
        train_turns: list[bool] | None = None,
        chat_template_kwargs: dict | None = None,
    ) -> list[list[Span]]:
        """The sequences with text to train on, at least one. Raises ChatError, also when there is none.

        Arguments: see `sequences`; `chat.per_record(record)` gives the last two.
        """
        found = self.sequences(messages, tools, train_turns=train_turns, chat_template_kwargs=chat_template_kwargs)
        if not _has_training(found[-1]):
            if any(message["role"] == "assistant" for message in messages):
                raise ChatError("no trained answer", "every answer is marked as not to be trained")
            raise ChatError("no assistant turn")
        return found

    def _trained(self, messages: list[dict], train_turns: list[bool] | None) -> list[bool]:
        """Per message, whether it is an answer to train: what the record says, within what `mask` says."""
        trained = trained_messages(messages, train_turns)
        if self.mask == "all" and trained != [message["role"] == "assistant" for message in messages]:
            raise ChatError(
                "bad training flag", "mask=all trains every token, but an answer says that it is not trained"
            )
        if self.mask == "last_turn" and (turns := answered_turns(messages)):
            start = turns[-1][0]
            trained = [value and index >= start for index, value in enumerate(trained)]
        return trained

    def _text(self, messages: list[dict], tools: list[dict]) -> str:
        raise NotImplementedError

    def _prompt(self, messages: list[dict], tools: list[dict], thinking: bool) -> str:
        raise NotImplementedError

    def _sequences(self, messages: list[dict], tools: list[dict], trained: list[bool]) -> list[list[Span]]:
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
