"""Damaged records: whatever is done to a valid one, it is read, dropped with a reason, or refused in one line."""

import copy
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prep import configured  # noqa: F401 -- a fixture

from nemotron_sft.console import visible
from nemotron_sft.data import prep
from nemotron_sft.errors import UserError

USER, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A fine day."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "sky", "n": [1, 2]}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "See.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "enum": ["sky"]}}, "required": ["at"]}}}  # fmt: skip
VALID = {
    "messages": [
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER], "weight": 0.5},
        {"messages": [USER, {**ANSWER, "reasoning_content": "Look."}, USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "content": "blue", "tool_call_id": "c1"}, ANSWER], "tools": [TOOL],
         "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER],
         "metadata": {"train_turns": [False, True]}},
        {"messages": json.dumps([USER, ANSWER]), "tools": json.dumps([TOOL])},
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "look", "arguments": "{}"}},
                      {"role": "function", "name": "look", "content": "x"}, ANSWER], "functions": [TOOL["function"]]},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Be brief."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "look"}'},
                           {"from": "observation", "value": "x"}, {"from": "gpt", "value": "Ho"}]},
    ],
    "alpaca": [{"instruction": "Say", "input": "x", "output": "y", "history": [["a", "b"]], "system": "s"}],
    "pairs": [{"prompt": "Say", "completion": "y"}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}],
}  # fmt: skip
ODD = [None, True, False, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", " ", "text", "\ud83d", "\x00\x1b[2J",
       "<|im_end|>", "<think>", "</think>", "null", "[", "{}", '{"role": "user"}', "\u202e\ufeff", "é" * 3000,
       "1" * 5000, [], {}, [[]], [None], ["x"], [{}], {"role": "user"}, {"": ""}, "@deep@", "@deeper@",
       {"a": "@deep@"}]  # fmt: skip
DEEP = {'"@deep@"': "[" * 300 + "]" * 300, '"@deeper@"': '{"a":' * 5000 + "1" + "}" * 5000}


def places(value):
    """(container, key) of everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


def mutated(record, rng):
    """The record as a line, damaged in one to three ways."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        where = list(places(record))
        if not where:
            break
        container, key = rng.choice(where)
        value, how = container[key], rng.randrange(8)
        if how < 3:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif how == 3:
            del container[key]
        elif how == 4:
            container[key] = rng.choice([[value], {"x": value}, [value] * 3, {"content": value}])
        elif how == 5:
            container[key] = json.dumps(value)
        elif how == 6 and isinstance(container, dict):
            container[rng.choice(["role", "content", "Role", "\ud800", "tool_calls", "x" * 200, ""])] = container.pop(
                key
            )
        elif isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(value))
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5)
    for mark, text in DEEP.items():
        line = line.replace(mark, text)
    line = bytearray(line.encode("utf-8", "surrogatepass").replace(b"\n", b" "))
    if rng.random() < 0.15:
        for _ in range(rng.randint(1, 4)):
            line[rng.randrange(len(line))] = rng.choice([0, 0xFF, 0xC3, ord('"'), ord("{"), ord("]"), ord("\\")])
        line = line[: rng.randint(1, len(line))].replace(b"\n", b" ")
    return bytes(line)


def one_by_one(configured, tmp_path, form, lines, overrides):  # noqa: F811
    """Read every line as a dataset of its own, whose form is found: what comes of each, "read" or the error."""
    found = []
    for line in lines:
        (tmp_path / "one.jsonl").write_bytes(line + b"\n")
        try:
            prep.run(configured(tmp_path / "one.jsonl", *overrides, "force=true", output="one"))
            found.append("read")
        except UserError as error:
            found.append(visible(str(error)))  # as it is printed
    return found


def fuzz(configured, tmp_path, seed, count, overrides=()):  # noqa: F811
    """`count` damaged records of every form, all in one file of each kind, must all be accounted for."""
    rng = random.Random(seed)
    for number, (form, valid) in enumerate(VALID.items()):
        lines = [mutated(rng.choice(valid), rng) for _ in range(count)]
        good = [json.dumps(record).encode() for record in valid] * 2
        data = b"\n".join([*good, *lines]) + b"\n"
        path = tmp_path / f"{form}.jsonl{'.gz' if number % 2 else ''}"
        path.write_bytes(gzip.compress(data) if number % 2 else data)
        settings = ("max_drop_ratio=1", "pack_size=1024", *overrides)
        metadata = prep.run(configured(path, *settings, output=f"out-{path.name}"))
        (mix,) = metadata["blend"]["datasets"]
        blank = sum(not line.strip() for line in lines)
        assert mix["records_read"] == len(good) + count - blank
        assert mix["records_kept"] >= len(good)
        before_tokens = ("no trained token", "longer than pack_size", "no trained token within pack_size")
        drops = {reason: drop for reason, drop in mix["dropped"].items() if reason not in before_tokens}
        assert mix["records_read"] == mix["records_kept"] + sum(drop["count"] for drop in drops.values())
        for reason, drop in mix["dropped"].items():
            text = f"{reason} {drop['first']} {drop['detail']}"
            assert len(text) < 800 and "\n" not in text and text.encode()
        assert Path(metadata["directory"], "report.html").is_file()
        few = lines[: max(1, count // 50)]
        for result in one_by_one(configured, tmp_path, form, few, overrides):
            assert "\n" not in result and (result == "read" or 10 < len(result) < 900)
            result.encode()
    texts = pa.array([json.dumps(json.loads(line)) for line in good])  # the JSON type, damaged as text
    texts = pa.array([*texts.to_pylist(), *(line.decode("utf-8", "replace") for line in lines)])
    column = pa.ExtensionArray.from_storage(pa.json_(), texts)
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError):
        prep.run(configured(tmp_path / "a.parquet", *overrides, output="parquet"))


def test_damaged_records(configured, tmp_path):  # noqa: F811
    fuzz(configured, tmp_path, seed=1, count=40)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["nano3", "jinja"])
def test_two_thousand_damaged_records(configured, tmp_path, template):  # noqa: F811
    source = tmp_path / "chat.jinja"
    source.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    overrides = ["template=file", f"template.name={source}"] if template == "jinja" else []
    fuzz(configured, tmp_path, seed=20 if overrides else 10, count=500, overrides=overrides)
