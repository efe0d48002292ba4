"""Scorers: right, wrong and malformed answers; and prompt files that are refused with file and line."""

import json
from pathlib import Path

import pytest

from nemotron_sft.config import Heldout
from nemotron_sft.errors import UserError
from nemotron_sft.train import prompts
from nemotron_sft.train.scorers import SCORERS, calls_in, chance, problem, score

CALL = {"name": "price", "arguments": {"items": ["kettle"], "n": 2}}
TAGS = (
    "<tool_call>\n<function=price>\n<parameter=n>\n2\n</parameter>\n"
    '<parameter=items>\n["kettle"]\n</parameter>\n</function>\n</tool_call>'
)


def as_json(call):
    return f"<tool_call>{json.dumps(call)}</tool_call>"


CASES = [  # (record, right answers, wrong or malformed ones)
    ({"score": "exact", "answer": "a b "}, ["a b", " a b\n"], ["", "a  b", "a b c", "A b"]),
    ({"score": "contains", "answer": "Paris"}, ["It is paris."], ["", "Pari s"]),
    ({"score": "regex", "answer": r"^\d{4}$"}, ["1984"], ["in 1984", ""]),
    ({"score": "number", "answer": 1000}, ["3 x 5 is 1,000.", "1e3", "= 1000.0"], ["", "none", "1000 or 3", "-1000"]),
    ({"score": "number", "answer": "-0.5"}, ["-.5", "x = -0.50"], ["0.5", "5"]),
    (
        {"score": "json", "answer": {"a": [1, True], "b": None}},
        ['{"b": null, "a": [1, true]}', 'Here:\n```json\n{"a": [1, true], "b": null}\n```'],
        ["", "{", '{"a": [true, 1], "b": null}', '{"a": [1, 1], "b": null}', "[" * 5000],
    ),
    (
        {"score": "tool_call", "answer": CALL},
        [
            TAGS,
            f"Let me see. {as_json(CALL)}",
            f"<TOOLCALL>{json.dumps([CALL])}</TOOLCALL>",
            as_json({"arguments": json.dumps(CALL["arguments"]), "name": "price"}),
        ],
        ["", "price", as_json({**CALL, "name": "weight"}), as_json(CALL) * 2, TAGS.replace("2", "3"),
         "<tool_call>{</tool_call>", "<tool_call><function=price></tool_call>", as_json([1]), as_json({"name": 1}),
         f"<TOOLCALL>[{{</TOOLCALL>{TAGS[:20]}", TAGS.replace("</parameter>", "", 1)],
    ),
    ({"score": "choice", "answer": "B", "choices": ["A", "B", "AB"]}, ["B", "Not A but B."],
     ["", "AB", "A", "b"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "right", "wrong"), CASES, ids=lambda value: isinstance(value, dict) and value["score"]
)
def test_right_wrong_and_malformed_answers(record, right, wrong):
    assert problem(record) is None
    assert [answer for answer in right if not score(answer, record)] == []
    assert [answer for answer in wrong if score(answer, record)] == []


def test_every_scorer_has_cases():
    assert {record["score"] for record, _, _ in CASES} == set(SCORERS)


def test_what_cannot_be_read_is_a_call_that_equals_no_other():
    assert calls_in("<tool_call>{</tool_call>") == [("", {})]
    assert calls_in("none") == []


def test_chance_is_the_best_constant_answer_or_guessing():
    records = [{"answer": str(i % 4), "score": "exact"} for i in range(8)]
    assert chance(records) == 0.25
    assert chance([{"answer": c, "score": "choice", "choices": ["A", "B"]} for c in "ABAB"]) == 0.5


USER = [{"role": "user", "content": "q"}]
REFUSED = [
    ({"messages": USER, "answer": "a", "score": "best"}, "unknown scorer"),
    ({"messages": USER, "answer": "a", "score": ["exact"]}, "unknown scorer"),
    ({"messages": USER, "score": "exact"}, 'no "answer"'),
    ({"answer": "a"}, 'no "messages"'),
    ({"messages": USER, "answer": "", "score": "exact"}, "not empty"),
    ({"messages": USER, "answer": 5, "score": "contains"}, "must be text"),
    ({"messages": USER, "answer": "(", "score": "regex"}, "no regular expression"),
    ({"messages": USER, "answer": ".*", "score": "regex"}, "every answer matches"),
    ({"messages": USER, "answer": "ten", "score": "number"}, "no number"),
    ({"messages": USER, "answer": "A", "score": "choice"}, 'needs "choices"'),
    ({"messages": USER, "answer": "C", "score": "choice", "choices": ["A", "B"]}, "none of the"),
    ({"messages": USER, "answer": "price()", "score": "tool_call"}, "must be"),
    ({"messages": USER, "answer": {"name": "f", "arguments": "x"}, "score": "tool_call"}, "must be an object"),
    ({"messages": [{"role": "robot", "content": "q"}], "answer": "a"}, "unknown role"),
    ({"messages": [*USER, {"role": "assistant", "content": "a"}], "answer": "a"}, "nobody answers"),
    ({"messages": [], "answer": "a"}, "no messages"),
    ([1], "instead of an object"),
]


@pytest.mark.parametrize(("record", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_bad_prompt_is_refused_with_file_and_line(record, reason, tmp_path, tiny_data):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": USER, "answer": "a"}) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"prompts.jsonl:3: .*{reason}"):
        load({"p": str(file)}, tiny_data)


def load(path, data: Path):
    settings = Heldout(path=path, thinking=False, max_new_tokens=8)
    return prompts.load_prompts(settings, json.loads((data / "metadata.json").read_text()))


@pytest.mark.parametrize(("path", "reason"), [
    ("no/such.jsonl", "No such file"), ({"a/b": "x"}, "slash"), ([1], "must be a file"), ("/dev/null", "no prompts"),
])  # fmt: skip
def test_bad_paths_are_refused(path, reason, tiny_data):
    with pytest.raises(UserError, match=reason):
        load(path, tiny_data)


def test_files_keep_their_names_and_scores(tmp_path, tiny_data):
    for name, answers in (("a", "xy"), ("b", "z")):
        lines = [json.dumps({"messages": USER, "answer": answer}) for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = load({name: str(tmp_path / f"{name}.jsonl") for name in "ab"}, tiny_data)
    assert found.scores(found.right(["x", "wrong", "z"])) == {"a": 0.5, "b": 1.0}
