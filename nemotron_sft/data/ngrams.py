"""Runs of 13 words in texts, as 64-bit hashes: what two texts share.

A word is a run of letters and digits, upper or lower case, or one character of a script without spaces (Chinese,
Japanese). 13 words are what GPT-3 (Brown et al. 2020, appendix C) and many after it take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any
from unicodedata import category

import numpy as np

from nemotron_sft.data.packing import compiled

WORDS = 13


def hashes(text: np.ndarray) -> np.ndarray:
    """The hash of every run of words in `joined` texts, in order: (runs,) uint64, never 0."""
    found = np.zeros(len(text) // 2 + 1, np.uint64)
    count = compiled(_scan)(text, kinds(), found[:0], _NO_ITEMS, found)[2]
    return found[:count]


def table(runs: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash table of runs (n,) uint64 and the item that each is from, (n,) int32; of several the first.

    Returns keys (slots,) uint64, 0 in a free slot, and items (slots,) int32.
    """
    slots = 1 << max(4, int(2 * len(runs) - 1).bit_length())
    keys, values = np.zeros(slots, np.uint64), np.zeros(slots, np.int32)
    compiled(_insert)(runs, items, keys, values)
    return keys, values


def first_shared(text: np.ndarray, keys: np.ndarray, items: np.ndarray) -> tuple[int, str] | None:
    """The first run of words in `joined` texts that is in a `table`: its item, and the words; None without one."""
    item, start, end = compiled(_scan)(text, kinds(), keys, items, _NOTHING)
    if item < 0:
        return None
    return int(item), " ".join(text[start:end].tobytes().decode("utf-8", "replace").split())


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


def joined(pieces: Iterable[str]) -> np.ndarray:
    """Texts in lower case as UTF-8, (bytes,) uint8; zeros keep them apart."""
    return np.frombuffer("\0".join(pieces).lower().encode("utf-8", "replace"), np.uint8)


@cache
def kinds() -> np.ndarray:
    """(65536,) uint8, what a character is: 0 parts words, 1 is of a word, 2 is a word of its own, 3 parts texts."""
    found = np.array([chr(code).isalnum() or category(chr(code))[0] == "M" for code in range(0x10000)], np.uint8)
    found[0] = 3
    for low, high in ((0x3041, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF)):
        found[low:high][found[low:high] == 1] = 2
    return found


_NOTHING, _NO_ITEMS = np.empty(0, np.uint64), np.empty(0, np.int32)

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
