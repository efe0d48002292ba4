"""Training records that share a passage with an evaluation set: found by runs of 13 words.

A word is a run of letters and digits, upper or lower case, or one character of a script without spaces (Chinese,
Japanese). Every run of 13 words of the evaluation set is a 64-bit hash in a table; a record whose words give one of
these hashes shares the run. The table takes 24 to 48 bytes for every word of the evaluation set, in every process,
however large the data is. 13 words are what GPT-3 (Brown et al. 2020, appendix C) and many after it take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any
from unicodedata import category

import numpy as np

from nemotron_sft.data import reading, sources
from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.packing import compiled
from nemotron_sft.data.reading import File
from nemotron_sft.errors import UserError

WORDS = 13


@dataclass(frozen=True)
class Table:
    """The runs of words of an evaluation set.

    keys: (slots,) uint64, hashes of the runs, 0 in a free slot; items: (slots,) int32, the record a run is from.
    origins: where each record is, (index of its file, position). short: how many have no run, being too short.
    """

    keys: np.ndarray
    items: np.ndarray
    origins: list[tuple[int, int]]
    short: int


@dataclass(frozen=True)
class Evaluation:
    """The files of an evaluation set. Plain data that pickles; every process makes its own table."""

    files: tuple[File, ...]

    @property
    def table(self) -> Table:
        """The runs of words of the files, read once per process."""
        return _table(self.files)

    @property
    def stamps(self) -> list[tuple[str, str]]:
        """What changes when the evaluation set does."""
        return [(file.label, file.stamp) for file in self.files]

    def describe(self) -> dict:
        """The files, and how many records and runs of words there are in them; plain data."""
        table = self.table
        return {"files": [file.label for file in self.files], "records": len(table.origins),
                "runs": int(np.count_nonzero(table.keys)), "too_short": table.short}  # fmt: skip

    def shared(self, messages: list) -> str | None:
        """The first 13 words that a conversation shares with the evaluation set, and with which text of it."""
        table = self.table
        text = _joined(messages)
        item, start, end = compiled(_scan)(text, kinds(), table.keys, table.items, _NOTHING)
        if item < 0:
            return None
        file, position = table.origins[item]
        words = " ".join(text[start:end].tobytes().decode("utf-8", "replace").split())
        return f"shares {words!r} with {reading.locate(self.files[file], position)}"


def load_evaluation(paths: list[str]) -> Evaluation | None:
    """The evaluation set in files, directories or hub datasets, whose records hold prompts, messages or any other
    texts; None for no paths. Raises UserError, also when no text is long enough to be found again."""
    if not paths:
        return None
    files = [file for path in paths for file in sources.find(Dataset(name="decontaminate", path=path))]
    evaluation = Evaluation(tuple(files))
    if not evaluation.table.keys.any():
        raise UserError(f"decontaminate: no text of {WORDS} words in {', '.join(paths)}")
    return evaluation


@lru_cache(maxsize=1)
def _table(files: tuple[File, ...]) -> Table:
    hashes: list[np.ndarray] = [_NOTHING]
    items: list[np.ndarray] = [_NO_ITEMS]
    origins: list[tuple[int, int]] = []
    short = 0
    for number, file in enumerate(files):
        for position, record in reading.read(reading.whole(file), None):
            text = _joined(record, with_system=False)
            found = np.zeros(len(text) // 2 + 1, np.uint64)
            count = compiled(_scan)(text, kinds(), found[:0], _NO_ITEMS, found)[2]
            short += count == 0
            hashes.append(np.unique(found[:count]))
            items.append(np.full(len(hashes[-1]), len(origins), np.int32))
            origins.append((number, position))
    found, which = np.concatenate(hashes), np.concatenate(items)
    slots = 1 << max(4, int(2 * len(found) - 1).bit_length())
    keys, values = np.zeros(slots, np.uint64), np.zeros(slots, np.int32)
    compiled(_insert)(found, which, keys, values)
    return Table(keys, values, origins, short)


def texts(value: Any, with_system: bool = True) -> Iterator[str]:
    """Every string in a record, at any depth; system messages, which evaluation and training may well have in common,
    only if asked for."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if with_system or value.get("role") != "system":
            for item in value.values():
                yield from texts(item, with_system)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item, with_system)


_NOTHING, _NO_ITEMS = np.empty(0, np.uint64), np.empty(0, np.int32)


def _joined(value: Any, with_system: bool = True) -> np.ndarray:
    """All texts of a value in lower case as UTF-8, (bytes,) uint8; zeros keep them apart."""
    text = "\0".join(texts(value, with_system)).lower()
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


@cache
def kinds() -> np.ndarray:
    """(65536,) uint8, what a character is: 0 parts words, 1 is of a word, 2 is a word of its own, 3 parts texts."""
    found = np.array([chr(code).isalnum() or category(chr(code))[0] == "M" for code in range(0x10000)], np.uint8)
    found[0] = 3
    for low, high in ((0x3041, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF)):
        found[low:high][found[low:high] == 1] = 2
    return found


# The rest is compiled by Numba.


def _scan(  # noqa: C901 -- one loop, which Numba compiles
    text: np.ndarray, kinds: np.ndarray, keys: np.ndarray, items: np.ndarray, out: np.ndarray
) -> tuple:
    """Go through the runs of 13 words in `text`, UTF-8 in lower case; kinds: see there.

    With keys (a table) until one is in it: returns its item and the bytes [start, end) of the run, or (-1, 0, 0).
    Without, write the hash of every run to `out`: returns (-1, 0, the number of runs).
    """
    base, one, prime = np.uint64(0x9E3779B97F4A7C15), np.uint64(1), np.uint64(1099511628211)
    top = one  # base ** 12, by which the oldest word of a run is multiplied
    for _ in range(12):
        top *= base
    ring, starts = np.zeros(13, np.uint64), np.zeros(13, np.int64)  # of the last words: hash, and first byte
    word, run, begin, count, written, at = np.uint64(0), np.uint64(0), -1, 0, 0, 0
    while at <= text.size:
        code: Any = 0  # the end counts as a zero
        width = 1
        if at < text.size:
            code = np.int64(text[at])
            width = 4 if code >= 0xF0 else 3 if code >= 0xE0 else 2 if code >= 0xC0 else 1
            if width > 1:
                code &= 0x7F >> width
                for k in range(1, width):
                    code = code << 6 | np.int64(text[at + k]) & 0x3F
        kind = kinds[code] if code < 0x10000 else 2 if code >= 0x20000 else 1 if code < 0x1F000 else 0
        if kind == 1:
            if begin < 0:
                begin, word = at, np.uint64(14695981039346656037)
            word = (word ^ np.uint64(code)) * prime  # FNV-1a
            at += width
            while at < text.size and text[at] < 128 and kinds[text[at]] == 1:
                word = (word ^ np.uint64(text[at])) * prime
                at += 1
            continue
        if begin >= 0:  # the word before this character, which is then looked at again
            end = at
        elif kind == 2:
            begin, word, end, at = at, np.uint64(code), at + width, at + width
        else:
            if kind == 3:
                ring[:], run, count = 0, np.uint64(0), 0
            at += width
            continue
        word = (word ^ (word >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        word ^= word >> np.uint64(32)
        run = (run - ring[count % 13] * top) * base + word
        ring[count % 13], starts[count % 13] = word, begin
        count, begin = count + 1, -1
        if count >= 13:
            key = run ^ (run >> np.uint64(31)) | one  # never 0, the mark of a free slot
            if not keys.size:
                out[written], written = key, written + 1
                continue
            place = np.int64(key >> np.uint64(20)) & (keys.size - 1)
            while keys[place] != 0:
                if keys[place] == key:
                    return np.int64(items[place]), starts[count % 13], np.int64(end)
                place = (place + 1) & (keys.size - 1)
    return np.int64(-1), np.int64(0), np.int64(written)


def _insert(hashes: np.ndarray, items: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    """Put hashes into a table of more slots; the first text that has a run keeps it."""
    for index in range(hashes.size):
        place = np.int64(hashes[index] >> np.uint64(20)) & (keys.size - 1)
        while keys[place] != 0 and keys[place] != hashes[index]:
            place = (place + 1) & (keys.size - 1)
        if keys[place] == 0:
            keys[place], values[place] = hashes[index], items[index]
