"""The tokenizer and the chat template that a prep output was made with, opened again from its metadata.json.

Whatever works on prepared data later (report, evaluation, export) opens them here, so that it cannot read tokens with
another vocabulary or ask with another prompt than the model was trained on.
"""

from __future__ import annotations

from nemotron_sft.data.chat import Template, load_template
from nemotron_sft.data.tokens import Tokenizer, load_tokenizer
from nemotron_sft.errors import UserError


def open_tokenizer(metadata: dict) -> Tokenizer:
    """The tokenizer of the data, at the revision that metadata.json names.

    Raises UserError if it is gone, or is another one than the data was made with.
    """
    made_with = metadata["tokenizer"]
    tokenizer = load_tokenizer(made_with["model"], revision=made_with.get("revision"), backend="tokenizers")
    if tokenizer.digest != made_with["digest"]:
        raise _changed(f"tokenizer {made_with['model']}")
    return tokenizer


def open_template(metadata: dict) -> Template:
    """The chat template of the data, with the options and special tokens that metadata.json names.

    Raises UserError if it is gone, or is another one than the data was made with.
    """
    options = {key: value for key, value in metadata["template"].items() if key != "digest"}
    template = load_template(**options)
    if template.digest != metadata["template"]["digest"]:
        raise _changed(f"template {options['name']}")
    return template


def _changed(what: str) -> UserError:
    return UserError(f"{what} has changed since the data was made with it: restore it, or prepare the data again")
