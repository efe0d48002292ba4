"""Prompts that occur in the training data are found, and others are not."""

import json
import os
import re
from itertools import pairwise

import pytest
from conftest import ROOT

from nemotron_sft.config import Heldout
from nemotron_sft.data import packed
from nemotron_sft.data.opened import open_tokenizer
from nemotron_sft.train import overlap
from nemotron_sft.train.prompts import load_prompts


@pytest.fixture(scope="module")
def metadata(tiny_data):
    return packed.read_metadata(tiny_data)


@pytest.fixture(scope="module")
def conversations(tiny_data, metadata):
    """The training sequences as text."""
    packs, tokenizer = packed.open_packs(tiny_data / "training.npy"), open_tokenizer(metadata)
    return [
        tokenizer.decode(pack["input_ids"][low:high])
        for pack in packs
        for low, high in pairwise(pack["cu_seqlens"])
        if high > low
    ]


@pytest.fixture
def asked(tmp_path, metadata):
    """Write messages as the prompts of a file, and load them."""

    def write(*prompts, name="p"):
        lines = [json.dumps({"messages": messages, "answer": "x"}) for messages in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        path = str(tmp_path / f"{name}.jsonl")
        return load_prompts(Heldout(path={name: path}, max_new_tokens=8, thinking=False), metadata)

    return write


def user(text):
    return [{"role": "user", "content": text}]


def found(prompts, metadata, data_dir):
    """The number that the line tells."""
    (line,) = overlap.overlap(prompts, metadata, data_dir)
    return int(number[1]) if (number := re.match(r"warning: (\d+) of", line)) else 0


def test_of_the_tiny_blend_the_training_records_are_found_and_the_heldout_prompts_are_not(
    tiny_data, metadata, conversations, asked
):
    held_out = str(ROOT / "data/tiny/heldout.jsonl")
    prompts = load_prompts(Heldout(path=held_out, max_new_tokens=8, thinking=False), metadata)
    assert overlap.overlap(prompts, metadata, tiny_data) == [
        f"No prompt occurs in the training data (all {metadata['splits']['training']['packs']} packs looked at)"
    ]
    records = map(json.loads, (ROOT / "data/tiny/train.jsonl").read_text().splitlines()[:900])
    single = {record["messages"][1]["content"] for record in records if record["messages"][1]["role"] == "user"}
    single = sorted(text for text in single if len(text.split()) < 13)
    there = [any(f"<|im_start|>user\n{text}<|im_end|>" in whole for whole in conversations) for text in single]
    assert 0 < sum(there) < len(there)  # the data is a sample, and in part for validation
    assert found(asked(*map(user, single)), metadata, tiny_data) == sum(there)


def test_short_prompts_of_several_messages_have_to_follow_one_another(tiny_data, metadata, conversations, asked):
    turns = re.compile(r"user\n([^<]*)<\|im_end\|>\n<\|im_start\|>assistant\n<think></think>([^<]*)<\|im_end\|>")
    (first, answer), (second, _) = next(two for two in map(turns.findall, conversations) if len(two) == 2)
    assert found(asked([*user(first), {"role": "assistant", "content": answer}, *user(second)]), metadata, tiny_data)
    assert not found(asked([*user(first), {"role": "assistant", "content": "no"}, *user(second)]), metadata, tiny_data)
    assert not found(asked(user("!?"), user(f"{first} again")), metadata, tiny_data)


def test_thirteen_words_are_found_in_any_message_but_the_systems(tiny_data, metadata, conversations, asked):
    messages = (text for whole in conversations for text in re.findall(r"user\n([^<]*)<\|im_end\|>", whole))
    words = next(words for words in map(str.split, messages) if len(words) >= 13)
    run, shorter = "Well: " + ", ".join(words[:13]).upper() + ". Yes!", "Well: " + " ".join([*words[:12], "yes"])
    system = [{"role": "system", "content": run}, *user("Why is that so?")]
    answered = [*user("Why?"), {"role": "assistant", "content": run}, *user("Thanks")]
    assert found(asked(user(shorter), system), metadata, tiny_data) == 0
    assert found(asked(user(run), user(shorter), system, answered), metadata, tiny_data) == 2
    (line,) = overlap.overlap(asked(user(shorter), user(run), name="exam"), metadata, tiny_data)
    assert "1 of 2 exam prompt occurs" in line and "exam.jsonl:2 " in line
    assert re.sub(r"\W+", " ", " ".join(words[:13]).lower()) in re.sub(r"\W+", " ", line)


def test_what_prep_left_out_is_not_looked_for_unless_it_has_changed(tiny_data, metadata, asked):
    prompts = asked(user("Why?"))
    (path,) = prompts.paths.values()
    left_out = {**metadata, "decontaminate": {"files": [os.path.relpath(path)]}}
    os.utime(path, (0, 0))
    assert overlap.overlap(prompts, left_out, tiny_data) == []
    assert overlap.overlap(prompts, metadata, tiny_data) != []
    os.utime(path)
    assert overlap.overlap(prompts, left_out, tiny_data) != []


def test_only_so_many_tokens_are_looked_at(tiny_data, metadata, asked, monkeypatch):
    monkeypatch.setattr(overlap, "TOKENS", 3 * metadata["pack_size"] + 1)
    (line,) = overlap.overlap(asked(user("Why?")), metadata, tiny_data)
    assert f"(3 of {metadata['splits']['training']['packs']} packs looked at)" in line
    assert overlap._spread(5, 3) == [0, 2, 4] and overlap._spread(2, 9) == [0, 1]
