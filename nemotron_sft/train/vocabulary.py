"""Whether data was tokenized as the model was trained to read it: two tokenizers compared by what decides token ids.

Sizes alone do not tell: two vocabularies of 128,000 tokens may share none of their ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_sft.config import TrainConfig
from nemotron_sft.data.opened import open_tokenizer
from nemotron_sft.data.packed import read_metadata
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.train.checkpoints import is_hf


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer.json decides the ids of a text; how ids become text again, and what is put around a text,
    does not."""

    ids: dict[int, str]  # the whole vocabulary, added tokens included
    merges: list[tuple[str, str]]
    steps: dict[str, Any]  # normaliser, pre-tokenizer and the model's own switches

    def unlike(self, other: Vocabulary) -> str | None:
        """How ids made with this vocabulary differ from those of `other`, in words; None if `other` reads them all."""
        shared = self.ids.keys() & other.ids.keys()
        if moved := sorted(token for token in shared if self.ids[token] != other.ids[token]):
            first = moved[0]
            return (
                f"{len(moved):,} of {len(self.ids):,} ids mean something else, "
                f"{first} {self.ids[first]!r} here and {other.ids[first]!r} there"
            )
        if self.merges != other.merges:
            return "their merges differ"
        if different := [name for name in self.steps if self.steps[name] != other.steps[name]]:
            return f"their {' and '.join(different)} differ"
        return None


def read_vocabulary(file: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json, whatever version of tokenizers wrote it. Raises UserError if it is none."""
    from tokenizers import Tokenizer

    try:
        content = json.loads(Tokenizer.from_file(str(file)).to_str())  # as the installed version would write it
        model = content["model"]
        listed = model.get("vocab", {})
        entries = listed.items() if isinstance(listed, dict) else ((entry[0], i) for i, entry in enumerate(listed))
        ids = {index: token for token, index in entries}
        ids |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
        merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file}: not a tokenizer: {first_line(error)}") from None
    own = ("type", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "unk_token")
    steps = {"normaliser": content.get("normalizer"), "pre-tokenizer": content.get("pre_tokenizer")}
    return Vocabulary(ids, merges, steps | {"model": [model.get(name) or None for name in own]})


def check(config: TrainConfig, metadata: dict) -> str | None:
    """Compare the data's tokenizer with that of the model in config.init_from, as resolved by `starting_point`.

    Returns a line to show, if there is something to know. Raises UserError if the model would read other tokens than
    were written, unless data.other_tokenizer allows it.
    """
    theirs = _of_model(config)
    if theirs is None:
        return None
    try:
        ours = open_tokenizer(metadata).file
    except UserError as error:
        return f"the data's tokenizer was not compared with the model's: {error}"
    if ours.samefile(theirs):
        return None
    data, model = read_vocabulary(ours), read_vocabulary(theirs)
    if difference := data.unlike(model):
        message = f"the data was made with another tokenizer ({ours}) than the model's ({theirs}): {difference}"
        if config.data.other_tokenizer:
            return message
        raise UserError(
            f"{message}; prepare it with tokenizer.model={theirs.parent}, or allow it with data.other_tokenizer=true"
        )
    if added := sorted(data.ids.keys() - model.ids.keys()):
        first = data.ids[added[0]]
        return f"{len(added):,} tokens of the data are new to the model, {first!r} ({added[0]}) the first of them"
    return None


def _of_model(config: TrainConfig) -> Path | None:
    """The tokenizer.json of the model that training starts from: its directory's, or of the data that its run used."""
    start = config.init_from
    if start == "random":
        return None
    file = Path(start, "tokenizer.json")
    if is_hf(start):
        return file if file.is_file() else None
    for folder in Path(start).absolute().parents:
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():  # a run of ours
            try:
                earlier = OmegaConf.load(folder / "config.yaml")
                return open_tokenizer(read_metadata(Path(earlier.data.path))).file
            except UserError:  # its data is gone
                return None
    return None
