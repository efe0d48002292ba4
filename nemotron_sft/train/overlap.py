"""Prompts that occur in the training data, which a preflight warns of.

A prompt occurs there if one of its messages (system messages apart) shares 13 words in a row with the data: the rule by
which recipes/prep.py leaves out records (data/ngrams.py). A prompt whose messages are all shorter is compared as a
whole: its messages have to stand in the data one after another, each with the same words from first to last. That can
be seen where the chat template puts special tokens around messages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

from nemotron_sft.data import ngrams
from nemotron_sft.data.opened import open_tokenizer
from nemotron_sft.data.packed import open_packs
from nemotron_sft.data.tokens import Tokenizer
from nemotron_sft.train.prompts import Prompts

TOKENS = 2**21  # that are looked at, at most: it takes two or three seconds

Found = dict[int, str]  # prompts by their number, with words that they share, of short ones the last message
Words = tuple[str, ...]  # of messages that follow one another, a string for each


def overlap(prompts: Prompts, metadata: dict, data_dir: Path) -> list[str]:
    """Lines about prompts that occur in the training packs, one for each file that has some.

    One line if there are none; no line if recipes/prep.py has left out of the data what is in the files. Raises
    UserError if the tokenizer is gone.
    """
    names = [name for name, path in prompts.paths.items() if not _left_out(Path(path), metadata, data_dir)]
    if not names:
        return []
    tokenizer = open_tokenizer(metadata)
    asked = Asked(prompts, [index for name in names for index in prompts.files[name]], tokenizer)
    packs = open_packs(data_dir / metadata["splits"]["training"]["file"])
    chosen = _spread(len(packs), max(1, TOKENS // metadata["pack_size"]))
    found: dict[int, tuple[str, int]] = {}
    for number in chosen:
        for index, words in asked.shared_with(_sequences(packs[number], tokenizer)).items():
            found.setdefault(index, (words, number))
    looked = f"{'all' if len(chosen) == len(packs) else f'{len(chosen):,} of'} {len(packs):,} packs looked at"
    lines = []
    for name in names:
        if hits := [index for index in prompts.files[name] if index in found]:
            lines.append(_line(prompts, name, hits, *found[hits[0]], looked))
    return lines or [f"No prompt occurs in the training data ({looked})"]


def _left_out(path: Path, metadata: dict, data_dir: Path) -> bool:
    """Whether the data was prepared with decontaminate= of that file, which has not changed since."""
    files = (metadata.get("decontaminate") or {}).get("files", [])
    is_named = any(Path(file).resolve() == path.resolve() for file in files)
    return is_named and path.stat().st_mtime <= (data_dir / "metadata.json").stat().st_mtime


def _spread(packs: int, most: int) -> list[int]:
    """The numbers of at most so many packs, at equal distances."""
    return np.linspace(0, packs - 1, min(packs, most)).astype(int).tolist()


def _line(prompts: Prompts, name: str, hits: list[int], words: str, pack: int, looked: str) -> str:
    """What is said of a file some of whose prompts occur; words, pack: of the first of them."""
    occur = "prompt occurs" if len(hits) == 1 else "prompts occur"
    return (
        f"warning: {len(hits):,} of {len(prompts.files[name]):,} {name} {occur} in the training data ({looked}): "
        f'{prompts.places[hits[0]]} "{words}" is in pack {pack}; prep.py decontaminate=[{prompts.paths[name]}] '
        f"leaves out what shares {ngrams.WORDS} words"
    )


class Asked:
    """The prompts that are looked for."""

    def __init__(self, prompts: Prompts, rows: list[int], tokenizer: Tokenizer):
        self.runs: dict[int, list[int]] = defaultdict(list)  # hashes of 13 words: prompts
        self.whole: dict[Words, list[int]] = defaultdict(list)  # of short prompts
        self.texts: dict[int, np.ndarray] = {}
        for index in rows:
            messages = [m for m in prompts.records[index]["messages"] if m.get("role") != "system"]
            self.texts[index] = ngrams.joined(ngrams.texts(messages))
            runs = np.unique(ngrams.hashes(self.texts[index])).tolist()
            for run in runs:
                self.runs[run].append(index)
            if not runs and (whole := _whole(_texts(prompts.ids[index], tokenizer), messages)):
                self.whole[whole].append(index)
        self.lengths = {len(whole) for whole in self.whole}

    def shared_with(self, sequences: list[list[str]]) -> Found:
        """The prompts that occur in a pack, whose sequences are lists of texts."""
        text = ngrams.joined(text for sequence in sequences for text in sequence)
        found: Found = {}
        for run in self.runs.keys() & set(ngrams.hashes(text).tolist()):
            for index in self.runs[run]:
                if index not in found:
                    found[index] = self._quoted(index, run)
        for sequence in sequences if self.whole else []:
            for whole in self.whole.keys() & _windows(list(filter(None, map(_words, sequence))), self.lengths):
                found |= dict.fromkeys(self.whole[whole], whole[-1])
        return found

    def _quoted(self, index: int, run: int) -> str:
        """The 13 words of a prompt with that hash."""
        shared = ngrams.first_shared(
            self.texts[index], *ngrams.table(np.array([run], np.uint64), np.zeros(1, np.int32))
        )
        return shared[1] if shared else ""


def _sequences(pack: np.void, tokenizer: Tokenizer) -> list[list[str]]:
    """The texts of the sequences of a pack, a record of `packed.pack_dtype`."""
    return [_texts(pack["input_ids"][low:high], tokenizer) for low, high in pairwise(pack["cu_seqlens"]) if high > low]


def _texts(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """What stands between the special tokens of ids (n,): messages, with their roles as the template writes them."""
    edges = np.flatnonzero(np.isin(ids, tokenizer.added_ids)).tolist()
    between = pairwise([-1, *edges, len(ids)])
    return [tokenizer.decode(ids[low + 1 : high]) for low, high in between if high - low > 1]


def _words(text: str) -> str:
    """The words of a text in lower case, a space between them."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _whole(texts: list[str], messages: list[dict]) -> Words | None:
    """The words of a rendered prompt from its first to its last message; None where messages cannot be told apart."""
    pieces = list(filter(None, map(_words, texts)))
    first, last = (_words(" ".join(ngrams.texts(messages[end].get("content")))) for end in (0, -1))
    starts = [place for place, piece in enumerate(pieces) if f" {piece}".endswith(f" {first}")]
    ends = [place for place, piece in enumerate(pieces) if f" {piece}".endswith(f" {last}")]
    if not (first and last and starts and ends and starts[0] <= ends[-1]):
        return None
    return tuple(pieces[starts[0] : ends[-1] + 1])


def _windows(pieces: list[str], lengths: set[int]) -> set[Words]:
    """Every run of so many pieces."""
    return {tuple(pieces[start : start + n]) for n in lengths for start in range(len(pieces) - n + 1)}
