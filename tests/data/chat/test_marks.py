"""A template's own marks in the data are left out once, whatever the template; nothing else is."""

import pytest
from official import TOKENS, TOOL, answer, calls, result, templates, user

from nemotron_sft.data.chat import BUILT_IN, ChatError, load_template
from nemotron_sft.data.chat.marks import END, TAGS

NAMES = [*BUILT_IN, "qwen3", "qwen2_5_training", "llama3_1", "mistral_v7", "gptoss", "deepseekv3", "gemma3", "glm4moe",
         "phi3", "gemma4_v5", "cohere2"]  # fmt: skip
CHAT = [user("Oslo?"), answer("It rains."), user("Sure?"), answer("Yes. ")]


def load(name):
    return load_template(name) if name in BUILT_IN else load_template(
        name, source=templates()[name], special_tokens=TOKENS
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_end_token_in_the_text_is_not_written_twice(name):
    template = load(name)
    ends = template._marks.ends["assistant"]
    for end in ends:
        for behind in (end, f"{end}\n", f" {end}{end} \n"):
            marked = [{**m, "content": m["content"] + behind} if m["role"] == "assistant" else m for m in CHAT]
            bare, found = template.unmarked(marked)
            assert found == {END} and [m["content"].rstrip() for m in bare] == [m["content"].rstrip() for m in CHAT]
            assert "".join(text for text in map(str, template.sequences(bare))).count(end * 2) == 0
    assert template.unmarked(CHAT) == (CHAT, set())
    inside = [CHAT[0], answer(f"The token {ends[0]} ends a turn.")]
    assert template.unmarked(inside) == (inside, set())


@pytest.mark.parametrize("name", ["nano3", "super3", "lightning35", "qwen3", "qwen2_5_training"])
def test_a_result_in_its_tags_is_not_wrapped_again(name):
    template = load(name)
    tools = [user("Oslo?"), calls("Oslo"), result('{"sky": "rain"}'), answer("It rains.")]
    plain = template.sequences(tools, [TOOL])
    for text in (
        '<tool_response>\n{"sky": "rain"}\n</tool_response>',
        '<tool_response>{"sky": "rain"}</tool_response>\n',
    ):
        bare, found = template.unmarked([*tools[:2], result(text), tools[3]])
        assert found == {TAGS} and template.sequences(bare, [TOOL]) == plain
    several = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>"
    bare, _ = template.unmarked([*tools[:2], result(several), tools[3]])
    two = template.sequences([*tools[:2], result("rain"), result("sun", 1), tools[3]], [TOOL])
    assert template.sequences(bare, [TOOL]) == two
    for text in ("<tool_response>", "</tool_response>", "see <tool_response>x</tool_response>", ""):
        assert template.unmarked([tools[0], result(text)])[1] == set()


def test_other_tags_stay():
    """A template that does not write these tags needs them in the data, as its system message tells the model."""
    wrapped = [user("Oslo?"), result("<tool_response>\nrain\n</tool_response>")]
    for name in ("llama3_1", "deepseekv3", "nano_v2"):
        assert load(name).unmarked(wrapped) == (wrapped, set())
    assert load("nano3").unmarked(odd := [None, {"role": [], "content": "x\n"}, {"content": 3}]) == (odd, set())


LEFT_OUT = {
    "qwen3": [{"role": "developer", "content": "Answer in one word."}, *CHAT],
    "deepseekv3": [{"role": "developer", "content": "Answer in one word."}, *CHAT],
    "gptoss": [*CHAT[:2], {"role": "system", "content": "Answer in one word."}, *CHAT[2:]],
    "nano_v2": [*CHAT[:2], {"role": "system", "content": "Answer in one word."}, *CHAT[2:]],
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_a_message_that_a_template_leaves_out_is_refused(name):
    chat = LEFT_OUT[name]
    with pytest.raises(ChatError, match=r"leaves it out|leaves out 'Answer in one word") as caught:
        load(name).training_sequences(chat)
    assert caught.value.reason == "message not rendered"
    blank = [{**m, "content": " "} if m["role"] in ("developer", "system") else m for m in chat]
    assert load(name).training_sequences(blank)
    after = [*CHAT, {"role": "developer", "content": "Answer in one word."}]  # no answer depends on it
    assert name in ("nano_v2", "gptoss") or load(name).training_sequences(after)
    assert load("nano3").training_sequences(chat)
