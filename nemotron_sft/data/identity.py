"""Which conversation a record holds: a hash that decides its split and finds it again when it is repeated."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import orjson


def conversation_digest(messages: list[Any], tools: list[Any] | None = None) -> int:
    """The hash, 0 to 2**64 - 1, of a conversation as it was given (not of its rendering).

    The order of keys does not count, nor does a key that is null, nor the form of the file: JSON lines and Parquet
    give the same. Any two of 10 million different conversations are taken for one with probability 3e-6.
    """
    value = [messages, tools] if tools else [messages]
    try:
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        if b"null" in text:
            text = orjson.dumps(_without_null_keys(value), option=orjson.OPT_SORT_KEYS)
    except TypeError:  # integers beyond 64 bits, lone surrogates
        text = json.dumps(_without_null_keys(value), sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _without_null_keys(value: Any) -> Any:
    """`value` without the keys that are null; what a tool is called with keeps them, there null is a value."""
    if isinstance(value, dict):
        return {
            key: item if key == "arguments" else _without_null_keys(item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [_without_null_keys(item) for item in value]
    return value
