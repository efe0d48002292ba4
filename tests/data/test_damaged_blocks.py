"""Content blocks whose parts have the wrong types end in a reason, not in a traceback."""

import pytest

from nemotron_sft.data.blocks import read_blocks
from nemotron_sft.data.chat import ChatError
from nemotron_sft.data.forms import Form


@pytest.mark.parametrize("kind", [["text"], {"a": 1}, None, 3])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", None, ["user"]])
def test_a_type_that_is_no_text(kind, role):
    call = {"type": "tool_use", "name": "f", "input": {}}
    assert read_blocks({"role": role, "content": [{"type": kind, "text": "Hi"}, call]})


@pytest.mark.parametrize("calls", [5, "x", {"name": "f"}])
def test_calls_beside_blocks_that_are_no_list(calls):
    with pytest.raises(ChatError):
        read_blocks({"role": "assistant", "content": [{"type": "tool_use", "name": "f"}], "tool_calls": calls})


def test_train_turns_of_messages_that_are_none():
    form = Form("openai", (("messages", "messages"),))
    for messages in ([[{"role": "user"}], "x"], [None, None]):
        assert form.aligned([True], {}, messages) == [True]
