"""The hash of a conversation: what it ignores and what it sees."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data.identity import conversation_digest

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": 2}}}
CHAT = [
    {"role": "user", "content": "null and 1"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": ""},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def shuffled(value, rng, nulls=False):
    """The same value with its keys in another order and, if asked for, null keys put in."""
    if isinstance(value, list):
        return [shuffled(item, rng, nulls) for item in value]
    if not isinstance(value, dict):
        return value
    items = [(key, item if key == "arguments" else shuffled(item, rng, nulls)) for key, item in value.items()]
    items += [(f"none{i}", None) for i in range(rng.randrange(3))] if nulls else []
    return dict(rng.sample(items, len(items)))


@given(st.integers(0, 10**9), st.booleans())
@settings(max_examples=50)
def test_order_of_keys_and_null_keys_do_not_count(seed, nulls):
    rng = random.Random(seed)
    assert conversation_digest(shuffled(CHAT, rng, nulls), shuffled(TOOLS, rng, nulls)) == conversation_digest(
        CHAT, TOOLS
    )
    texts = [CHAT[0], {"role": "assistant", "content": "null"}]
    assert conversation_digest(shuffled(texts, rng, nulls)) == conversation_digest(texts)
    assert conversation_digest(CHAT, []) == conversation_digest(CHAT, None) == conversation_digest(CHAT)


@pytest.mark.parametrize("odd", [2**70, "\ud83d", float("nan"), [[[1]]]])
def test_every_difference_counts(odd):
    variants = [
        (CHAT, None), (CHAT, TOOLS), (CHAT[:2], TOOLS), (CHAT[::-1], TOOLS), ([*CHAT, {"role": "user"}], TOOLS),
        (json.loads(json.dumps(CHAT).replace('"x": null, ', "")), TOOLS),
        (json.loads(json.dumps(CHAT).replace("null and", "null  and")), TOOLS),
        ([*CHAT, {"role": "user", "content": odd}], TOOLS), ([*CHAT, {"role": "user", "content": [odd]}], TOOLS),
    ]  # fmt: skip
    found = [conversation_digest(*variant) for variant in variants]
    assert len(set(found)) == len(variants) and all(0 <= digest < 2**64 for digest in found)
    assert found == [conversation_digest(*json.loads(json.dumps(variant))) for variant in variants]


def test_the_hash_stays():
    """It decides splits: another one would move records between training and test."""
    assert conversation_digest([{"role": "user", "content": "é"}]) == 830688700318833818
