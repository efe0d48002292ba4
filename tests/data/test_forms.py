"""Every form of chat data gives the same conversation, and what has no form is refused with the fields it has."""

import json
from collections import Counter

import pytest

from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.chat import ChatError
from nemotron_sft.data.forms import detect
from nemotron_sft.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"y": 2}'},
    ANSWER,
]


def says(*pairs):
    """Messages in ShareGPT's form."""
    return [{"from": speaker, "value": text} for speaker, text in pairs]


def read(record, *others, messages_field="messages", tools_field="tools", **entry):
    """(form, messages, tools) of a record, by a dataset of it and others."""
    dataset = Dataset(name="d", path="p", **entry)
    form = detect(dataset, [record, *others], messages_field, tools_field)
    return form, *form.conversation(record)


FORMS = {
    "OpenAI messages (messages)": [
        ({"messages": [USER, ANSWER], "extra": 1}, [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"messages": [json.dumps(USER), json.dumps(ANSWER)]}, [USER, ANSWER]),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [USER, ANSWER]),
        ({"prompt": "q", "messages": [USER, ANSWER], "response": "a"}, [USER, ANSWER]),
        (
            {"messages": [{**USER, "weight": 0}, {**ANSWER, "train": True}]},
            [USER | {"weight": 0}, ANSWER | {"train": True}],
        ),
    ],
    "OpenAI messages (conversations)": [({"conversations": [USER, ANSWER]}, [USER, ANSWER])],
    "OpenAI messages (messages, system)": [
        ({"messages": [USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "other"}, [SYSTEM, USER, ANSWER]),
    ],
    "ShareGPT (conversations)": [
        ({"conversations": says(("human", "q"), ("gpt", "a"))}, [USER, ANSWER]),
        ({"conversations": json.dumps(says(("User", "q"), ("Assistant", "a")))}, [USER, ANSWER]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "chatgpt", "value": "a", "weight": 1},
                ]
            },
            [SYSTEM, USER, ANSWER | {"weight": 1}],
        ),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, [USER, ANSWER]),
    ],
    "ShareGPT (messages, system)": [
        ({"messages": says(("human", "q"), ("gpt", "a")), "system": "s"}, [SYSTEM, USER, ANSWER]),
    ],
    "Alpaca (instruction, output)": [({"instruction": "q", "output": "a", "text": "### q"}, [USER, ANSWER])],
    "Alpaca (instruction, input, output)": [
        ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": "with", "output": "a"}, [{**USER, "content": "q\n\nwith"}, ANSWER]),
    ],
    "Alpaca (instruction, context, response)": [
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            [{**USER, "content": "q\n\nc"}, ANSWER],
        )
    ],
    "Alpaca (instruction, input, output, system, history)": [
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["h", "i"]]},
            [SYSTEM, {"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}, USER, ANSWER],
        ),
    ],
    "prompt and answer (prompt, completion)": [
        ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        (
            {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]},
            [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        ),
    ],
    "prompt and answer (prompt, response)": [({"prompt": "q", "response": "a", "id": 7}, [USER, ANSWER])],
    "prompt and answer (question, answer)": [({"question": "q", "answer": "a"}, [USER, ANSWER])],
    "prompt and answer (input, output)": [({"input": "q", "output": "a"}, [USER, ANSWER])],
    "prompt and answer (input, output, system_prompt)": [
        ({"input": [USER], "output": "a", "system_prompt": "s", "license": "x"}, [SYSTEM, USER, ANSWER]),
    ],
}


@pytest.mark.parametrize(
    ("title", "record", "messages"), [(title, *case) for title, cases in FORMS.items() for case in cases]
)
def test_forms(title, record, messages):
    form, found, tools = read(record)
    assert (str(form), found, tools) == (title, messages, [])


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": CALLED, "tools": [TOOL]}, CALLED),
        ({"messages": CALLED, "tools": json.dumps([TOOL])}, CALLED),
        ({"messages": CALLED, "tools": [json.dumps(TOOL)]}, CALLED),
        ({"messages": CALLED, "tools": [{**TOOL, "function": json.dumps(FUNCTION)}]}, CALLED),
        (
            {
                "messages": CALLED,
                "tools": [{**TOOL, "function": {**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}}],
            },
            CALLED,
        ),
        ({"messages": [USER, {**CALLED[1], "tool_calls": json.dumps([CALL])}, *CALLED[2:]], "tools": [TOOL]}, CALLED),
        ({"messages": [USER, {**CALLED[1], "tool_calls": [json.dumps(CALL)]}, *CALLED[2:]], "tools": [TOOL]}, CALLED),
        ({"messages": [USER, {**CALLED[1], "tool_calls": [CALL["function"]]}, *CALLED[2:]], "tools": [TOOL]}, CALLED),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": CALL["function"]},
                    {"role": "function", "name": "f", "content": '{"y": 2}'},
                    {**ANSWER, "function_call": None},
                ],
                "functions": [FUNCTION],
            },
            [USER, CALLED[1], {"role": "tool", "name": "f", "content": '{"y": 2}'}, ANSWER],
        ),
        (
            {
                "conversations": says(
                    ("human", "q"),
                    ("function_call", json.dumps(CALL["function"])),
                    ("observation", '{"y": 2}'),
                    ("gpt", "a"),
                ),
                "tools": json.dumps([FUNCTION]),
            },
            CALLED,
        ),
    ],
)
def test_tools_and_calls(record, messages):
    _, found, tools = read(record)
    assert found == messages
    assert [tool.get("function", tool) for tool in tools] == [FUNCTION]


def test_arguments_keep_their_form():
    """Text or object: a template may want either."""
    for arguments in ('{"x": 1}', {"x": 1}, {"x": None}):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [USER, {**CALLED[1], "tool_calls": [call]}]
        assert read({"messages": messages})[1] == messages


@pytest.mark.parametrize(
    "odd", ["1", [], {}, [[]], [None, 3], None, "{", '{"a": 1}', [{"role": []}], {"a": [1], "b": []}]
)
def test_an_odd_record_is_a_message_for_the_template_or_an_error(odd):
    form = detect(Dataset(name="d", path="p"), [{"messages": [USER, ANSWER], "tools": [TOOL]}], "messages", "tools")
    for record in ({"messages": odd, "tools": odd}, {"messages": [USER, {**ANSWER, "tool_calls": odd}]}):
        try:
            messages, tools = form.conversation(record, Counter())
        except ChatError as error:
            assert error.reason in ("no messages", "bad messages", "bad tools", "bad tool call")
        else:
            assert isinstance(messages, list) and isinstance(tools, list)


def test_the_form_of_most_records_counts():
    form, _, _ = read(
        {"messages": []}, {"text": 1}, {"messages": [USER]}, {"messages": [USER]}, {"prompt": "q", "completion": "a"}
    )
    assert form.name == "openai"


def test_the_blend_can_say_it():
    record = {"Q": "q", "A": "a", "thoughts": "hm", "messages": [USER], "more": says(("human", "x"))}
    form, messages, _ = read(record, form="pairs", fields={"prompt": "Q", "answer": "A", "reasoning": "thoughts"})
    assert messages == [USER, {**ANSWER, "reasoning_content": "hm"}]
    assert str(form) == "prompt and answer (Q, A, thoughts)"
    assert read(record, fields={"prompt": "Q", "answer": "A"})[1] == [USER, ANSWER]
    assert read(record, fields={"prompt": "Q", "answer": "A", "input": "thoughts"})[0].name == "alpaca"
    assert read(record, messages_field="more")[0].name == "sharegpt"
    own = Dataset(name="d", path="p", messages_field="more")
    assert detect(own, [record], "messages", "tools").conversation(record)[0] == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("record", "entry", "words"),
    [
        ({"text": "long", "id": 1}, {}, "no conversations recognised in its first records, which have text, id"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, "which have prompt, chosen, rejected"),
        ({"messages": "text"}, {}, "which have messages"),
        ({"text": "x"}, {"form": "alpaca"}, "needs a field for prompt, and no record has instruction, only text"),
        ({"text": "x"}, {"form": "pairs", "fields": {"prompt": "text"}}, "needs a field for answer"),
        ({"text": "x"}, {"form": "pairs", "fields": {"question": "text"}}, "form pairs has no part question"),
        ({"messages": [USER]}, {"messages_field": "chat"}, "which have messages"),
    ],
)
def test_what_is_not_recognised_is_refused_with_its_fields(record, entry, words):
    with pytest.raises(UserError) as caught:
        read(record, **entry)
    assert words in str(caught.value) and "\n" not in str(caught.value)
