"""Calls and results as content blocks or items give the conversation that OpenAI's form gives."""

import json
from collections import Counter

import pytest
from test_forms import read

from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.blocks import read_blocks
from nemotron_sft.data.chat import ChatError, load_template
from nemotron_sft.data.forms import detect

ARGUMENTS = {"city": "Oslo"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
TOOL = {"name": "look", "description": "See.", "parameters": {"type": "object", "properties": {}}}
OPENAI = [
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It rains."},
]


def said(role, *blocks):
    return {"role": role, "content": list(blocks)}


def text(words):
    return {"type": "text", "text": words}


ANTHROPIC = [
    {"role": "user", "content": "Oslo?"},
    said("assistant", text("Let me see."), {"type": "tool_use", "id": "c1", "name": "look", "input": ARGUMENTS}),
    said("user", {"type": "tool_result", "tool_use_id": "c1", "content": [text("rain")], "is_error": False}),
    said("assistant", text("It rains.")),
]
AI_SDK = [
    said("user", text("Oslo?")),
    said("assistant", text("Let me see."),
         {"type": "tool-call", "toolCallId": "c1", "toolName": "look", "input": ARGUMENTS}),
    said("tool", {"type": "tool-result", "toolCallId": "c1", "toolName": "look",
                  "output": {"type": "text", "value": "rain"}}),
    {"role": "assistant", "content": "It rains."},
]  # fmt: skip
BEDROCK = [
    said("user", {"text": "Oslo?"}),
    said("assistant", {"text": "Let me see."}, {"toolUse": {"toolUseId": "c1", "name": "look", "input": ARGUMENTS}}),
    said("user", {"toolResult": {"toolUseId": "c1", "content": [{"text": "rain"}], "status": "success"}}),
    said("assistant", {"text": "It rains."}),
]
GEMINI = [
    {"role": "user", "parts": [{"text": "Oslo?"}]},
    {"role": "model", "parts": [{"text": "Let me see."}, {"functionCall": {"name": "look", "args": ARGUMENTS}}]},
    {"role": "function", "parts": [{"functionResponse": {"name": "look", "response": "rain"}}]},
    {"role": "model", "parts": [{"text": "It rains."}]},
]
RESPONSES = [
    said("user", {"type": "input_text", "text": "Oslo?"}),
    {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": json.dumps(ARGUMENTS)},
    {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    {"type": "message", **said("assistant", {"type": "output_text", "text": "It rains."})},
]
AS_TEXT = [{**m, "content": json.dumps(m["content"]) if isinstance(m["content"], list) else m["content"]}
           for m in ANTHROPIC]  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ANTHROPIC},
        {"messages": AS_TEXT},
        {"messages": json.dumps(ANTHROPIC)},
        {"messages": AI_SDK},
        {"messages": BEDROCK},
        {"contents": GEMINI},
        {"messages": OPENAI[:1], "completion": ANTHROPIC[1:]},
    ],
    ids=["anthropic", "as text", "all as text", "ai sdk", "bedrock", "gemini", "pair"],
)
def test_blocks(record):
    gemini = {"system_instruction": {"parts": [text("Be kind.")]}}
    for more in ({}, {"system": "Be kind."}, {"system": [text("Be kind.")]}, gemini):
        form, messages, tools = read({**record, **more, "tools": [TOOL]})
        expected = [{"role": "system", "content": "Be kind."}] * bool(more) + OPENAI
        template = load_template("nano3")
        assert template.sequences(messages, tools) == template.sequences(expected, [TOOL])
        seen = Counter()
        form.conversation({**record, **more}, seen)
        assert seen["content blocks"] == 1 and seen["tool_calls"] == 1


def test_items_of_the_responses_api():
    _, messages, _ = read({"messages": RESPONSES})
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{**CALL, "function": {"name": "look", "arguments": json.dumps(ARGUMENTS)}}]
    template = load_template("nano3")
    assert template.sequences(messages) == template.sequences(OPENAI)


def test_what_is_said_beside_results_keeps_its_place():
    mixed = said("user", ANTHROPIC[2]["content"][0], text("And"), text(" Rome?"))
    _, messages, _ = read({"messages": [*ANTHROPIC[:2], mixed, ANTHROPIC[3]]})
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "user", "assistant"]
    assert messages[3]["content"] == [text("And"), text(" Rome?")]
    thinking = said("assistant", {"type": "thinking", "thinking": "hm"}, ANTHROPIC[1]["content"][1])
    _, messages, _ = read({"messages": [OPENAI[0], thinking]})
    assert messages[1]["content"] == [{"type": "thinking", "thinking": "hm"}] and messages[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (said("assistant", ANTHROPIC[1]["content"][1], text("so")), "says more behind a call"),
        (said("assistant", {"type": "redacted_thinking", "data": "x"}, text("a")), "part of type redacted_thinking"),
        (said("assistant", {"type": "server_tool_use", "name": "f"}), "part of type server_tool_use"),
        (said("user", {"type": "image", "source": {}}), "part of type image"),
        (said("user", {"type": "text", "text": None}), "of type text without a text"),
        (said("tool", text("x"), {"type": "image_url", "image_url": {}}), "part of type image_url"),
        (said("user"), "has no content"),
    ],
)
def test_blocks_that_no_template_has_a_place_for_are_refused(message, words):
    form = detect(Dataset(name="d", path="p"), [{"messages": OPENAI}], "messages", "tools")
    with pytest.raises(ChatError, match=words):
        messages, _ = form.conversation({"messages": [OPENAI[0], message, OPENAI[3]]})
        load_template("nano3").training_sequences(messages)


@pytest.mark.parametrize(
    "content",
    ['[{"type": "text"', '[{"x": 1}]', '[{"type": "row", "text": "a"}]', "[1]", "[]", '[{"type": "text"}, 3]'],
)
def test_other_texts_that_look_like_json_stay(content):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    assert read({"messages": messages})[1] == messages
    result = [*OPENAI[:2], {"role": "tool", "content": json.dumps([text("of MCP")])}, OPENAI[3]]
    assert read({"messages": result})[1][2] == result[2]
    rows = [*OPENAI[:2], {"role": "tool", "content": [{"text": "a"}]}, OPENAI[3]]
    assert read({"messages": rows})[1][2] == rows[2]


@pytest.mark.parametrize("kind", [["text"], {"a": 1}, None, 3])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", None, ["user"]])
def test_a_type_that_is_no_text(kind, role):
    call = {"type": "tool_use", "name": "f", "input": {}}
    assert read_blocks({"role": role, "content": [{"type": kind, "text": "Hi"}, call]})


@pytest.mark.parametrize("calls", [5, "x", {"name": "f"}])
def test_calls_beside_blocks_that_are_no_list(calls):
    with pytest.raises(ChatError):
        read_blocks({"role": "assistant", "content": [{"type": "tool_use", "name": "f"}], "tool_calls": calls})
