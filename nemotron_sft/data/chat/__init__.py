"""Chat messages to text: what a model reads, and which part of it is trained.

    template = load_template("nano3")
    template.render(messages, tools)             the whole conversation
    template.sequences(messages, tools)          training sequences, each a list of (role, text) spans
    template.generation_prompt(messages, tools)  what the model is given to answer these messages

What a record says about training beside its messages is one call, which the pipeline makes for every record:

    template.training_sequences(messages, tools, **per_record(record))

`RECORD_KEYS` are the columns that it reads. Messages and tools come as the record has them, already in
OpenAI's form (another form's roles and field names are the reader's business), JSON text parsed.

The texts of a sequence's spans concatenate to its text. Spans of role "assistant" are trained and nothing
else is, so a mask policy is a matter of roles alone: with `mask="last_turn"` earlier answers carry the role
"history", with `mask="all"` every span carries the role "assistant". A trained span begins where the
generation prompt ends and includes the turn's terminator: what the model has to produce at inference.

A template that drops earlier reasoning shows every turn a different past. A conversation with reasoning then
gives one sequence per user turn, cut after that turn's answer and trained on that answer alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemotron_sft.config import unknown_key
from nemotron_sft.data.chat.flags import RECORD_KEYS, per_record, record_weight
from nemotron_sft.data.chat.jinja import JinjaTemplate
from nemotron_sft.data.chat.messages import ROLES, ChatError, clean_messages
from nemotron_sft.data.chat.nano_v2 import NanoV2
from nemotron_sft.data.chat.nemotron3 import Lightning35, Lightning35HF, Nano3, Super3
from nemotron_sft.data.chat.template import EMPTY_ANSWERS, HISTORIES, MASKS, Span, Template
from nemotron_sft.errors import UserError

__all__ = ["BUILT_IN", "HISTORIES", "MASKS", "RECORD_KEYS", "ROLES", "ChatError", "Span", "Template", "clean_messages",
           "load_template", "per_record", "record_weight"]  # fmt: skip


BUILT_IN = {
    "nano3": Nano3,
    "super3": Super3,
    "lightning35": Lightning35,
    "lightning35_hf": Lightning35HF,
    "nano_v2": NanoV2,
}


def load_template(name: str = "nano3", source: str | None = None, **options: Any) -> Template:
    """A built-in template (BUILT_IN) or the path of a Jinja file; `options` are the fields of Template.

    source: the text of a Jinja template that has no file, as the tokenizer's own; `name` is then only its name.
    Raises UserError for a name or option that does not exist and for a file that is not valid Jinja.
    """
    known = {field.name for field in fields(Template)} - {"name", "source"}
    for option in options.keys() - known:
        raise unknown_key(f"template.{option}", sorted(known | {"name"}))
    for option, choices in (("mask", MASKS), ("history", HISTORIES), ("empty_answers", EMPTY_ANSWERS)):
        if options.get(option, choices[0]) not in choices:
            raise UserError(f"template.{option}={options[option]}: choose from {', '.join(choices)}")
    if source is None and name in BUILT_IN:
        template = BUILT_IN[name](name, BUILT_IN[name].jinja(), **options)
        with _told():
            template.generation_prompt([{"role": "user", "content": ""}])  # knows the variables, or says which not
        return template
    if source is None:
        try:
            source = Path(name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            names = ", ".join(BUILT_IN)
            raise UserError(f"template.name={name}: neither {names} nor a readable Jinja file") from None
    template = JinjaTemplate(str(name), source, **options)
    if template._marked and template.train_generation_prompt:
        raise UserError(
            f"{name}: its generation tags decide what is trained: enclose the opening of an answer in them "
            "instead of setting train_generation_prompt"
        )
    template._compiled  # noqa: B018 -- report a broken file now
    return template


@contextmanager
def _told() -> Iterator[None]:
    """What a conversation would be dropped for is here a setting to correct."""
    try:
        yield
    except ChatError as error:
        raise UserError(f"template: {error}") from None
