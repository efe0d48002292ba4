"""The tiny dataset: reproducible, held-out prompts unseen, answers right, a tokenizer that loses nothing."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nemotron_sft.data import tiny
from nemotron_sft.data.chat import load_template

DATA = ROOT / "data/tiny"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train():
    return read("train.jsonl")


@pytest.fixture(scope="module")
def heldout():
    return read("heldout.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DATA / "tokenizer/tokenizer.json"))


def last_user(record: dict) -> str:
    return [m["content"] for m in record["messages"] if m["role"] == "user"][-1]


def test_regenerating_gives_the_committed_files(tmp_path):
    tiny.write(tmp_path)
    made = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    kept = {str(p.relative_to(DATA)): p.read_bytes() for p in DATA.rglob("*") if p.is_file()}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_another_seed_gives_other_data():
    assert tiny.generate(1)[0] != tiny.generate(2)[0]


def test_size(train):
    assert len(train) >= 2000
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 3_000_000


def test_train_covers_what_chat_data_holds(train):
    sent = [m for record in train for m in record["messages"]]
    assert all(record["messages"][0]["role"] == "system" for record in train)
    assert sum("reasoning_content" in m for m in sent) >= 100
    assert sum(1 for record in train if sum(m["role"] == "user" for m in record["messages"]) > 1) >= 1000
    calls = [call["function"] for m in sent for call in m.get("tool_calls", [])]
    assert len(calls) >= 300
    for call in calls:
        assert set(json.loads(call["arguments"])) == {"items"}  # a JSON string, as OpenAI's API returns it


def test_what_heldout_prompts_ask_is_not_in_train(train, heldout):
    """Not even with another first line (Copy:, Repeat:), and no set of letters that training sorts."""
    sent = [m for record in train for m in record["messages"]]
    asked = {m["content"] for m in sent if m["role"] == "user"}
    assert not [r for r in heldout if last_user(r) in asked]
    bodies = {text.partition("\n")[2] for text in asked} - {""}
    assert not [r for r in heldout if last_user(r).partition("\n")[2] in bodies]
    answers = {m["content"] for m in sent if m["role"] == "assistant"}
    assert not [r for r in heldout if r["task"] == "sort" and r["answer"] in answers]


def test_no_constant_answer_scores(heldout):
    assert Counter(record["answer"] for record in heldout).most_common(1)[0][1] / len(heldout) < 0.05
    for task in {record["task"] for record in heldout}:
        answers = [record["answer"] for record in heldout if record["task"] == task]
        assert len(set(answers)) >= 0.8 * len(answers)


def recomputed(record: dict) -> str:
    """The answer, worked out from the prompt's text alone."""
    user = last_user(record)
    head, *lines = user.split("\n")
    match record["task"]:
        case "copy":
            return lines[0]
        case "lookup":
            rows = dict(line.split() for line in lines[:-1])
            return "\n".join(f"{kind} {rows[kind]}" for kind in lines[-1].rstrip("?").split())
        case "sort":
            return " ".join(sorted(lines[0].split()))
        case "add":
            numbers = [int(n) for n in lines[0].split("+")]
            totals = [sum(numbers[: i + 1]) for i in range(len(numbers))]
            steps = zip(totals, numbers[1:], totals[1:], strict=False)
            return "\n".join(f"{before}+{n}={after}" for before, n, after in steps)
        case "tool_call":
            call = {"name": record["tools"][0]["function"]["name"], "arguments": {"items": [head.split(",")[0]]}}
            message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
            spans = load_template("nano3").sequences([*record["messages"], message], record["tools"])[0]
            return spans[-1][1].removesuffix("<|im_end|>\n").strip()
        case "tool_answer":
            return record["messages"][-1]["content"]
    raise AssertionError(record["task"])


def test_heldout_answers_are_right(heldout):
    assert Counter(record["task"] for record in heldout) == tiny.HELDOUT
    assert [r for r in heldout if recomputed(r) != r["answer"]] == []


def test_train_answers_are_right(train):
    """The same recomputation, on every plain turn of the training data."""
    tasks = {"Copy": "copy", "Repeat": "copy", "Look up": "lookup", "Find": "lookup"}
    tasks |= {"Sort": "sort", "Order": "sort", "Add": "add", "Sum": "add"}
    checked = Counter()
    for record in train:
        if "tools" in record:
            continue
        for user, answer in zip(record["messages"][1::2], record["messages"][2::2], strict=True):
            task = tasks[user["content"].split(":")[0]]
            want = recomputed({"task": task, "messages": [user]})
            assert answer.get("reasoning_content", answer["content"]) == want
            if "reasoning_content" in answer:
                assert answer["content"] == re.split(r"\W", want)[-1]
            checked[task] += 1
    assert min(checked.values()) >= 1000


@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single(tokenizer):
    assert tokenizer.get_vocab_size() == tiny.VOCABULARY
    for token in (*tiny.SPECIAL, *tiny.MARKERS):
        assert tokenizer.encode(f"lemon{token}lemon").tokens[1:-1] == [token]
    called = tokenizer.encode("<tool_call>lemon</tool_call><|im_end|>").ids
    assert tokenizer.decode(called) == "<tool_call>lemon</tool_call>"


def test_a_word_is_one_token(tokenizer):
    for word in (*tiny.THINGS, *tiny.KINDS, *tiny.KINDS["color"], *tiny.LETTERS, *map(str, range(100))):
        assert [len(tokenizer.encode(f"\n{word} {word}").ids)] == [3], word


def test_transformers_loads_the_tokenizer():
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(DATA / "tokenizer")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "<|im_end|>", "<unk>")
    assert loaded.eos_token_id != loaded.pad_token_id
    assert len(loaded) == tiny.VOCABULARY
