"""Tokenizers that put a space before a text (Llama 2's, Mistral's and other SentencePiece models).

Spans of one text are encoded one by one, and such a tokenizer would put a space into each of them. Here a span gets
one only where the whole text would have one: at the beginning and, with Llama 2's kind, behind special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


def without_prefix(content: dict) -> tuple[dict, str] | None:
    """(the tokenizer without its space, where the space goes) of the content of a tokenizer.json.

    "always" is before every text and behind every special token, "first" before the text alone. None where
    the space is not put there by a setting that is known.
    """
    content = json.loads(json.dumps(content))
    found = []
    normalizers = content.get("normalizer") or {}
    for step in list(normalizers.get("normalizers", [normalizers])):
        if step.get("type") == "Prepend":
            found.append("always")
            step |= {"type": "Replace", "pattern": {"String": "\u2581"}, "content": "\u2581"}  # changes nothing
            step.pop("prepend", None)
    splitters = content.get("pre_tokenizer") or {}
    for step in splitters.get("pretokenizers", [splitters]):
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
        if step.get("type") == "Metaspace" and scheme != "never":
            found.append(scheme)
            step |= {"prepend_scheme": "never"}
            step.pop("add_prefix_space", None)
        elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            found.append("always")
            step["add_prefix_space"] = False
    if not found:
        return None
    return content, "always" if "always" in found else "first"


def encode_spans(
    sequences: list[list[tuple[str, str]]], where: str, added: list[str], encode: Encode, bare: Encode
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, offsets) of all spans in a row: int32 (tokens,) and int64 (spans + 1,).

    where: see without_prefix. added: the added tokens. encode, bare: (ids, offsets) of texts, with the space and
    without it.
    """
    special = _pattern(tuple(added))
    plain: list[str] = []  # texts for each encoder; order: for every span, its part in each
    whole: list[str] = []
    order: list[tuple[int, int]] = []
    for spans in sequences:
        fresh = True  # nothing is written yet, or a special token was, and a space follows one
        for _, text in spans:
            head = ""
            if not fresh:
                first = special.search(text)
                head = text[: first.start()] if first else text
            order.append((len(plain), len(whole)))
            plain.append(head)
            whole.append(text[len(head) :])
            if text:
                last = [match.end() for match in special.finditer(text)][-1:]
                fresh = where == "always" and last == [len(text)]
    plain_ids, plain_at = bare(plain)
    whole_ids, whole_at = encode(whole)
    ids = [
        part
        for i, j in order
        for part in (plain_ids[plain_at[i] : plain_at[i + 1]], whole_ids[whole_at[j] : whole_at[j + 1]])
    ]
    lengths = [len(head) + len(rest) for head, rest in batched(ids, 2)]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32, copy=False), offsets


@lru_cache(maxsize=4)
def _pattern(added: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")


@lru_cache(maxsize=2)
def opened(file: Path, changed: int) -> Any:
    """The encoder of a tokenizer.json without its space."""
    from tokenizers import Tokenizer as Reference

    found = without_prefix(json.loads(file.read_bytes()))
    assert found, "called for such a tokenizer alone"
    reference = Reference.from_str(json.dumps(found[0]))
    reference.no_truncation()
    reference.no_padding()
    return reference
