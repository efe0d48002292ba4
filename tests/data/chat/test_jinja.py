"""Jinja templates of users: spans with generation tags and without, histories that change, forms of messages."""

import gzip
import json
import pickle
import re

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data.chat import ChatError, load_template
from nemotron_sft.errors import UserError


def joined(spans):
    return "".join(text for _, text in spans)


def trained(sequences):
    """Every trained span with the text before it: what training sees, however it is cut into sequences."""
    return {
        (joined(spans[:i]), text) for spans in sequences for i, (role, text) in enumerate(spans) if role == "assistant"
    }


def answers(sequences):
    """The trained text of every sequence."""
    return [[text for role, text in spans if role == "assistant"] for spans in sequences]


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


VECTORS = [
    json.loads(line)
    for line in gzip.decompress((ROOT / "tests/vectors/nano3_vectors.jsonl.gz").read_bytes()).splitlines()
]
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
THINKING = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2", "reasoning_content": "r2"},
]

# --- spans ----------------------------------------------------------------------------------------

CHATML = """\
{%- for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
{%- generation %}{{ m.content }}<|im_end|>
{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""

# Drops the reasoning of earlier turns and gives only the newest answer a think block, as Qwen3 does.
FORGETFUL = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<' ~ m.role ~ '>' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}
            {%- if loop.index0 > ns.last %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}
            {{- m.content ~ '<end>' }}
        {%- endgeneration %}
    {%- else %}
        {{- m.content ~ '<end>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}
"""


def unmarked(source):
    return re.sub(
        r"\{%(-?) (end)?generation (-?)%\}",
        lambda m: "{%" + m[1] + (" endif " if m[2] else " if true ") + m[3] + "%}",
        source,
    )


@pytest.fixture
def write(tmp_path):
    def write(source, **options):
        path = tmp_path / f"{abs(hash(source))}.jinja"
        path.write_text(source)
        return load_template(str(path), **options)

    return write


plain_turns = st.lists(
    st.tuples(
        st.text("ab \n<é", max_size=6),
        st.lists(st.text("xy \n>", min_size=1, max_size=6), min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=4,
).map(
    lambda turns: [
        {"role": role, "content": text}
        for question, answers in turns
        for role, text in [("user", question), *(("assistant", answer) for answer in answers)]
    ]
)


@pytest.mark.parametrize("mask", ["assistant", "last_turn"])
@settings(max_examples=40)
@given(messages=plain_turns)
def test_markers_and_prefixes_agree(tmp_path_factory, mask, messages):
    folder = tmp_path_factory.getbasetemp()
    found = []
    for name, source in (("marked", CHATML), ("unmarked", unmarked(CHATML))):
        (folder / f"{name}.jinja").write_text(source)
        template = load_template(str(folder / f"{name}.jinja"), mask=mask)
        sequences = template.sequences(messages)
        assert [joined(spans) for spans in sequences] == [template.render(messages)]
        found.append(trained(sequences))
    assert found[0] == found[1]
    answers = sum(message["role"] == "assistant" for message in messages)
    assert mask == "last_turn" or len(found[0]) == answers


@pytest.mark.parametrize("convert", [str, unmarked], ids=["marked", "unmarked"])
def test_a_template_that_forgets_gives_one_sequence_per_turn(write, convert):
    chat = [*THINKING[:3], {"role": "assistant", "content": "a2", "reasoning_content": "r2"}]
    template = write(convert(FORGETFUL))
    assert [joined(spans) for spans in template.sequences(chat)] == [
        "<user>q1<end><assistant><think>r1</think>a1<end>",
        "<user>q1<end><assistant>a1<end><user>q2<end><assistant><think>r2</think>a2<end>",
    ]
    assert [[t for r, t in spans if r == "assistant"] for spans in template.sequences(chat)] == [
        ["<think>r1</think>a1<end>"],
        ["<think>r2</think>a2<end>"],
    ]


def test_nano3_without_tags():
    """Prefix comparison finds the same spans, wherever an answer continues a prompt."""
    reference = load_template("nano3")
    template = load_template("unmarked.jinja", source=unmarked(reference.source))
    assert not template._marked
    for case in VECTORS[:200]:
        if case["expected"]["sequences"] is not None:
            chat = case["messages"], case.get("tools")
            assert trained(template.sequences(*chat)) == trained(reference.sequences(*chat)), case["id"]


def test_refused_when_spans_cannot_be_determined(write):
    numbered = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(ChatError, match="differently") as caught:
        write(numbered).sequences([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    assert caught.value.reason == "spans undetermined"


def test_raise_exception_is_a_reason_to_drop(write):
    with pytest.raises(ChatError, match="roles must alternate") as caught:
        write("{{ raise_exception('roles must alternate') }}").render([{"role": "user", "content": "q"}])
    assert caught.value.reason == "template error"


def test_special_tokens(write):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="bos_token"):
        write(source)
    template = write(source, special_tokens={"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "q"}]) == "<s>q"


def test_trained_generation_prompt_of_a_user_template(write):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [spans] = write(unmarked(CHATML), train_generation_prompt=True).sequences(chat)
    assert spans[-1] == ("assistant", "<|im_start|>assistant\na<|im_end|>\n")
    with pytest.raises(UserError, match="generation tags"):
        write(CHATML, train_generation_prompt=True)


# --- errors ------------------------------------------------------------------------------------------------


def test_broken_template_names_file_and_line(tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(UserError, match=r"broken\.jinja:2: not a valid Jinja template"):
        load_template(str(path))
    path.write_text("{% generation %}\n")
    with pytest.raises(UserError, match=r"broken\.jinja:\d: .*endgeneration"):
        load_template(str(path))


def test_unknown_template_and_options():
    with pytest.raises(UserError, match=r"template\.name=nano4"):
        load_template("nano4")
    with pytest.raises(UserError, match="last_turn"):
        load_template(mask="lastturn")
    with pytest.raises(UserError, match=r"template\.histry: did you mean template\.history"):
        load_template(histry="keep")


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (None, None, "no messages"),
        ([], None, "no messages"),
        ("text", None, "no messages"),
        (["text"], None, "bad message"),
        ([{"content": "q"}], None, "unknown role"),
        ([{"role": "bot", "content": "q"}], None, "unknown role"),
        ([{"role": ["user"], "content": "q"}], None, "unknown role"),
        ([{"role": "user", "content": 3}], None, "bad content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], None, "bad content"),
        ([USER, {"role": "assistant", "tool_calls": {"name": "f"}}], None, "bad tool call"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], None, "bad tool call"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "{x")]}], None, "bad tool arguments"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "[1]")]}], None, "bad tool arguments"),
        ([USER, {"role": "assistant", "content": "a"}], [3], "bad tools"),
        ([USER, ANSWER], [{"inputSchema": {}}], "bad tools"),
        ([{"role": "user", "content": None}, ANSWER], None, "no content"),
        ([{"role": "user"}, ANSWER], None, "no content"),
        ([{"role": "system", "content": None}, USER, ANSWER], None, "no content"),
        ([USER, {**ANSWER, "reasoning": ["r"]}], None, "bad reasoning"),
        ([USER, {**ANSWER, "reasoning": "r", "thinking": "s"}], None, "bad reasoning"),
        ([USER, {**ANSWER, "weight": 0.5}], None, "bad training flag"),
        ([USER, {**ANSWER, "weight": "0"}], None, "bad training flag"),
        ([USER, {**ANSWER, "train": [0]}], None, "bad training flag"),
        ([{**USER, "train": True}, ANSWER], None, "bad training flag"),
        ([USER, {**ANSWER, "train_detail": []}], None, "bad training flag"),
        ([USER, {**ANSWER, "weight": 0}], None, "no trained answer"),
        ([USER], None, "no assistant turn"),
    ],
)
def test_unusable_conversations_have_a_reason(messages, tools, reason):
    with pytest.raises(ChatError) as caught:
        load_template("nano3").training_sequences(messages, tools)
    assert caught.value.reason == reason
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_empty_tool_arguments_are_no_arguments():
    for empty in ("", None, {}, "{}"):
        chat = [USER, {"role": "assistant", "content": "", "tool_calls": [call("f", empty)]}]
        assert "<function=f>\n</function>" in load_template("nano3").render(chat)
