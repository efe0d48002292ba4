"""Official chat templates, each conversation rendered by transformers and by us.

    python tests/official.py          the table of docs/templates.md

The templates are those that ship with the packages trl and mistral-common; none is copied here.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from nemotron_sft.data.chat import ChatError, Template, load_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(content="How are you?"):
    return {"role": "user", "content": content}


def answer(content="Fine, thanks.", **more):
    return {"role": "assistant", "content": content, **more}


def calls(*cities, content="", text=False, **more):
    arguments = [json.dumps({"city": city}) if text else {"city": city} for city in cities]
    found = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "get_weather", "arguments": each}}
        for i, each in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": found, **more}


def result(content="rain", number=0):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "get_weather", "content": content}


def missing_content(message):
    return {key: value for key, value in message.items() if key != "content"}


SYSTEM = {"role": "system", "content": "Be kind."}
LOOP = [user("Oslo?"), calls("Oslo"), result(), answer("It rains.")]
CONVERSATIONS = {
    "one question": ([user(), answer()], []),
    "system": ([SYSTEM, user(), answer()], []),
    "several turns": ([SYSTEM, user(), answer(), user("Sure?"), answer("Yes."), user("Bye."), answer("Bye!")], []),
    "open question last": ([user(), answer(), user("Sure?")], []),
    "odd whitespace": ([user("  a\n\n b "), answer("\n  c\t\n d  "), user("e"), answer("数据 🚀 <b>&amp;</b>")], []),
    "two questions running": ([user(), user("Hello?"), answer()], []),
    "two answers running": ([user(), answer(), answer("And you?")], []),
    "answer first": ([answer("Hello!"), user(), answer()], []),
    "system and answer first": ([SYSTEM, answer("Hello!"), user(), answer()], []),
    "content in parts": ([{**user(), "content": [{"type": "text", "text": "How are you?"}]}, answer()], []),
    "tools not called": ([user(), answer()], [TOOL]),
    "tool call": (LOOP, [TOOL]),
    "tool call, then another turn": ([SYSTEM, *LOOP, user("Thanks."), answer("Welcome.")], [TOOL]),
    "tool call, arguments as text": ([user("Oslo?"), calls("Oslo", text=True), result(), answer("Rain.")], [TOOL]),
    "tool call, null content": ([user("Oslo?"), calls("Oslo", content=None), result(), answer("Rain.")], [TOOL]),
    "tool call, no content": ([user("Oslo?"), missing_content(calls("Oslo")), result(), answer("Rain.")], [TOOL]),
    "tool call with text": ([user("Oslo?"), calls("Oslo", content="Let me see."), result(), answer("Rain.")], [TOOL]),
    "two calls at once": (
        [user("Both?"), calls("Oslo", "Rome"), result(), result("sun", 1), answer("Rain and sun.")],
        [TOOL],
    ),
    "two calls in a row": (
        [user("Both?"), calls("Oslo"), result(), calls("Rome"), result("sun"), answer("Rain and sun.")],
        [TOOL],
    ),
    "ends with a call": ([user("Oslo?"), calls("Oslo")], [TOOL]),
    "empty tool result": ([user("Oslo?"), calls("Oslo"), result(""), answer("I do not know.")], [TOOL]),
    "bare tool": (LOOP, [TOOL["function"]]),
    "reasoning": ([user(), answer(reasoning_content="They ask.")], []),
    "reasoning, several turns": (
        [user(), answer(reasoning_content="They ask."), user("Sure?"), answer("Yes.", reasoning_content="I am.")],
        [],
    ),
    "reasoning before a call": (
        [user("Oslo?"), calls("Oslo", reasoning_content="Look."), result(), answer("Rain.", reasoning_content="Ok.")],
        [TOOL],
    ),
    "thinking before a call": (
        [user("Oslo?"), calls("Oslo", thinking="Look."), result(), answer("Rain.", thinking="Ok."), user("Sure?")],
        [TOOL],
    ),
    "reasoning as thinking": ([user(), answer(thinking="They ask.")], []),
    "reasoning inside the content": ([user(), answer("<think>\nThey ask.\n</think>\n\nFine, thanks.")], []),
}


@cache
def templates() -> dict[str, str]:
    """{name: Jinja source} of every official template in the installed packages."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    folder = resources.files("trl").joinpath("chat_templates")
    found = {
        path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
        for path in folder.iterdir()
        if path.name.endswith(".jinja")
    }
    for version in ("v1", "v2", "v3", "v7", "v11", "v13"):
        found[f"mistral_{version}"] = generate_chat_template(
            spm=version in ("v1", "v2"), tokenizer_version=TokenizerVersion(version), image_support=False,
            audio_support=False, thinking_support=version == "v13", default_system_prompt=None,
            plain_thinking_support=version == "v11", use_special_token_variables=True, model_settings_fields=None,
            reasoning_effort_values=None, reasoning_effort_default=None,
        )  # fmt: skip
    return dict(sorted(found.items()))


@cache
def loaded(name: str) -> Template:
    """An official template as ours."""
    return load_template(name, source=templates()[name], special_tokens=TOKENS)


def readable(messages: list[dict], parts: bool) -> list[dict]:
    """The conversation in a form that the template reads: content as text or in parts, arguments as objects."""
    found = copy.deepcopy(messages)
    for message in found:
        content = message.get("content")
        text = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        message["content"] = [{"type": "text", "text": text}] if parts else text
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return found


@dataclass
class Comparison:
    """One conversation in one template: what came of it, and why."""

    outcome: str  # equal | as it reads it | refused by both | refused by us | accepted by us | different
    reason: str = ""
    masked: bool = False  # whether a mask of transformers was compared


@dataclass
class Row:
    """One template: counts by outcome, masks compared, and the reasons of what only one side refuses."""

    name: str
    counts: Counter = field(default_factory=Counter)
    masks: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)  # {reason: conversations}


def by_transformers(
    source: str, messages: list[dict], tools: list[dict], prompt: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """(text, spans that its generation tags enclose, None without tags). Raises whatever the template raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tagged = "generation %}" in source
    texts, spans = render_jinja_template(
        [copy.deepcopy(messages)], tools=tools or None, chat_template=source, add_generation_prompt=prompt,
        return_assistant_tokens_mask=tagged, **TOKENS,
    )  # fmt: skip
    return texts[0], (spans[0] if tagged else None)


def compare(name: str, messages: list[dict], tools: list[dict]) -> Comparison:
    """One conversation rendered by both."""
    source, template = templates()[name], loaded(name)
    try:
        theirs, _ = by_transformers(source, messages, tools)
    except Exception as error:
        theirs, complaint = None, f"{type(error).__name__}: {error}"
    try:
        ours = template.render(messages, tools)
        sequences = template.sequences(messages, tools)
    except ChatError as error:
        if theirs is None:
            return Comparison("refused by both")
        return Comparison("refused by us", f"{error.reason}: {error.detail}")
    if theirs is None:
        return Comparison("accepted by us", complaint)
    outcome = "equal"
    if ours != theirs:  # they print Python's notation, JSON inside JSON or nothing: compare what the template can read
        forms = [readable(messages, parts) for parts in (False, True)]
        found = next((form for form in forms if _renders(source, form, tools, ours)), None)
        if found is None:
            return Comparison("different", "text")
        outcome, messages = "as it reads it", found
    masked = False
    for spans in sequences:
        text = "".join(part for _, part in spans)
        seen = next((n for n in range(len(messages), 0, -1) if _renders(source, messages[:n], tools, text)), None)
        if seen is None:
            if any(_answers(source, messages[:n], tools, text) for n in range(2, len(messages) + 1)):
                continue
            return Comparison("different", "a sequence is no rendering of a part of the conversation")
        allowed = by_transformers(source, messages[:seen], tools)[1]
        if allowed is not None:
            masked = True
            if not _mask_fits(spans, allowed, alone=len(sequences) == 1):
                return Comparison("different", "mask")
    return Comparison(outcome, "" if outcome == "equal" else "other forms print", masked)


def _renders(source: str, messages: list[dict], tools: list[dict], text: str) -> bool:
    """Whether a sequence is what transformers renders, but for a stop token that nothing follows."""
    try:
        theirs, _ = by_transformers(source, messages, tools)
    except Exception:
        return False
    return text == theirs or (text.startswith(theirs) and text[len(theirs) :] in ("<|user|>", "<|observation|>"))


def _answers(source: str, messages: list[dict], tools: list[dict], text: str) -> bool:
    """Whether a sequence is transformers' prompt for the last message, and that message as transformers renders it."""
    try:
        prompt = by_transformers(source, messages[:-1], tools, prompt=True)[0]
        whole = by_transformers(source, messages, tools)[0]
    except Exception:
        return False
    return messages[-1]["role"] == "assistant" and text.startswith(prompt) and whole.endswith(text[len(prompt) :])


def _mask_fits(spans: list[tuple[str, str]], allowed: list[tuple[int, int]], alone: bool) -> bool:
    """Whether the trained characters are transformers' (in one sequence of several: the last of transformers')."""
    ours, at = set(), 0
    for role, text in spans:
        if role == "assistant":
            ours.update(range(at, at + len(text)))
        at += len(text)
    theirs = {i for start, end in allowed for i in range(start, end)}
    return ours == theirs if alone else bool(ours) and ours == {i for i in theirs if i >= min(ours)}


def row(name: str) -> Row:
    """Every conversation in one template."""
    found = Row(name)
    for what, (messages, tools) in CONVERSATIONS.items():
        comparison = compare(name, messages, tools)
        found.counts[comparison.outcome] += 1
        found.masks += comparison.masked
        if comparison.reason:
            found.reasons.setdefault(f"{comparison.outcome}: {comparison.reason}", []).append(what)
    return found


KINDS = {
    "it has no place for it": "the template has no place for reasoning, transformers leaves it out",
    "set template.reasoning_field": "the template reads reasoning under another name: `template.reasoning_field` tells",
    "tool call not rendered": "the template has no place for tool calls, transformers leaves them out",
    "answer not rendered": "the template leaves out the text beside a tool call",
    "spans undetermined": "the answer does not continue its prompt: two become one, or it moves before a result",
}


def kinds(rows: list[Row]) -> dict[str, list[str]]:
    """{why we alone refuse: the conversations, once per template}; every reason has to be of a known kind."""
    found: dict[str, list[str]] = {}
    for each in rows:
        for reason, whats in each.reasons.items():
            if reason.startswith("refused by us"):
                found.setdefault(next(KINDS[key] for key in KINDS if key in reason), []).extend(whats)
    return found


def main() -> None:
    """Print the tables of docs/templates.md; with -v every reason too."""
    outcomes = ["equal", "as it reads it", "refused by both", "refused by us", "accepted by us", "different"]
    rows = [row(name) for name in templates()]
    print(f"| template | {' | '.join(outcomes)} | masks equal |")
    print("|---" * (len(outcomes) + 2) + "|")
    for each in rows:
        counts = " | ".join(str(each.counts[outcome]) for outcome in outcomes)
        print(f"| `{each.name}` | {counts} | {each.masks or '-'} |")
    total = sum((each.counts for each in rows), Counter())
    print(f"| all {len(rows)} | {' | '.join(str(total[o]) for o in outcomes)} | {sum(each.masks for each in rows)} |")
    print("\n| refused by us, because | how often | conversations |\n|---|---|---|")
    for kind, whats in sorted(kinds(rows).items(), key=lambda item: -len(item[1])):
        print(f"| {kind} | {len(whats)} | {'; '.join(sorted(set(whats)))} |")
    if "-v" in sys.argv:
        for each in rows:
            for reason, whats in each.reasons.items():
                print(f"{each.name}: {reason[:230]} ({', '.join(whats)})")


if __name__ == "__main__":
    main()
