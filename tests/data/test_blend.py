"""Blend files: what is accepted, what is refused, and with which words."""

import json

import pytest

from nemotron_sft import config
from nemotron_sft.data.blend import Dataset, load_blend
from nemotron_sft.errors import UserError


def blend_file(tmp_path, content, name="mix.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return config.Blend(name=None, path=str(path), datasets=[])


def test_seed_format(tmp_path):
    entries = [
        {"name": "a", "path": "a.jsonl", "split": "train", "weight": 2},
        {"name": "b", "path": "hf://org/b", "subset": "s", "revision": "v1", "filter": {"used_in": "x"}},
    ]
    entries[1]["_note"] = "a comment"
    name, datasets, _ = load_blend(blend_file(tmp_path, {"_comment": "two", "datasets": entries}))
    assert name == "mix"
    assert datasets == [
        Dataset("a", "a.jsonl", split="train", weight=2),
        Dataset("b", "hf://org/b", subset="s", revision="v1", filter={"used_in": "x"}),
    ]


def test_yaml_and_used_in_for_short(tmp_path):
    text = "datasets:\n- name: a\n  path: x\n  used_in: nano_v3\n  filter: {lang: en}\n"
    (dataset,) = load_blend(blend_file(tmp_path, text, "mix.yaml"))[1]
    assert dataset.filter == {"lang": "en", "used_in": "nano_v3"} and dataset.weight == 1


def test_filter_is_membership_in_lists_and_equality_otherwise():
    dataset = Dataset("a", "x", filter={"used_in": "nano_v3", "lang": "en"})
    assert dataset.keeps({"used_in": ["super_v3", "nano_v3"], "lang": "en"})
    assert dataset.keeps({"used_in": "nano_v3", "lang": "en"})
    assert not dataset.keeps({"used_in": ["super_v3"], "lang": "en"})
    assert not dataset.keeps({"used_in": "nano_v30", "lang": "en"})
    assert not dataset.keeps({"lang": "en"})
    assert not dataset.keeps({"used_in": ["nano_v3"], "lang": "de"})


def test_weight_zero_leaves_a_data_set_out(tmp_path):
    entries = [{"name": "a", "path": "x", "weight": 0}, {"name": "b", "path": "y"}]
    assert [d.name for d in load_blend(blend_file(tmp_path, {"datasets": entries}))[1]] == ["b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{not json: [", ":1: not JSON"),
        ({"data": []}, "no datasets"),
        ({"datasets": []}, "no datasets"),
        ({"datasets": ["x"]}, "expected name, path"),
        ({"datasets": [{"path": "x"}]}, "datasets[0]: name is missing"),
        ({"datasets": [{"name": "a", "path": "x", "weigth": 1}]}, "did you mean"),
        ({"datasets": [{"name": "a", "path": "x", "weight": "1"}]}, "weight must be a number"),
        ({"datasets": [{"name": "a", "path": "x", "weight": True}]}, "weight must be a number"),
        ({"datasets": [{"name": "a", "path": "x", "weight": -1}]}, "number of passes"),
        ({"datasets": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "two datasets are named a"),
    ],
)
def test_refused(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        load_blend(blend_file(tmp_path, content))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(UserError, match=r"no blend file nowhere/mix\.json"):
        load_blend(config.Blend(name=None, path="nowhere/mix.json", datasets=[]))
