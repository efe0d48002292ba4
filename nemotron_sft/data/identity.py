"""Which conversation a record holds: a hash that decides its split and finds it again when it is repeated."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import orjson
import xxhash


def conversation_digest(messages: list[Any], tools: list[Any] | None = None) -> int:
    """The hash, 0 to 2**64 - 1, of a conversation as it was given (not of its rendering).

    The order of keys does not count, nor does a key that is null, nor the form of the file: JSON lines and Parquet
    give the same. Any two of 10 million different conversations are taken for one with probability 3e-6.
    """
    value = [messages, tools] if tools else [messages]
    try:
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        if (tools or not _texts_only(messages)) and b"null" in text:
            text = orjson.dumps(_without_null_keys(value), option=orjson.OPT_SORT_KEYS)
    except TypeError:  # integers beyond 64 bits, lone surrogates
        text = json.dumps(_without_null_keys(value), sort_keys=True).encode()
    return xxhash.xxh3_64_intdigest(text)


def _texts_only(messages: list[Any]) -> bool:
    """Whether every message is an object whose values are texts: so are most."""
    try:
        return set(map(type, chain.from_iterable(map(dict.values, messages)))) <= {str}
    except TypeError:  # a message that is no object
        return False


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
