"""What holds for any conversation in any template: official Jinja files with and without tags, built-in templates."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official import TOOL, answer, calls, loaded, result, user

from nemotron_sft.data.chat import BUILT_IN, ChatError, load_template

ENDS = {
    "llama3": ("<|eot_id|>",),
    "llama3_1": ("<|eot_id|>", "<|eom_id|>"),
    "qwen2_5_training": ("<|im_end|>\n", "<|im_end|>"),
    "qwen3": ("<|im_end|>\n", "<|im_end|>"),
    "qwen3_training": ("<|im_end|>\n", "<|im_end|>"),
    "gptoss": ("<|return|>", "<|end|>", "<|call|>"),
    "gptoss_training": ("<|return|>", "<|end|>", "<|call|>"),
    "glm4moe": ("<|user|>", "<|observation|>", "<|assistant|>", "<|system|>"),
    "deepseekv3_training": ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    "mistral_v7": ("</s>",),
    "phi3": ("<|end|>\n", "<|end|>\n</s>"),  # with the token that ends the conversation
    **dict.fromkeys(BUILT_IN, ("<|im_end|>\n",)),
    "nano_v2": ("\n<SPECIAL_12>\n",),
}

words = st.text("ab \n\té数🚀{}<>\"'", max_size=8).map(lambda text: f"w{text}w")
reasoning = st.fixed_dictionaries({}, optional={"reasoning_content": words, "thinking": st.none()})
flags = st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"training": True}, {"weight": None}])
plain = st.builds(lambda text, more, flag: [answer(text, **more, **flag)], words, reasoning, flags)


@st.composite
def tool_loops(draw):
    """Calls with their results, and the answer to them."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        cities = draw(st.lists(words, min_size=1, max_size=2))
        content = draw(st.sampled_from(["", None, "wLookw"]))
        more = {**draw(reasoning), **draw(flags)}
        found.append(calls(*cities, content=content, text=draw(st.booleans()), **more))
        found += [result(draw(words), number) for number in range(len(cities))]
    return found + draw(plain)


@st.composite
def conversations(draw):
    turns = [[user(draw(words)), *draw(plain | tool_loops())] for _ in range(draw(st.integers(1, 3)))]
    opening = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else draw(st.just([]) | plain)
    return opening + [message for turn in turns for message in turn]


def sequences(template, messages):
    """The sequences, or the reason to refuse the conversation."""
    try:
        return template.sequences(messages, [TOOL])
    except ChatError as error:
        return error.reason


def joined(spans):
    return "".join(text for _, text in spans)


def texts_of(template, messages):
    """Every text that a part of the conversation has: with the prompt for its next answer, and without."""
    found = set()
    for end in range(1, len(messages) + 1):
        for switch in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            for text in (template.render, template.generation_prompt):
                try:
                    found.add(text(messages[:end], [TOOL], chat_template_kwargs=switch))
                except ChatError:
                    continue
    return found


def off(message):
    return 0 in (message.get("weight"), message.get("train"))


@pytest.mark.parametrize("name", list(ENDS))
@settings(max_examples=25)
@given(conversations())
def test_properties(name, messages):
    template = load_template(name) if name in BUILT_IN else loaded(name)
    found = sequences(template, messages)
    null = [{"name": None, "refusal": None, "reasoning": None, "weight": None, **message} for message in messages]
    bare = [{key: value for key, value in message.items() if value is not None} for message in messages]
    assert sequences(template, null) == sequences(template, bare) == found
    if isinstance(found, str):
        assert found.endswith("not rendered") or found in ("template error", "spans undetermined")
        return
    texts = texts_of(template, messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    trained = [text for spans in found for role, text in spans if role == "assistant" and text]
    assert len(trained) == sum(not off(message) for message in answers)
    for spans in found:
        assert any(joined(spans).startswith(text) for text in texts)
        assert all(text.endswith(ENDS[name]) for role, text in spans if role == "assistant" and text)
    wanted = [message["content"] or "" for message in answers if not off(message)]
    assert all(any(content.strip() in text for text in trained) for content in wanted)  # in any order


def test_most_conversations_are_rendered():
    """The properties are not held by refusing: plain and tool conversations come through in every template."""
    loop = [user("w"), calls("w", content=None), result("w"), answer("w")]
    for name in ENDS:
        template = load_template(name) if name in BUILT_IN else loaded(name)
        assert not isinstance(sequences(template, [user("w"), answer("w")]), str), name
        if name not in ("llama3", "phi3"):
            assert not isinstance(sequences(template, loop), str), name
