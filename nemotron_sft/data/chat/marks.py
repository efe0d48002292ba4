"""A template's own marks that the data has already: end tokens behind a text, tags around a tool's result.

Data taken from rendered conversations keeps them: answers that end with <|im_end|>, results inside Hermes'
<tool_response>. A template would write them a second time, and a model would learn to end twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from nemotron_sft.data.chat.messages import ChatError

END, TAGS = "the template's end token in the text", "the template's tags around a tool's result"  # what was left out
# <|im_end|>, DeepSeek's with full-width bars, Gemma 4's <|turn> and <turn|>, <start_of_turn>, <SPECIAL_10>, </s>, <bos>
SPECIAL = re.compile(r"<[|\uff5c][^<>\s]{1,60}>|<[^<>\s]{1,60}[|\uff5c]>|<\w+_of_\w+>|<[A-Z]+_\d+>|</?s>|<[be]os>")
_QUESTION, _ANSWER = {"role": "user", "content": "userq"}, {"role": "assistant", "content": "assistantq"}
_SYSTEM = {"role": "system", "content": "systemq"}


@dataclass(frozen=True)
class Marks:
    """ends: {role: the special tokens that come behind a text of it}. result: what comes before and behind a tool's."""

    ends: dict[str, tuple[str, ...]] = field(default_factory=dict)
    result: tuple[str, str] = ("", "")

    def bare(self, role: str, text: str) -> tuple[str, str]:
        """A message's text without marks, and which it had: END, TAGS or ""."""
        before, behind = self.result
        inner = text.strip()
        if role == "tool" and before and inner.startswith(before) and inner.endswith(behind, len(before)):
            return inner[len(before) : -len(behind)].removeprefix("\n").removesuffix("\n"), TAGS
        ends = self.ends.get(role, ())
        found, rest = "", text.rstrip()
        while ends and rest.endswith(ends):
            text = next(rest.removesuffix(end) for end in ends if rest.endswith(end))
            found, rest = END, text.rstrip()
        return text, found


def find_marks(render: Callable[[list[dict]], str]) -> Marks:
    """The marks of the template that `render` renders with; none of those it cannot be asked for."""
    ends: dict[str, set[str]] = {}
    plain = [[_QUESTION], [_QUESTION, _ANSWER], [_QUESTION, _ANSWER, _QUESTION], [_SYSTEM, _QUESTION, _ANSWER]]
    for text in _texts(render, plain):
        for role in ("system", "user", "assistant"):
            _, there, behind = text.rpartition(f"{role}q")
            if there and (end := SPECIAL.match(behind.lstrip())):
                ends.setdefault(role, set()).add(end.group())
    result = ("", "")
    for text in _texts(render, _called()):
        before, _, behind = text.rpartition("resultq")
        before, behind = before.rstrip(), behind.lstrip()
        if end := SPECIAL.match(behind):
            ends.setdefault("tool", set()).add(end.group())
        result = (before[before.rfind("<") :], behind[: behind.find(">") + 1])
        if not (re.fullmatch(r"<[^<>\s]+>?\S?", result[0]) and re.fullmatch(r"\S?<[^<>\s]+>", result[1])):
            result = ("", "")
        break
    return Marks({role: tuple(sorted(found)) for role, found in ends.items()}, result)


def _texts(render: Callable[[list[dict]], str], conversations: Iterable[list[dict]]) -> Iterator[str]:
    """The renderings of those conversations that the template takes."""
    for conversation in conversations:
        try:
            yield render(conversation)
        except ChatError:
            continue


def _called() -> Iterator[list[dict]]:
    """Conversations with a tool's result, in the ways that templates insist on."""
    call: dict = {"id": "call00001", "type": "function", "function": {"name": "toolq", "arguments": {}}}
    result: dict = {"role": "tool", "name": "toolq", "tool_call_id": "call00001", "content": "resultq"}
    for content in ("", None, "c"):
        start: list = [_QUESTION, {"role": "assistant", "content": content, "tool_calls": [call]}, result]
        yield [*start, _ANSWER]
        yield start
    yield [_QUESTION, _ANSWER, {"role": "tool", "content": "resultq"}, _ANSWER]
