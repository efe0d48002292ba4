"""Whether an answer is right: the scorers that a prompt file may name.

Every scorer takes the model's answer (text, without reasoning) and the prompt's record, whose "answer" is what was
expected, and says whether it is right. An answer that cannot be read is wrong, never an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>\s*(.*?)\s*</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_CALLS = re.compile(r"<TOOLCALL>\s*(\[.*?\])\s*</TOOLCALL>", re.DOTALL)


def exact(answer: str, record: dict) -> bool:
    """Equal, but for white space around it."""
    return answer.strip() == record["answer"].strip()


def contains(answer: str, record: dict) -> bool:
    """The expected text occurs in the answer, in upper or lower case."""
    return record["answer"].strip().lower() in answer.lower()


def regex(answer: str, record: dict) -> bool:
    """The expected regular expression (Python's) is found in the answer."""
    return re.search(record["answer"], answer) is not None


def number(answer: str, record: dict) -> bool:
    """The last number of the answer equals the expected one; 1,000 and 1e3 are 1000."""
    found, expected = _numbers(answer), _numbers(str(record["answer"]))
    return bool(found) and abs(found[-1] - expected[-1]) <= 1e-6 * max(1.0, abs(expected[-1]))


def json_equal(answer: str, record: dict) -> bool:
    """The answer, or the last fenced block in it, is JSON equal to the expected value; keys in any order."""
    return any(_same(value, record["answer"]) for value in _json_in(answer))


def tool_call(answer: str, record: dict) -> bool:
    """The answer calls the expected tools with the expected arguments, in the expected order and no others."""
    expected = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    called = calls_in(answer)
    return len(called) == len(expected) and all(
        name == want["name"] and _same_arguments(given, want.get("arguments") or {})
        for (name, given), want in zip(called, expected, strict=True)
    )


def choice(answer: str, record: dict) -> bool:
    """The last of the record's "choices" that stands in the answer as a word of its own is the expected one."""
    longest_first = sorted(map(str, record["choices"]), key=len, reverse=True)
    found = re.findall("|".join(rf"(?<!\w){re.escape(each)}(?!\w)" for each in longest_first), answer)
    return bool(found) and found[-1] == str(record["answer"])


SCORERS: dict[str, Callable[[str, dict], bool]] = {
    "exact": exact, "contains": contains, "regex": regex, "number": number, "json": json_equal,
    "tool_call": tool_call, "choice": choice,
}  # fmt: skip


def score(answer: str, record: dict) -> bool:
    """Whether the record's own scorer finds the answer right."""
    return SCORERS[record["score"]](answer, record)


def problem(record: dict) -> str | None:
    """What keeps a record from being scored; None if nothing does."""
    name, answer = record.get("score", "exact"), record.get("answer")
    if not isinstance(name, str) or name not in SCORERS:
        return f'unknown scorer "score": {json.dumps(name)}; there are {", ".join(SCORERS)}'
    if answer is None:
        return 'no "answer"'
    if name == "tool_call":
        calls = answer if isinstance(answer, list) else [answer]
        if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            return '"answer" of a tool_call must be {"name", "arguments"}, or a list of them'
        if not all(isinstance(call.get("arguments") or {}, dict) for call in calls):
            return '"arguments" of the expected tool call must be an object'
    elif name == "number":
        if isinstance(answer, bool) or not _numbers(str(answer)):
            return '"answer" holds no number'
    elif name == "choice":
        choices = record.get("choices")
        if not isinstance(choices, list) or len(choices) < 2:
            return 'a choice needs "choices", a list of at least two'
        if str(answer) not in map(str, choices):
            return '"answer" is none of the "choices"'
    elif name != "json" and (not isinstance(answer, str) or not answer.strip()):
        return f'"answer" of {name} must be text, and not empty'
    return _bad_pattern(answer) if name == "regex" else None


def _bad_pattern(pattern: str) -> str | None:
    try:
        return None if not re.compile(pattern).search("") else '"answer" is a pattern that every answer matches'
    except re.error as error:
        return f'"answer" is no regular expression ({error})'


def chance(records: list[dict]) -> float:
    """What can be scored without having learned anything: by one constant answer, or by guessing among the choices."""
    expected = Counter(json.dumps(record["answer"], sort_keys=True) for record in records)
    guessed = sum(1 / len(record["choices"]) for record in records if record["score"] == "choice")
    return max(expected.most_common(1)[0][1], guessed) / len(records)


def calls_in(answer: str) -> list[tuple[str, dict]]:
    """(name, arguments) of the tool calls in an answer, written as JSON or as Nemotron 3's tags, whose values are text.

    What cannot be read is a call without a name, so that it equals no other.
    """
    texts = _CALL.findall(answer)
    if not texts and (listed := _CALLS.search(answer)):
        value = _loads(listed[1])
        return [_named(call) for call in value] if isinstance(value, list) else [("", {})]
    return [_tagged(text) if "<function=" in text else _named(_loads(text)) for text in texts]


def _tagged(text: str) -> tuple[str, dict]:
    function = _FUNCTION.search(text)
    return (function[1], dict(_PARAMETER.findall(function[2]))) if function else ("", {})


def _named(call: Any) -> tuple[str, dict]:
    arguments = call.get("arguments") or {} if isinstance(call, dict) else None
    arguments = _loads(arguments) if isinstance(arguments, str) else arguments
    return (str(call.get("name")), arguments) if isinstance(arguments, dict) else ("", {})


def _same_arguments(given: dict, expected: dict) -> bool:
    """Equal; a text also stands for the value that it is the JSON of."""
    if given.keys() != expected.keys():
        return False
    return all(_same(value, expected[key]) or _as_text(value, expected[key]) for key, value in given.items())


def _as_text(given: Any, expected: Any) -> bool:
    return isinstance(given, str) and not isinstance(expected, str) and _same(_loads(given), expected)


def _same(a: Any, b: Any) -> bool:
    """Equal JSON values; unlike Python, true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


_NOT_JSON = object()


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _json_in(answer: str) -> list[Any]:
    """The JSON value that an answer is, or that its last fenced block is; at most one."""
    texts = [answer, *_FENCE.findall(answer)[-1:]]
    return [value for value in map(_loads, texts) if value is not _NOT_JSON][:1]


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]
