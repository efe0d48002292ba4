"""Every form of chat data gives the same conversation, and what has no form is refused with the fields it has."""

import json
from collections import Counter

import pytest

from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.chat import ChatError
from nemotron_sft.data.forms import Form, detect
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
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, [USER, ANSWER]),
        ({"prompt": USER, "completion": ANSWER}, [USER, ANSWER]),
        ({"prompt": "q", "completion": '[{"x": 1}]'}, [USER, {**ANSWER, "content": '[{"x": 1}]'}]),
        (
            {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]},
            [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        ),
    ],
    "prompt and answer (messages, response)": [
        ({"messages": [USER], "response": "a"}, [USER, ANSWER]),
        (
            {"messages": [SYSTEM, USER, ANSWER, USER], "response": "a"},
            [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        ),
    ],
    "prompt and answer (conversations, completion)": [
        ({"conversations": says(("human", "q")), "completion": {"role": "assistant", "content": "a"}}, [USER, ANSWER]),
    ],
    "prompt and answer (prompt, response)": [({"prompt": "q", "response": "a", "id": 7}, [USER, ANSWER])],
    "prompt and answer (question, answer)": [({"question": "q", "answer": "a"}, [USER, ANSWER])],
    "prompt and answer (input, output)": [({"input": "q", "output": "a"}, [USER, ANSWER])],
    "prompt and answer (query, response, system, history)": [
        (
            {"system": "s", "query": "q", "response": "a", "history": [["h", "i"]]},
            [SYSTEM, {"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}, USER, ANSWER],
        ),
        (
            {"system": "s", "query": "q", "response": "a", "history": json.dumps([USER, ANSWER])},
            [SYSTEM, USER, ANSWER, USER, ANSWER],
        ),
    ],
    "prompt and answer (question, context, answer)": [
        ({"question": "q", "context": "c", "answer": "a"}, [{**USER, "content": "q\n\nc"}, ANSWER]),
    ],
    "prompt and answer (question, answer, thinking)": [
        ({"question": "q", "thinking": "so it is", "answer": "a"}, [USER, {**ANSWER, "reasoning_content": "so it is"}]),
    ],
    "prompt and answer (question, response, system_prompt)": [
        ({"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, USER, ANSWER]),
    ],
    "prompt and answer (input, output, system_prompt)": [
        ({"input": [USER], "output": "a", "system_prompt": "s", "reasoning": "on"}, [SYSTEM, USER, ANSWER]),
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


OTHER_ROLES = [
    [{"role": "Human", "content": "q"}, {"role": "gpt", "content": "a"}],
    [{"role": "user ", "content": "q"}, {"role": "model", "content": "a"}],
    [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}],
    [{"from": "human", "content": "q"}, {"from": "gpt", "content": "a"}],
    [{"speaker": "user", "text": "q"}, {"speaker": "assistant", "text": "a"}],
]


@pytest.mark.parametrize("messages", OTHER_ROLES)
def test_roles_and_keys_by_other_names_also_later_in_a_file(messages):
    assert read({"messages": messages})[1] == [USER, ANSWER]
    assert read({"messages": [USER, ANSWER]})[0].conversation({"messages": messages})[0] == [USER, ANSWER]


FIRST, SECOND = ({"name": "f", "arguments": {"x": x}} for x in (1, 2))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool_call", "content": json.dumps(FIRST)}, {"role": "tool_call", "content": json.dumps(SECOND)}],
        [{"from": "function_call", "value": json.dumps([FIRST, SECOND])}],
        [{"role": "assistant", "content": ""}, {"role": "tool_call", "content": [FIRST, SECOND]}],
        [
            {
                "role": "assistant",
                "tool_calls": [{"name": "f", "input": {"x": 1}}, {"name": "f", "parameters": {"x": 2}}],
            }
        ],
        [{"role": "assistant", "tool_calls": json.dumps([{"function": FIRST}, {"function": SECOND}])}],
        [{"role": "assistant", "tool_calls": {"name": "f", "args": {"x": 1}}}, {"from": "tool_call", "value": SECOND}],
    ],
)
def test_parallel_calls_are_one_answer_with_their_arguments(messages):
    results = [{"role": "ipython", "content": "1"}, {"from": "observation", "value": "2"}]
    _, found, _ = read({"messages": [USER, *messages, *results, ANSWER]})
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"] for call in found[1]["tool_calls"]] == [FIRST, SECOND]


def test_a_call_of_another_flag_or_with_reasoning_before_it():
    call = {"role": "tool_call", "content": "<think>why</think>" + json.dumps(FIRST), "loss": False}
    _, found, _ = read({"messages": [USER, ANSWER, call]})
    assert found[1] == ANSWER and found[2]["content"] == "<think>why</think>" and found[2]["loss"] is False
    assert found[2]["tool_calls"][0]["function"] == FIRST


@pytest.mark.parametrize("nothing", ["", [], None, "[]", "null"])
def test_no_calls_in_any_form(nothing):
    assert read({"messages": [USER, {**ANSWER, "tool_calls": nothing}]})[1] == [USER, ANSWER]


def test_tools_of_a_system_message_or_another_column():
    for key in ("tools", "functions"):
        _, messages, tools = read({"messages": [{**SYSTEM, key: json.dumps([TOOL])}, USER, ANSWER]})
        assert (messages, tools) == ([SYSTEM, USER, ANSWER], [TOOL])
    assert read({"messages": [USER, ANSWER], "available_tools": [TOOL]})[2] == [TOOL]
    with pytest.raises(ChatError, match="an object without a name"):
        read({"messages": [USER, ANSWER], "tools": {"f": {"description": "d"}}})


@pytest.mark.parametrize("key", ["function_calls", "toolCalls", "reasoning_details", "thought", "channel"])
def test_what_no_template_reads_is_refused(key):
    with pytest.raises(ChatError, match=f"an answer has {key}"):
        read({"messages": [USER, {**ANSWER, key: "analysis"}]})
    assert read({"messages": [USER, {**ANSWER, key: None}]})[1][0] == USER


@pytest.mark.parametrize("role", ["environment", "tool_result", "observations"])
def test_other_names_of_results(role):
    _, found, _ = read({"messages": [*CALLED[:2], {"role": role, "content": "1"}, ANSWER]})
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant"]


def test_keys_of_tools_that_are_null_are_absent():
    empty = {"strict": None, "enum": None, "items": None}
    values = {"default": None, "const": None, "enum": ["a", None], "examples": [None]}
    schema = {"type": "object", "properties": {"x": {"type": "string", **values, **{"format": None}}}, **empty}
    tool = {"type": "function", "strict": None, "function": {**FUNCTION, "parameters": schema, "strict": None}}
    _, _, [found] = read({"messages": [USER, ANSWER], "tools": [tool]})
    kept = {"type": "object", "properties": {"x": {"type": "string", **values}}, "enum": None}
    assert found == {"type": "function", "function": {**FUNCTION, "parameters": kept}}


def test_flags_of_turns_count_without_the_system_message_of_another_field():
    turns = [False, False, False, True]
    chat = [USER, ANSWER, USER, ANSWER]
    for record, added in (
        ({"messages": chat, "system": "s"}, [False]),
        ({"messages": chat}, []),
        ({"messages": [SYSTEM, *chat], "system": "other"}, []),  # one too few: for the template to refuse
    ):
        form, messages, _ = read(record)
        assert form.aligned(turns, record, messages) == added + turns
        assert form.aligned("text", record, messages) == "text"


def test_what_is_not_read_is_named():
    assert read({"messages": [USER, {**ANSWER, "mood": "good", "weight": 1, "id": None}]})[0].unread_keys == ("mood",)
    form = read({"messages": [USER, ANSWER], "images": ["a.png"], "metadata": {}, "weight": 1, "id": 3})[0]
    assert form.unread == ("images", "id")


def test_a_part_can_be_left_out():
    record = {"query": "q", "response": "a", "history": "a note"}
    with pytest.raises(ChatError, match="history: null"):
        read(record)
    assert read(record, fields={"history": None})[1] == [USER, ANSWER]


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
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, "fields: {prompt: prompt, answer: chosen} trains"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, {}, "messages_field: chosen trains on the chosen"),
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


def test_train_turns_of_messages_that_are_none():
    form = Form("openai", (("messages", "messages"),))
    for messages in ([[{"role": "user"}], "x"], [None, None]):
        assert form.aligned([True], {}, messages) == [True]
