"""JSON text to values: fast, and exact for everything that Python's json module writes."""

from __future__ import annotations

import json
from typing import Any

import orjson

_MARK = b"\xef\xbb\xbf"  # byte order mark in UTF-8
_DIGITS = bytes(ord("0") if chr(i).isdigit() else 1 for i in range(128)) + b"\1" * 128
_LONG = b"0" * 19  # so many digits may be an integer beyond 64 bits


class NotJSON(ValueError):
    """Text that is not JSON: why in a few words, and in which `line` of it."""

    def __init__(self, reason: str, line: int = 1):
        super().__init__(reason)
        self.line = line


def loads(text: bytes) -> Any:
    """The value of JSON in UTF-8, also behind a byte order mark.

    orjson reads it. What that refuses or rounds (NaN, lone surrogates, integers beyond 64 bits) Python's own json
    reads. Raises NotJSON.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _patient(text)
    return _patient(text) if _long_number(text) else value


def _long_number(text: bytes) -> bool:
    """Whether there are so many digits in a row that they may be an integer beyond 64 bits."""
    # Of 19 bytes in a row, three are among every sixth: a look at these spares nearly every text the look at all.
    return b"000" in text[::6].translate(_DIGITS) and _LONG in text.translate(_DIGITS)


def loads_text(text: str) -> Any:
    """`loads` for a string."""
    return loads(text.encode("utf-8", "surrogatepass"))


def _patient(text: bytes) -> Any:
    """`loads` by Python's json."""
    try:
        return json.loads(text.removeprefix(_MARK).decode("utf-8", "surrogatepass"))
    except json.JSONDecodeError as error:
        raise NotJSON(f"{error.msg} at character {error.colno}", error.lineno) from None
    except UnicodeDecodeError as error:
        raise NotJSON(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise NotJSON("nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise NotJSON(str(error).partition(";")[0]) from None
