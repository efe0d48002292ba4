"""Clean data: repeated conversations are counted and left out, evaluation sets are kept out."""

import json
import random
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prep import chat, configured, expected, jsonl, records, unpacked  # noqa: F401 -- configured is a fixture

from nemotron_sft.data import decontaminate, ngrams, prep
from nemotron_sft.data import plan as plans
from nemotron_sft.errors import UserError

# --- duplicates --------------------------------------------------------------------------------------------


def thinking(row):
    row["messages"][1]["reasoning_content"] = "hm"
    return row


@pytest.mark.parametrize("unit_bytes", [400, 1 << 20])
def test_repeated_conversations_are_counted_and_left_out(configured, tmp_path, monkeypatch, unit_bytes):  # noqa: F811
    """In a file, next to each other and apart, across files and forms; in several sequences, weighted, or both."""
    monkeypatch.setattr(plans, "UNIT_BYTES", unit_bytes)
    many = thinking(chat("q", "a", "r", "b"))
    rows = [*records(5), records(1)[0], records(1)[0], many, many, chat("only here", "x")]
    jsonl(tmp_path / "a.jsonl", rows)
    other = [{"prompt": "Say 3 please.", "completion": "word word word 3"}, {"prompt": "new", "completion": "y"}]
    pq.write_table(pa.Table.from_pylist(other), tmp_path / "b.parquet")
    blend = [
        {"name": "a", "path": str(tmp_path / "a.jsonl"), "weight": 2},
        {"name": "b", "path": str(tmp_path / "b.parquet"), "weight": 1},
    ]
    kept = prep.run(configured(blend, output="kept"))
    left = prep.run(configured(blend, "dedup=true", output="left"))
    for metadata in (kept, left):
        a, b = (d["duplicates"] for d in metadata["blend"]["datasets"])
        assert a == {"count": 3, "examples": [
            {"at": f"{tmp_path}/a.jsonl:{line}", "repeats": f"{tmp_path}/a.jsonl:{first}"}
            for line, first in ((6, 1), (7, 1), (9, 8))
        ]}  # fmt: skip
        assert b == {"count": 1, "examples": [{"at": f"{tmp_path}/b.parquet:1", "repeats": f"{tmp_path}/a.jsonl:4"}]}
        html = (tmp_path / metadata["directory"] / "report.html").read_text()
        assert "a.jsonl:7" in html and ("left out" if metadata["dedup"] else "dedup=true") in html
    first_of_each = [*records(5), many, chat("only here", "x")] * 2 + [chat("new", "y")]
    assert unpacked(tmp_path / "left") == expected(first_of_each)
    assert unpacked(tmp_path / "kept") == expected(
        rows * 2 + [chat("Say 3 please.", "word word word 3"), chat("new", "y")]
    )
    for metadata in (kept, left):
        for key in ("sequences", "tokens", "trained_tokens"):
            parts = sum(part[key] for part in metadata["splits"].values())
            assert parts == sum(d[key] for d in metadata["blend"]["datasets"])
    assert [d["records_kept"] for d in left["blend"]["datasets"]] == [7, 1]
    assert left["blend"]["datasets"][1]["realised_share"] == pytest.approx(1 / 15)


def test_a_dataset_that_only_repeats_is_an_error(configured, tmp_path):  # noqa: F811
    path = str(jsonl(tmp_path / "a.jsonl", records(3)))
    blend = [{"name": "a", "path": path}, {"name": "again", "path": path}]
    assert [d["duplicates"]["count"] for d in prep.run(configured(blend))["blend"]["datasets"]] == [0, 3]
    with pytest.raises(UserError, match="dataset again: each of 3 records repeats an earlier one"):
        prep.run(configured(blend, "dedup=true"))


# --- evaluation sets ---------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "ei3", "naïve", "数", "据", "x"]), max_size=60)


def split_into_words(text):
    """Words as ngrams.py says, by a regular expression: what it finds has to be the same."""
    return re.findall(r"[㐀-鿿]|[^\W_㐀-鿿]+", text.lower())


def runs(text):
    found = split_into_words(text)
    return {tuple(found[i : i + 13]) for i in range(len(found) - 12)}


@settings(max_examples=120)
@given(st.lists(words, min_size=1, max_size=4), words, st.integers(0, 10**6), st.integers(0, 30))
def test_exactly_the_shared_runs_of_13_words_are_found(tmp_path_factory, texts, noise, seed, length):
    rng = random.Random(seed)
    blanks = [" ", "\n", ", ", " -- ", "。", "_", "\u2003"]
    texts = ["".join(word.title() + rng.choice(blanks) for word in text) for text in texts]
    path = tmp_path_factory.mktemp("eval") / "e.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*texts, "a b c d e f g h i j k l m"]))
    evaluation = decontaminate.load_evaluation([str(path)])
    taken = split_into_words(rng.choice(texts))
    start = rng.randrange(len(taken) + 1)
    text = rng.choice(blanks).join([*noise, *taken[start : start + length], *noise[::-1]])
    shared = set.union(*map(runs, texts)) & runs(text)
    detail = evaluation.shared([{"role": "user", "content": "one"}, {"role": "assistant", "content": text}])
    assert bool(detail) == bool(shared)
    if detail:
        quoted = re.match(r"shares '(.*)' with .*e\.jsonl:(\d+)$", detail)
        assert tuple(split_into_words(quoted[1])) in shared & runs(texts[int(quoted[2]) - 1])


def test_records_of_an_evaluation_set_are_left_out(configured, tmp_path):  # noqa: F811
    question = "If a train leaves at nine and drives for three hours, when does it arrive at the station?"
    system = "You are a helpful assistant that answers every question as well as it can in a few short words."
    rows = [
        *records(20),
        chat("Please: " + question.upper(), "Noon."),
        chat("A riddle", "Well.  " + question.replace(" ", "\n")),
        chat("If a train leaves at nine and drives for three hours, who", "cares"),
        {"messages": [{"role": "system", "content": system}, *chat("hello", "you")["messages"]]},
    ]
    exam = [
        {"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]},
        {"text": "Why?"},
    ]
    (tmp_path / "eval").mkdir()
    jsonl(tmp_path / "eval/exam.jsonl", exam)
    path = jsonl(tmp_path / "a.jsonl", rows)
    metadata = prep.run(configured(path, f"decontaminate=[{tmp_path}/eval]"))
    (mix,) = metadata["blend"]["datasets"]
    drop = mix["dropped"]["in an evaluation set"]
    assert (drop["count"], drop["first"]) == (2, f"{path}:21"), "and none of this counts against max_drop_ratio=0"
    assert "'if a train leaves at nine and drives for three hours, when does'" in drop["detail"]
    assert drop["detail"].endswith("exam.jsonl:1")
    assert unpacked(tmp_path / "out") == expected([*rows[:20], *rows[22:]])
    assert metadata["decontaminate"] == {
        "files": [f"{tmp_path}/eval/exam.jsonl"], "records": 2, "runs": 6, "too_short": 1
    }  # fmt: skip
    assert "exam.jsonl" in (tmp_path / "out/report.html").read_text()
    assert prep.run(configured(path, f"decontaminate=[{tmp_path}/eval]"))["unchanged"]
    jsonl(tmp_path / "eval/exam.jsonl", [{"text": "other " * 13}])
    assert unpacked(prep.run(configured(path, f"decontaminate=[{tmp_path}/eval]"))["directory"]) == expected(rows)


def test_evaluation_sets_that_cannot_be_compared(tmp_path):
    assert decontaminate.load_evaluation([]) is None
    with pytest.raises(UserError, match="no such file"):
        decontaminate.load_evaluation(["nowhere.jsonl"])
    with pytest.raises(UserError, match=r"no text of 13 words in .*short\.jsonl"):
        decontaminate.load_evaluation([str(jsonl(tmp_path / "short.jsonl", [{"text": "why not"}, {"n": 1}]))])


def test_characters_parts_of_texts_and_odd_bytes():
    kinds = ngrams.kinds()
    assert Counter(kinds.tolist())[3] == 1 and kinds[0] == 3
    assert [int(kinds[ord(c)]) for c in "aé9_ -。数ア한ａ\u0301"] == [1, 1, 1, 0, 0, 0, 0, 2, 2, 1, 1, 1]
    for text in ("", "\0", "a" * 1000, "\U00010330\U0001f600\U00020000" * 20, "\ud83d x " * 14):
        data = ngrams.joined([text])
        assert ngrams.first_shared(data, *ngrams.table(np.zeros(0, np.uint64), np.zeros(0, np.int32))) is None
        assert ngrams.hashes(data).all()
