"""Data tokenized for another model is refused: every way in which two tokenizers can read a text differently."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from nemotron_sft.data.tokens import load_tokenizer
from nemotron_sft.errors import UserError
from nemotron_sft.train import vocabulary

OURS = ROOT / "data" / "tiny" / "tokenizer"


def swap(content):
    vocab = content["model"]["vocab"]
    one, other = (next(token for token, i in vocab.items() if i == wanted) for wanted in (500, 501))
    vocab[one], vocab[other] = vocab[other], vocab[one]


def rename(content):
    content["added_tokens"][-1]["content"] = "<other>"
    content["model"]["vocab"].pop(next(t for t, i in content["model"]["vocab"].items() if i == last(content)), None)


def last(content):
    return content["added_tokens"][-1]["id"]


def reorder(content):
    content["model"]["merges"].insert(0, content["model"]["merges"].pop())


def normalise(content):
    content["normalizer"] = {"type": "Lowercase"}


def divide(content):
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}


def merge_strings(content):
    content["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]


def decorate(content):
    content["post_processor"] = None
    content["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    content["decoder"] = None


def lose(content):
    token = content["added_tokens"].pop()
    content["model"]["vocab"].pop(token["content"], None)


def check(tmp_path, change, allowed=False):
    content = json.loads((OURS / "tokenizer.json").read_bytes())
    change(content)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(OURS), backend="tokenizers")
    metadata = {"tokenizer": {"model": str(OURS), "revision": None, "digest": tokenizer.digest}}
    config = SimpleNamespace(init_from=str(tmp_path), data=SimpleNamespace(other_tokenizer=allowed))
    return vocabulary.check(config, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "2 of 2,048 ids mean something else, 500 "),
        (rename, "1 of 2,048 ids mean something else"),
        (reorder, "their merges differ"),
        (normalise, "their normaliser differ"),
        (divide, "their pre-tokenizer differ"),
    ],
)
def test_what_changes_ids_is_refused_and_can_be_allowed(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as refused:
        check(tmp_path, change)
    assert "\n" not in str(refused.value) and f"tokenizer.model={tmp_path}" in str(refused.value)
    assert message.split()[-1] in check(tmp_path, change, allowed=True)


@pytest.mark.parametrize("change", [lambda content: None, merge_strings, decorate])
def test_what_changes_no_id_passes_without_a_word(tmp_path, change):
    assert check(tmp_path, change) is None


def test_tokens_that_the_model_does_not_know_are_told(tmp_path):
    assert "1 tokens of the data are new to the model, " in check(tmp_path, lose)


def test_without_a_tokenizer_there_is_nothing_to_compare(tmp_path):
    config = SimpleNamespace(init_from="random", data=SimpleNamespace(other_tokenizer=False))
    assert vocabulary.check(config, {}) is None
    (tmp_path / "config.json").write_text("{}")
    config.init_from = str(tmp_path)
    assert vocabulary.check(config, {}) is None


def test_a_tokenizer_that_is_gone_does_not_stop_training(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((OURS / "tokenizer.json").read_bytes())
    config = SimpleNamespace(init_from=str(tmp_path), data=SimpleNamespace(other_tokenizer=False))
    gone = {"tokenizer": {"model": str(Path(tmp_path, "gone")), "revision": None, "digest": "0"}}
    assert "was not compared" in vocabulary.check(config, gone)
