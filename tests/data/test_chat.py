"""Chat templates: NVIDIA's reference renderings, spans and masks, user templates, errors."""

import gzip
import json
import pickle
import re
import textwrap

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data.chat import load_template
from nemotron_sft.data.chat.messages import ChatError
from nemotron_sft.errors import UserError

NANO3_FILE = ROOT / "nemotron_sft/data/chat/templates/nano3.jinja"
VECTORS = [
    json.loads(line)
    for line in gzip.decompress((ROOT / "tests/vectors/nano3_vectors.jsonl.gz").read_bytes()).splitlines()
]
END = "<|im_end|>\n"


def joined(spans):
    return "".join(text for _, text in spans)


def trained(sequences):
    """Every trained span with the text before it: what training sees, however it is cut into sequences."""
    return {
        (joined(spans[:i]), text) for spans in sequences for i, (role, text) in enumerate(spans) if role == "assistant"
    }


# --- Nemotron 3 Nano ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [load_template("nano3"), load_template(str(NANO3_FILE))], ids=["python", "jinja"])
def test_renders_as_nvidia_does(template):
    for case in VECTORS:
        assert template.render(case["messages"], case.get("tools")) == case["expected"]["render"], case["id"]


def test_sequences_are_nvidias():
    template = load_template("nano3")
    compared = 0
    for case in VECTORS:
        if case["expected"]["sequences"] is not None:
            expected = [[(s["role"], s["content"]) for s in spans] for spans in case["expected"]["sequences"]]
            assert template.sequences(case["messages"], case.get("tools")) == expected, case["id"]
            compared += 1
    assert compared == 388


def test_what_the_reference_drops_is_trained():
    """Answers that do not continue either generation prompt: trained from where the text departs from it."""
    cases = [case for case in VECTORS if case["expected"]["sequences"] is None]
    assert len(cases) == 12
    for case in cases:
        [spans] = load_template("nano3").sequences(case["messages"], case.get("tools"))
        assert joined(spans) == case["expected"]["render"]
        answer = case["messages"][-1]["content"].strip()
        assert spans[-1] == ("assistant", answer.removeprefix("<think>\n") + END)


words = st.text("ab <>/{}'\"&\n\té数🚀\\", max_size=12) | st.sampled_from(
    ["<think>", "</think>", "<think>\nwhy\n</think>\nso", "<think></think>", "<|im_end|>\n", " x "]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(words, values, max_size=2)
calls = st.lists(
    st.builds(
        lambda a, as_text: {"function": {"name": "f", "arguments": json.dumps(a) if as_text else a}},
        arguments,
        st.booleans(),
    ),
    max_size=2,
)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | words},
    optional={"reasoning_content": st.none() | words, "tool_calls": calls},
)
others = st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "tool", "system"]), "content": words})
conversations = st.lists(others | answers, min_size=1, max_size=7)
schemas = st.dictionaries(
    words,
    st.fixed_dictionaries(
        {},
        optional={"type": values, "description": scalars, "enum": values, "items": values, "default": values},
    )
    | scalars,
    max_size=2,
)
tools = st.lists(
    st.builds(
        lambda function, wrapped: {"type": "function", "function": function} if wrapped else function,
        st.fixed_dictionaries(
            {"name": words},
            optional={
                "description": words,
                "strict": st.booleans(),
                "parameters": st.fixed_dictionaries(
                    {},
                    optional={
                        "type": words,
                        "properties": schemas,
                        "required": values,
                        "additionalProperties": values,
                    },
                ),
            },
        ),
        st.booleans(),
    ),
    max_size=2,
)


def parsed(messages):
    """Arguments as objects, the form in which a Jinja template gets them."""
    return [
        {
            **m,
            "tool_calls": [{"function": {**c["function"], "arguments": as_object(c)}} for c in m["tool_calls"]],
        }
        if m.get("tool_calls")
        else m
        for m in messages
    ]


def as_object(call):
    found = call["function"]["arguments"]
    return json.loads(found) if isinstance(found, str) else found


LOADED = {
    (name, history): load_template(name, history=history)
    for name in ("nano3", str(NANO3_FILE))
    for history in ("truncate", "keep")
}


@settings(max_examples=150, deadline=None)
@given(conversations, tools, st.sampled_from(["truncate", "keep"]))
def test_python_equals_the_jinja_file(messages, tools, history):
    python, jinja = (LOADED[name, history] for name in ("nano3", str(NANO3_FILE)))
    assert python.render(messages, tools) == jinja.render(messages, tools)
    assert trained(python.sequences(messages, tools)) == trained(jinja.sequences(messages, tools))
    for thinking in (True, False):
        prompt = python.generation_prompt(messages, tools, thinking=thinking)
        assert prompt == jinja.generation_prompt(messages, tools, thinking=thinking)
        assert prompt.endswith("<|im_start|>assistant\n" + ("<think>\n" if thinking else "<think></think>"))


@settings(max_examples=60, deadline=None)
@given(conversations, tools)
def test_the_jinja_file_in_transformers(messages, tools):
    """The file works where models are served: transformers renders it, and its generation tags, alike."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{**m, "content": m["content"] or ""} for m in parsed(messages)]
    [text], [spans] = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=NANO3_FILE.read_text(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
    )
    template = load_template("nano3", history="truncate")
    assert text == template.render(messages, tools)
    kept = [spans for spans in template.sequences(messages, tools) if joined(spans) == text]
    if len(template.sequences(messages, tools)) == 1 and kept:
        assert [text[a:b] for a, b in spans] == [t for role, t in kept[0] if role == "assistant"]


@settings(max_examples=150, deadline=None)
@given(conversations, tools)
def test_only_answers_are_trained_and_they_end(messages, tools):
    template = load_template("nano3")
    sequences = template.sequences(messages, tools)
    for spans in sequences:
        for role, text in spans:
            assert role != "assistant" or text.endswith(END)
    if not any(m.get("reasoning_content") or "think>" in (m["content"] or "") for m in messages):
        assert [joined(spans) for spans in sequences] == [template.render(messages, tools)]
        spans = [text for role, text in sequences[0] if role == "assistant"]
        answers = [m for m in messages if m["role"] == "assistant"]
        assert len(spans) == len(answers)
        for text, message in zip(spans, answers, strict=True):
            assert text.lstrip().startswith((message["content"] or "").strip())


def reasoning_chat():
    return [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "", "reasoning_content": "r2", "tool_calls": [call("f", {"x": 1})]},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "a2", "reasoning_content": "r3"},
    ]


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_reasoning_is_trained_once_and_forgotten_later():
    first, second = load_template("nano3").sequences(reasoning_chat())
    assert first[-1] == ("assistant", "r1\n</think>\na1" + END)
    assert [role for role, _ in second] == ["system", "user", "assistant", "tool", "assistant"]
    assert "r1" not in joined(second) and "<think></think>\na1" in joined(second)
    assert second[1][1].endswith("<|im_start|>assistant\n<think>\n")
    assert "r2\n</think>" in second[2][1] and second[4][1] == "r3\n</think>\na2" + END


def test_a_prompt_and_its_answer_are_a_training_sequence():
    """What a model is asked to continue at inference is exactly the context that it was trained after."""
    template, messages = load_template("nano3"), reasoning_chat()
    for end, spans in ((1, 0), (3, 1)):
        sequence = template.sequences(messages)[spans]
        assert joined(sequence).startswith(template.generation_prompt(messages[:end]))
    plain = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages[:2]]
    [sequence] = template.sequences(plain)
    assert template.generation_prompt(plain[:1], thinking=False) == joined(sequence[:-1])


def test_history_kept():
    template = load_template("nano3", history="keep")
    [spans] = template.sequences(reasoning_chat())
    assert joined(spans) == template.render(reasoning_chat())
    assert next(t for role, t in spans if role == "assistant") == "r1\n</think>\na1" + END


def test_mask_last_turn():
    chat = [
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "p"), ("assistant", "b"))
    ]
    [spans] = load_template("nano3", mask="last_turn").sequences([*chat, {"role": "user", "content": "open"}])
    assert [t for role, t in spans if role == "assistant"] == ["b" + END]
    assert ("history", "a" + END) in spans
    [spans] = load_template("nano3", mask="last_turn").sequences(reasoning_chat())
    assert [t for role, t in spans if role == "assistant"][-1] == "r3\n</think>\na2" + END


def test_mask_all_and_trained_generation_prompt():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [spans] = load_template("nano3", mask="all").sequences(chat)
    assert {role for role, _ in spans} == {"assistant"}
    [spans] = load_template("nano3", train_generation_prompt=True).sequences(chat)
    assert spans[-2:] == [("assistant", "<|im_start|>assistant\n<think></think>"), ("assistant", "a" + END)]


def test_content_in_parts_and_consecutive_answers():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts},
        {"role": "assistant"},
    ]
    [spans] = load_template("nano3").sequences(chat)
    assert [t for role, t in spans if role == "assistant"] == ["ab" + END, END]
    assert spans[-2] == ("prompt", "<|im_start|>assistant\n<think></think>")
    assert chat[0]["content"] is parts  # the input is left alone


@pytest.mark.parametrize("name", ["nano3", str(NANO3_FILE)])
def test_pickles(name):
    template = load_template(name, mask="last_turn")
    template.sequences(reasoning_chat())  # fill whatever is cached
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template and copy.digest == template.digest
    assert copy.sequences(reasoning_chat()) == template.sequences(reasoning_chat())


def test_digest_follows_source_and_options():
    digests = {
        load_template(mask=mask, history=h).digest for mask in ("assistant", "all") for h in ("truncate", "keep")
    }
    assert len(digests) == 4 and load_template().digest == load_template(thinking=False).digest


# --- user templates ----------------------------------------------------------------------------------------

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
        path.write_text(textwrap.dedent(source))
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
@settings(max_examples=40, deadline=None)
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
    chat = [*reasoning_chat()[:3], {"role": "assistant", "content": "a2", "reasoning_content": "r2"}]
    template = write(convert(FORGETFUL))
    assert [joined(spans) for spans in template.sequences(chat)] == [
        "<user>q1<end><assistant><think>r1</think>a1<end>",
        "<user>q1<end><assistant>a1<end><user>q2<end><assistant><think>r2</think>a2<end>",
    ]
    assert [[t for r, t in spans if r == "assistant"] for spans in template.sequences(chat)] == [
        ["<think>r1</think>a1<end>"],
        ["<think>r2</think>a2<end>"],
    ]


def test_nano3_file_without_markers(tmp_path):
    """Prefix comparison finds the same spans in every conversation where the reference finds any."""
    source = unmarked(NANO3_FILE.read_text())
    assert "generation %}" not in source
    path = tmp_path / "unmarked.jinja"
    path.write_text(source)
    template, reference = load_template(str(path)), load_template("nano3")
    refused = 0
    for case in VECTORS[:200]:
        chat = case["messages"], case.get("tools")
        try:
            assert trained(template.sequences(*chat)) == trained(reference.sequences(*chat)), case["id"]
        except ChatError as error:
            assert case["expected"]["sequences"] is None and error.reason == "spans undetermined"
            refused += 1
    assert refused == sum(case["expected"]["sequences"] is None for case in VECTORS[:200])


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


USER = {"role": "user", "content": "q"}


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
