"""The built-in templates: NVIDIA's reference renderings, spans and masks, and their text as Jinja."""

import gzip
import json
import pickle

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data.chat import BUILT_IN, ChatError, load_template
from nemotron_sft.data.chat.messages import answer_of, is_empty

END = "<|im_end|>\n"
ENDS = dict.fromkeys(BUILT_IN, END) | {"nano_v2": "\n<SPECIAL_12>\n"}
NEMOTRON3 = [name for name in BUILT_IN if name != "nano_v2"]
FILES = ["nano3_vectors", "nano3_extra_vectors", *(f"{name}_vectors" for name in BUILT_IN if name != "nano3")]


def vectors(file):
    lines = gzip.decompress((ROOT / f"tests/vectors/{file}.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


def builtin(file):
    return load_template(file.removesuffix("_vectors").removesuffix("_extra"))


def as_jinja(name, **options):
    return load_template(f"{name}.jinja", source=load_template(name).source, **options)


def spans_of(sequences):
    return [[(span["role"], span["content"]) for span in spans] for spans in sequences]


def joined(spans):
    return "".join(text for _, text in spans)


def trained(sequences):
    """Every trained span with the text before it: what training sees, however it is cut into sequences."""
    return {
        (joined(spans[:i]), text) for spans in sequences for i, (role, text) in enumerate(spans) if role == "assistant"
    }


# --- against NVIDIA's own renderings -----------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_text_and_sequences_are_nvidias(file):
    template, keep = builtin(file), load_template(builtin(file).name, history="keep")
    jinja = as_jinja(template.name)
    compared = 0
    for case in vectors(file):
        chat, expected = (case["messages"], case.get("tools")), case["expected"]
        text = expected["render"] or expected["none_as_empty"]["render"]  # NVIDIA's Nano v2 fails on null content
        assert template.render(*chat) == jinja.render(*chat) == text, case["id"]
        if expected["sequences"] is not None:
            assert template.sequences(*chat) == spans_of(expected["sequences"]), case["id"]
            compared += 1
        if "render_full_history" in expected:
            assert keep.render(*chat) == expected["render_full_history"], case["id"]
        if "no_think" in expected:
            off = {"enable_thinking": False}
            assert template.render(*chat, chat_template_kwargs=off) == expected["no_think"]["render"], case["id"]
    assert compared >= 29


EFFORTS = {"low_effort": "low", "medium_effort": "medium", "reasoning_budget_256": 256}


@pytest.mark.parametrize("file", [file for file in FILES if file != "nano3_vectors"])
def test_prompts_are_nvidias(file):
    """The reference asks for an answer to the last question."""
    template = builtin(file)
    for case in vectors(file):
        last = max((i for i, m in enumerate(case["messages"]) if m["role"] == "user"), default=len(case["messages"]))
        chat = case["messages"][: last + 1], case.get("tools")
        prompts = case["expected"]["generation_prompt"]
        for thinking, key in ((True, "thinking_on"), (False, "thinking_off")):
            assert template.generation_prompt(*chat, thinking=thinking) == prompts[key], case["id"]
        for key, effort in EFFORTS.items():
            if key in prompts:
                assert template.generation_prompt(*chat, effort=effort) == prompts[key], case["id"]
        if "default" in prompts:
            assert template.generation_prompt(*chat) == prompts["default"], case["id"]


def test_what_the_reference_cannot_cut_is_trained_as_at_inference():
    """Answers that their text does not continue a prompt with: trained behind the prompt that asks for them."""
    template = load_template("nano3")
    cases = [case for case in vectors("nano3_vectors") if case["expected"]["sequences"] is None]
    assert len(cases) == 12
    for case in cases:
        [spans] = template.sequences(case["messages"], case.get("tools"))
        prompt = template.generation_prompt(case["messages"][:-1], case.get("tools"))
        answer = case["messages"][-1]["content"].strip()
        answer = answer.removeprefix("<think>\n").removeprefix("<think>")
        assert (joined(spans[:-1]), spans[-1]) == (prompt, ("assistant", answer + "<|im_end|>\n")), case["id"]


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


def plain(messages):
    """Whether no answer writes its own think tags, which a Jinja file cannot give back as the model gave them."""
    return not any("think>" in str(value) for message in messages for value in message.values())


LOADED = {
    (kind, name, history): load(name, history=history)
    for kind, load in (("python", load_template), ("jinja", as_jinja))
    for name in BUILT_IN
    for history in ("truncate", "keep")
}


@settings(max_examples=200)
@given(conversations, tools, st.sampled_from(list(BUILT_IN)), st.sampled_from(["truncate", "keep"]))
def test_python_equals_jinja(messages, tools, name, history):
    python, jinja = (LOADED[kind, name, history] for kind in ("python", "jinja"))
    assert python.render(messages, tools) == jinja.render(messages, tools)
    for thinking in (True, False):
        prompt = python.generation_prompt(messages, tools, thinking=thinking)
        assert prompt == jinja.generation_prompt(messages, tools, thinking=thinking)
    if name != "nano_v2" and plain(messages):
        assert trained(python.sequences(messages, tools)) == trained(jinja.sequences(messages, tools))


@settings(max_examples=60)
@given(conversations, tools, st.sampled_from(NEMOTRON3))
def test_jinja_in_transformers(messages, tools, name):
    """The file works where models are served: transformers renders it, and its generation tags, alike."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{**m, "content": m["content"] or ""} for m in parsed(messages)]
    template = LOADED["python", name, "truncate"]
    [text], [spans] = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=template.source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
    )
    assert text == template.render(messages, tools)
    kept = [spans for spans in template.sequences(messages, tools) if joined(spans) == text]
    if len(template.sequences(messages, tools)) == 1 and kept and plain(messages):
        assert [text[a:b] for a, b in spans] == [t for role, t in kept[0] if role == "assistant"]


EFFORT = {"nano3": {"reasoning_budget": 9}, "super3": {"low_effort": True}, "lightning35": {"medium_effort": True}}


@settings(max_examples=250)
@given(conversations, tools, st.sampled_from(list(BUILT_IN)), st.booleans())
def test_every_answer_is_trained_once_as_at_inference(messages, tools, name, effort):
    """Behind a prompt for the messages before it, to the end of the turn, whatever the conversation."""
    template, kwargs = LOADED["python", name, "truncate"], (EFFORT.get(name) if effort else None)
    try:
        sequences = template.sequences(messages, tools, chat_template_kwargs=kwargs)
    except ChatError as error:
        assert error.reason == "reasoning not rendered" and name == "nano_v2"
        return
    for spans in sequences:
        assert all(text.endswith(ENDS[name]) for role, text in spans if role == "assistant")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = trained(sequences)
    assert sum(role == "assistant" for spans in sequences for role, _ in spans) == len(answers)
    prompts = {
        template.generation_prompt(messages[:i], tools, thinking=thinking, chat_template_kwargs=kwargs)
        for i in answers
        if i
        for thinking in (True, False)
    }
    if 0 not in answers and plain(messages):  # a conversation that an answer opens has no prompt for it
        assert {before for before, _ in found} <= prompts


flags = st.sampled_from([{}, {"weight": 0}, {"weight": 1}, {"train": False}, {"training": True}, {"weight": None}])


@settings(max_examples=200)
@given(st.lists(st.tuples(others | answers, flags), min_size=1, max_size=7), st.sampled_from(list(BUILT_IN)), st.data())
def test_flags_are_obeyed(flagged, name, data):
    """What is marked is not trained, and everything else is trained as it was without any mark."""
    template = load_template(name, empty_answers="train")
    messages = [message for message, _ in flagged]
    marked = [
        {**message, **(flag if message["role"] == "assistant" or "weight" in flag else {})} for message, flag in flagged
    ]
    turns = (
        [m["role"] == "assistant" and data.draw(st.booleans()) for m in messages] if data.draw(st.booleans()) else None
    )
    off = [
        any(m.get(key) in (0, False) and m.get(key) is not None for key in ("weight", "train"))
        or (turns and not turns[i])
        for i, m in enumerate(marked)
    ]
    try:
        everything = trained(template.sequences(messages))
        found = template.sequences(marked, train_turns=turns)
    except ChatError as error:
        assert error.reason == "reasoning not rendered" and name == "nano_v2"
        return
    assert trained(found) <= everything
    wanted = sum(m["role"] == "assistant" and not off[i] for i, m in enumerate(messages))
    assert sum(role == "assistant" for spans in found for role, _ in spans) == wanted
    if wanted:
        try:
            assert trained(template.training_sequences(marked, train_turns=turns)) == trained(found)
        except ChatError as error:
            assert error.reason == ("message not rendered" if name == "nano_v2" else "bad reasoning")
    else:
        with pytest.raises(ChatError, match=r"no assistant turn|no trained answer"):
            template.training_sequences(marked, train_turns=turns)


nulls = st.lists(
    st.sampled_from(["name", "tool_calls", "weight", "reasoning_content", "thinking", "refusal"]), max_size=3
)


@settings(max_examples=200)
@given(conversations, st.lists(nulls, min_size=7, max_size=7), st.sampled_from(list(BUILT_IN)), st.booleans())
def test_null_keys_change_nothing(messages, added, name, jinja):
    template = LOADED["jinja" if jinja else "python", name, "truncate"]
    without = [{k: v for k, v in m.items() if v is not None} for m in messages]
    null = [{**dict.fromkeys(keys), "content": None, **m} for m, keys in zip(without, added, strict=False)]
    for m in null:
        if m.get("tool_calls"):
            m["tool_calls"] = [{**c, "id": None, "function": {**c["function"], "x": None}} for c in m["tool_calls"]]
    outcomes = []
    for chat in (messages, without, null):
        try:
            outcomes.append((template.render(chat), template.sequences(chat)))
        except ChatError as error:
            outcomes.append(error.reason)
    assert outcomes[0] == outcomes[1] == outcomes[2]


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


@pytest.mark.parametrize("load", [load_template, as_jinja])
@pytest.mark.parametrize("name", list(BUILT_IN))
def test_pickles(load, name):
    template = load(name, mask="last_turn")
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    template.sequences(chat)  # fill whatever is cached
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template and copy.digest == template.digest
    assert copy.sequences(chat) == template.sequences(chat)


def test_digest_follows_source_and_options():
    digests = {
        load_template(mask=mask, history=h).digest for mask in ("assistant", "all") for h in ("truncate", "keep")
    }
    assert len(digests) == 4 and load_template().digest == load_template(thinking=False).digest


# --- short cuts --------------------------------------------------------------------------------------------

tagged = st.lists(st.sampled_from(["<think>", "</think>", "a", "<", ">", " ", "\n", "\u2003", "\x1c"])).map("".join)


@given(tagged, st.booleans())
@settings(max_examples=300)
def test_an_empty_answer_is_found_by_its_ends(content, call):
    message = {"role": "assistant", "content": content} | ({"tool_calls": [{}]} if call else {})
    assert is_empty(message) == (not call and not answer_of(message))


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "developer", "tool"]), tagged), min_size=1))
@settings(max_examples=200)
def test_spans_in_brief_are_those_in_full(turns):
    """An answer with one key more goes the long way."""
    messages = [{"role": role, "content": content} for role, content in turns]
    longer = [{**message, "name": "n"} for message in messages]
    for name in NEMOTRON3:
        template = load_template(name, empty_answers="train")
        assert template.sequences(messages) == template.sequences(longer)
