"""Kinds of conversations that public reports say are trained wrongly: each in several variants, built-in and Jinja."""

import pytest

from nemotron_sft.data.chat import BUILT_IN, ChatError, load_template, per_record

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "call00001", "name": "get"}
END = "<|im_end|>\n"


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def calling(arguments, content="", **more):
    call = {"id": "call00001", "type": "function", "function": {"name": "get", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def trained(template, *chat, **record):
    """The trained texts of every sequence."""
    return [
        [text for role, text in spans if role == "assistant"] for spans in template.training_sequences(*chat, **record)
    ]


def texts(template, *chat, **record):
    return ["".join(text for _, text in spans) for spans in template.training_sequences(*chat, **record)]


def jinja(body, before="", marked=False, **options):
    """A ChatML template whose answers are `body`."""
    opens, closes = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    source = (
        before
        + "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
        + opens + body + "{{- '<|im_end|>\n' -}}" + closes
        + "{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )  # fmt: skip
    return load_template("test.jinja", source=source, **options)


both = pytest.mark.parametrize("marked", [True, False], ids=["tags", "prefixes"])


# --- what a record says about training ---------------------------------------------------------------------


@pytest.mark.parametrize("load", [lambda: load_template("nano3"), lambda: jinja("{{ m.content }}"),
                                  lambda: jinja("{{ m.content }}", marked=True)])  # fmt: skip
@pytest.mark.parametrize(
    "flags",
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {"training": True, "weight": 1}),
        ({"trainable": 0}, {"loss": 1}),
        ({"loss": False}, {"weight": None}),
        ({"weight": 1, "train": False}, {}),
    ],
)
def test_answers_that_are_not_to_be_trained_stay_as_context(load, flags):
    chat = [user("q1"), answer("WRONG", **flags[0]), user("q2"), answer("good", **flags[1])]
    assert trained(load(), chat) == [["good" + END]]
    assert "WRONG" in texts(load(), chat)[0]
    assert trained(load(), [*chat[:2], user("q2"), answer("a"), user("q3"), answer("b")]) == [["a" + END, "b" + END]]


@pytest.mark.parametrize(
    "record",
    [
        {"train_turns": [False, False, False, True]},
        {"metadata": {"train_turns": [0, 0, 0, 1], "source": "x"}},
        {"metadata": '{"train_turns": [false, false, false, true]}'},
        {"metadata": {"train_turns": None}, "train_turns": [False, False, False, True]},
        {"loss_mask": [0, 0, 0, 1], "mask": "User"},
        {"loss_mask": [0, 0, 0, 1], "train_turns": [False, False, False, True]},
        {"weights": [0, 0, 0, 1.0], "train": True},
        {"train_turns": "[false, false, false, true]"},
        {"metadata": {"train_turns": "[false, false, false, true]"}},
    ],
)
def test_train_turns(record):
    chat = [user("q1"), answer("earlier"), user("q2"), answer("final")]
    assert trained(load_template("nano3"), chat, **per_record(record)) == [["final" + END]]


@pytest.mark.parametrize(
    "record",
    [
        {"train_turns": [True]},
        {"train_turns": "yes"},
        {"train_turns": [False, False, False, "true"]},
        {"train_turns": [True, False, False, True]},  # asks to train a question
        {"metadata": {"train_turns": {}}},
        {"metadata": '{"train_turns": ['},
        {"loss_mask": [0, 1]},  # per answer
        {"loss_mask": [0, 0, 0, 1], "train_turns": [0, 1, 0, 1]},
        {"weights": [0, 0, 0, 0.5]},
        {"mask": "Assistant"},
        {"mask": [0, 0, 0, 1]},
    ],
)
def test_train_turns_that_cannot_be_obeyed_are_refused(record):
    chat = [user("q1"), answer("earlier"), user("q2"), answer("final")]
    with pytest.raises(ChatError) as caught:
        load_template("nano3").training_sequences(chat, **per_record(record))
    assert caught.value.reason in ("bad training flag", "bad metadata")


@pytest.mark.parametrize("key", ["train", "training", "trainable"])
def test_a_record_that_is_not_to_be_trained(key):
    for value in (False, 0):
        with pytest.raises(ChatError, match=f'"filter": {{"{key}": true}}'):
            per_record({key: value})
    for value in (True, 1, None, "2024", "", [], 0.5):
        assert per_record({key: value}) == {}


@pytest.mark.parametrize("metadata", [None, "free text", '{"source": "x"', {"source": "x"}, [], 3])
def test_other_metadata_is_no_ones_business(metadata):
    assert per_record({"metadata": metadata, "messages": []}) == {}


def test_flags_and_a_mask_that_trains_everything_contradict():
    with pytest.raises(ChatError, match="mask=all"):
        load_template("nano3", mask="all").training_sequences([USER, {**ANSWER, "weight": 0}, USER, ANSWER])
    chat = [user("q1"), answer("a"), user("q2"), answer("b"), answer("c", weight=0)]
    assert trained(load_template("nano3", mask="last_turn"), chat) == [["b" + END]]


THINK = (
    "{{- '<|im_start|>system\nTHINK ' + ('ON' if enable_thinking is defined and enable_thinking else 'OFF') + '\n' -}}"
)


@both
@pytest.mark.parametrize(
    ("options", "record", "shown"),
    [
        ({}, {}, "OFF"),  # undefined, as in transformers
        ({}, {"enable_thinking": False}, "OFF"),
        ({}, {"enable_thinking": True}, "ON"),
        ({"thinking": True}, {}, "ON"),
        ({"thinking": True}, {"enable_thinking": False}, "OFF"),
        ({"kwargs": {"enable_thinking": True}}, {}, "ON"),
        ({"kwargs": {"enable_thinking": True}}, {"enable_thinking": False}, "OFF"),
    ],
)
def test_a_records_own_variables_reach_the_trained_text(marked, options, record, shown):
    template = jinja("{{ m.content }}", THINK, marked, **options)
    for given in (record, str(record).replace("'", '"').lower()):  # Parquet may hold them as JSON text
        [text] = texts(template, [USER, ANSWER], **per_record({"chat_template_kwargs": given}))
        assert f"THINK {shown}\n" in text


def test_variables_of_the_built_in_templates():
    chat = [user("q1"), answer("a1", reasoning_content="r1"), user("q2"), answer("a2", reasoning_content="r2")]
    kept = texts(load_template("nano3"), chat, chat_template_kwargs={"truncate_history_thinking": False})
    assert kept == [load_template("nano3", history="keep").render(chat)]
    low = texts(load_template("super3"), chat, chat_template_kwargs={"low_effort": True})
    assert [text.count("{reasoning effort: low}") for text in low] == [1, 1] and "q1\n\n{reasoning" in low[0]
    for kwargs in ({"low_effort": True}, {"enable_thinking": "no"}, {"nothing": 1}, "[]", [1]):
        with pytest.raises(ChatError) as caught:
            load_template("nano3").training_sequences(chat, **per_record({"chat_template_kwargs": kwargs}))
        assert caught.value.reason == "bad chat_template_kwargs"


# --- contents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BUILT_IN, "jinja"])
@pytest.mark.parametrize(
    "message",
    [
        answer(None),
        answer(""),
        answer("  \n"),
        answer("", refusal="I cannot."),
        answer(None, tool_calls=[]),
        answer(None, reasoning_content="cut off in the mid"),
        answer("<think>\ncut off"),
        answer("<think>all there is</think>\n"),
        answer([{"type": "text", "text": " "}]),
        answer([{"type": "thinking", "thinking": "r"}]),
        {"role": "assistant"},
    ],
)
def test_empty_answers(name, message):
    template = jinja("{{ m.content or '' }}") if name == "jinja" else load_template(name)
    with pytest.raises(ChatError, match="empty_answers=train") as caught:
        template.training_sequences([USER, message])
    assert caught.value.reason == "empty answer"
    with pytest.raises(ChatError):  # wherever it stands
        template.training_sequences([USER, message, USER, ANSWER])
    context = [USER, {**message, "weight": 0}, USER, ANSWER]  # what is not trained may be empty
    if name != "nano_v2" and name != "jinja":
        assert trained(template, context)[-1] == ["a" + END]
    if name in ("nano3", "super3"):
        assert load_template(name, empty_answers="train").training_sequences([USER, message])


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_a_tools_empty_result_is_legal(name):
    for result in ("", None):
        chat = [USER, calling({}), {"role": "tool", "content": result}, ANSWER]
        assert any(text for text in trained(load_template(name), chat))


@both
def test_a_tools_result_may_be_a_number_or_a_truth_value(marked):
    for result, text in ((42, "42"), (0.5, "0.5"), (True, "true")):
        chat = [USER, calling({}), {"role": "tool", "content": result}, ANSWER]
        for template in (load_template("nano3"), jinja("{{ m.content }}", marked=marked)):
            assert template.render(chat) == template.render([*chat[:2], {"role": "tool", "content": text}, ANSWER])


NULL = (
    "{%- if m.content is none -%}{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + "
    "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) }}{% endfor %}"
    "{%- else -%}{{ m.content }}{%- endif -%}"
)


@both
@pytest.mark.parametrize("missing", [True, False])
def test_null_content_stays_null(marked, missing):
    first = calling('{"c": "Oslo"}', None)
    if missing:
        del first["content"]
    chat = [USER, first, RESULT, answer("It rains.")]
    assert trained(jinja(NULL, marked=marked), chat) == [['CALL get {"c": "Oslo"}' + END, "It rains." + END]]


@both
@pytest.mark.parametrize("body", ["{{ m.content }}", "{{ m.content | trim }}", "{{ 'x' if 'x' in m.content }}"])
def test_none_is_never_trained(marked, body):
    """A template that prints null content as Python's None, or fails on it, gets it as empty text."""
    template = jinja(body + "{{ m.tool_calls[0].function.name if m.tool_calls else 'a' }}", marked=marked)
    assert trained(template, [USER, calling({}, None)]) == [["get" + END]]


ARGUMENTS = {
    "text": "{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + '\n' + c.function.arguments }}{% endfor %}",
    "object": "{% for c in m.tool_calls %}CALL {{ c.function.name }}\n{{ c.function.arguments | tojson }}{% endfor %}",
    "printed": "{% for c in m.tool_calls %}CALL {{ c.function.name }}\n{{ c.function.arguments }}{% endfor %}",
    "items": (
        "{% for c in m.tool_calls %}CALL {{ c.function.name + '\n{' }}{% for k, v in c.function.arguments.items() %}"
        "{{ v | tojson if v is none else '\"' ~ k ~ '\": \"' ~ v ~ '\"' }}{% endfor %}{{ '}' }}{% endfor %}"
    ),
}


@both
@pytest.mark.parametrize("wants", list(ARGUMENTS))
@pytest.mark.parametrize("arguments", ['{"c": "Oslo"}', {"c": "Oslo"}], ids=["text", "object"])
def test_arguments_come_as_the_template_wants_them(marked, wants, arguments):
    template = jinja("{{ m.content or '' }}" + ARGUMENTS[wants], marked=marked)
    chat = [USER, calling(arguments), RESULT, answer("It rains.")]
    assert trained(template, chat)[0][0] == 'CALL get\n{"c": "Oslo"}' + END


STRICT = (
    "{%- if 'tool_calls' in m -%}{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one call') }}{%- endif -%}"
    "{{ 'CALL ' + m.tool_calls[0].function.name }}{%- else -%}{{ m.content }}{%- endif -%}"
)


@both
@pytest.mark.parametrize("absent", [{}, {"tool_calls": None}, {"tool_calls": []}, {"name": None, "weight": None}])
def test_null_and_empty_keys_are_absent(marked, absent):
    chat = [{**USER, **absent}, {**ANSWER, **absent}]
    assert trained(jinja(STRICT, marked=marked), chat) == [["a" + END]]


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}",
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}",
    ],
)
def test_content_in_parts_and_as_text(body):
    loop = "{% for m in messages %}[" + body + "]{% endfor %}{{ '[' if add_generation_prompt }}"
    template = load_template("x.jinja", source=loop)
    assert trained(template, [USER, ANSWER]) == [["a]"]]
    chat = [USER, answer([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]
    assert trained(template, chat) == [["ab]"]]


# --- reasoning ---------------------------------------------------------------------------------------------

REASONED = [
    {"reasoning_content": "because"},
    {"reasoning": "because"},
    {"thinking": "because"},
    {"reasoning": "because", "reasoning_content": "because"},
    {"reasoning_content": "", "thinking": "because"},
    {"reasoning_content": "because", "content": "<think>\nbecause\n</think>\n\na"},  # said twice
    {"content": [{"type": "thinking", "thinking": "because"}, {"type": "text", "text": "a"}]},
    {"content": [{"type": "reasoning", "text": "because"}, {"type": "text", "text": "a"}]},
    {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "because"}]},
            {"type": "text", "text": "a"},
        ]
    },
]


@pytest.mark.parametrize("message", [{**ANSWER, **more} for more in REASONED])
def test_reasoning_by_any_name(message):
    for name, expected in (("nano3", "because\n</think>\na"), ("lightning35", "because</think>a")):
        assert trained(load_template(name), [USER, message]) == [[expected + END]]
        assert "<think>\nbecause" in texts(load_template(name), [USER, message])[0]
    with pytest.raises(ChatError, match="reasoning not rendered"):
        load_template("nano_v2").training_sequences([USER, message])
    template = jinja("{{ '[' + m.thinking + ']' if m.thinking }}{{ m.content }}", reasoning_field="thinking")
    assert trained(template, [USER, message]) == [["[because]a" + END]]


def test_reasoning_in_two_ways_is_refused():
    for more in ({"reasoning_content": "other"}, {"thinking": "other"}):
        with pytest.raises(ChatError, match="one in its content and another"):
            load_template("nano3").training_sequences([USER, {**answer("<think>\nbecause\n</think>\na"), **more}])
    empty = answer("<think>\n</think>\na", reasoning_content="because")
    assert load_template("nano3").training_sequences([USER, empty])


@both
@pytest.mark.parametrize("body", ["{{ '[' + m.thinking + ']' if m.thinking }}{{ m.content }}", "{{ m.content }}"])
def test_reasoning_that_a_template_leaves_out_is_refused(marked, body):
    template = jinja(body, marked=marked)
    with pytest.raises(ChatError, match=r"reasoning_field=thinking" if "thinking" in body else "no place") as caught:
        template.training_sequences([USER, {**ANSWER, "reasoning_content": "because"}])
    assert caught.value.reason == "reasoning not rendered"


@pytest.mark.parametrize("name", ["nano3", "super3", "lightning35", "lightning35_hf"])
@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_an_answer_as_the_model_gave_it(name, gap):
    """The prompt holds <think>, so an answer taken from a model begins behind it."""
    template = load_template(name)
    chat = [user("q1"), answer(f"r1{gap}</think>{gap}a1"), user("q2"), answer(f"r2{gap}</think>{gap}a2")]
    assert trained(template, chat) == [[f"r1{gap}</think>{gap}a1{END}"], [f"r2{gap}</think>{gap}a2{END}"]]
    first, second = texts(template, chat)
    assert first.startswith(template.generation_prompt(chat[:1]))
    assert second.endswith(f"<|im_start|>assistant\n<think>\nr2{gap}</think>{gap}a2{END}") and "r1" not in second
    loop = [USER, calling({"c": 1}, f"r1{gap}</think>"), RESULT, answer(f"r2{gap}</think>a2")]
    [(called, ended)] = trained(template, loop)
    assert called.startswith("r1") and "</function>" in called and ended == f"r2{gap}</think>a2{END}"


def test_a_flag_in_a_template_whose_tags_enclose_more_than_the_answer():
    """DeepSeek's tags enclose what closes the tool results too; what answers share a tag stays apart."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '</r>' if loop.index0 and "
        "messages[loop.index0 - 1].role == 'tool' }}<a>{{ m.content }}{{ m.tool_calls[0].function.name if "
        "m.tool_calls }}</s>{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}"
        "{{ '</r>' if m.role == 'tool' and loop.last }}{% endif %}{% endfor %}"
    )
    template = load_template("x.jinja", source=source)
    chat = [USER, answer("WRONG", weight=0), USER, calling({}), RESULT, ANSWER]
    assert trained(template, chat) == [["<a>get</s>", "<a>a</s>"]]
    merged = load_template("y.jinja", source=(
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif messages[loop.index0 - 1].role == "
        "'user' %}{% generation %}{% for n in messages if n.role == 'assistant' %}[{{ n.content }}]{% endfor %}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    ))  # fmt: skip
    assert trained(merged, [USER, answer("WRONG", weight=0), ANSWER]) == [["[a]"]]


# --- histories that change ---------------------------------------------------------------------------------

REWRITES = {
    "reasoning of the last answer only": (
        "{% if loop.last and m.thinking %}{{ 'ANALYSIS ' + m.thinking + '\n' }}{% endif %}{{ m.content }}",
        ["ANALYSIS t1\na1", "ANALYSIS t2\na2", "ANALYSIS t3\na3"],
    ),
    "a mark on the last answer": ("{{ 'LAST ' if loop.last }}{{ m.content }}", ["LAST a1", "LAST a2", "LAST a3"]),
    "earlier answers are cut": (
        "{% set past = messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list %}"
        "{{ m.content[:1] if past else m.content }}",
        ["a1", "a2", "a3"],
    ),
}


@both
@pytest.mark.parametrize("why", list(REWRITES))
def test_a_rewritten_history_gives_every_answer_its_own_past(marked, why):
    body, expected = REWRITES[why]
    chat = [m for i in "123" for m in (user(f"q{i}"), answer(f"a{i}", thinking=f"t{i}"))]
    if "thinking" not in body:
        chat = [{k: v for k, v in m.items() if k != "thinking"} for m in chat]
    template = jinja(body, marked=marked)
    assert trained(template, chat) == [[text + END] for text in expected]
    for text, end in zip(texts(template, chat), (2, 4, 6), strict=True):
        assert text == template.render(chat[:end])


@both
def test_an_answer_that_makes_the_model_forget_has_the_past_of_its_prompt(marked):
    """gpt-oss: the reasoning before a tool call goes once there is a last answer, but is there in the prompt for it."""
    body = (
        "{% set done = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
        "{{ 'R:' + m.thinking + '\n' if m.thinking and (loop.last or not done) }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    )
    template = jinja(body, marked=marked)
    step, last = [calling({}, thinking="t1"), RESULT], answer("a", thinking="t2")
    for steps in (1, 2, 3):
        chat = [USER, *step * steps, last]
        assert trained(template, chat) == [["R:t1\nget" + END] * steps, ["R:t2\na" + END]]
        assert texts(template, chat)[1] == template.generation_prompt(chat[:-1]) + "R:t2\na" + END
        assert trained(template, [USER, *step * steps, {**last, "weight": 0}]) == [["R:t1\nget" + END] * steps]


@both
def test_a_history_that_stays_is_one_sequence(marked):
    chat = [m for i in "123" for m in (user(f"q{i}"), answer(f"a{i}"))]
    assert trained(jinja("{{ m.content }}", marked=marked), chat) == [["a1" + END, "a2" + END, "a3" + END]]


QWEN3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}
{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif -%}
{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{ '\n<tool_call>\n' + c.function.name + '\n</tool_call>' }}
{%- endfor -%}{{ '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{%- endif -%}
"""


def test_a_tool_conversation_of_qwen3s_kind():
    template = load_template("qwen3.jinja", source=QWEN3)
    chat = [USER, calling({"c": "Oslo"}), RESULT, answer("It rains.")]
    called = "\n<tool_call>\nget\n</tool_call>" + END
    assert trained(template, chat) == [[called], ["It rains." + END]]
    off = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    first, second = texts(template, chat)
    assert first.endswith(off + called)
    assert second.endswith(
        "<|im_start|>assistant\n" + called + "<|im_start|>tool\nrain" + END + off + "It rains." + END
    )
    reasoned = [USER, calling({}, reasoning_content="r1"), RESULT, answer("a", reasoning_content="r2")]
    assert len(trained(template, reasoned)) == 1  # both are kept within a turn
    on = [[f"<think>\n\n</think>\n\na{END}"]]  # where reasoning is asked for, the model writes the empty block
    assert trained(template, [USER, ANSWER], chat_template_kwargs={"enable_thinking": True}) == on


# --- openings and ends -------------------------------------------------------------------------------------

SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
)
ASKS = "{%- if not messages | selectattr('role', 'equalto', 'user') | list -%}{{ raise_exception('ask') }}{%- endif -%}"
INSISTS = (
    "{%- if messages[0].role == 'system' and messages | length < 2 -%}{{ raise_exception('no question') }}{%- endif -%}"
)


@both
@pytest.mark.parametrize("before", ["", SYSTEM, INSISTS, ASKS])
def test_an_answer_may_come_first(marked, before):
    template = jinja("{{ m.content }}", before, marked)
    chat = [answer("hello"), user("q1"), answer("a1")]
    assert trained(template, chat) == [["hello" + END, "a1" + END]]
    assert trained(template, [{"role": "system", "content": "s"}, *chat]) == [["hello" + END, "a1" + END]]
    if before != ASKS:
        assert trained(template, [answer("assistant"), answer("two")]) == [["assistant" + END, "two" + END]]
    assert trained(load_template("nano3"), chat) == [["hello" + END, "a1" + END]]


def test_an_answer_that_lacks_a_part_of_the_prompt():
    """DeepSeek R1's prompt opens <think>, which its finished answers do not have: trained from where they depart."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{{ '<assistant><think>\n' if add_generation_prompt }}"
    )
    template = load_template("r1.jinja", source=source)
    for opening in ([], [USER]):
        assert trained(template, [*opening, ANSWER, USER, ANSWER]) == [["a</s>", "a</s>"]]


def test_an_answer_first_that_opens_otherwise_than_the_last():
    """Qwen 3.6 opens the answers to the last question with a think block, and renders nothing without a question."""
    source = ASKS + (
        "{% for m in messages %}<{{ m.role }}>{{ '<think></think>' if m.role == 'assistant' and loop.last }}"
        "{{ m.content }}</s>{% endfor %}{{ '<assistant><think></think>' if add_generation_prompt }}"
    )
    [spans] = load_template("x.jinja", source=source).training_sequences([answer("hi"), USER, ANSWER])
    assert [text for role, text in spans if role == "assistant"] == ["hi</s>", "a</s>"]
    assert spans[0] == ("context", "<assistant>")


GLM = """[gMASK]
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{ '<|observation|>\n' + m.content }}
{%- else -%}{{ '<|' + m.role + '|>\n' + m.content }}{% for c in m.tool_calls or [] %}
{{- '\nCALL ' + c.function.name }}{% endfor %}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""


def test_a_turn_that_ends_with_the_next_roles_token():
    """Such models stop by giving that token, so it is trained, and added where the conversation ends."""
    template = load_template("glm.jinja", source=GLM)
    chat = [user("q1"), calling({}, "look"), RESULT, answer("a1"), user("q2"), answer("a2")]
    assert trained(template, chat) == [["look\nCALL get<|observation|>", "a1<|user|>", "a2<|user|>"]]
    assert texts(template, chat) == [template.render(chat) + "<|user|>"]
    assert trained(template, chat[:2]) == [["look\nCALL get<|observation|>"]]
    ended = jinja("{{ m.content }}")
    assert trained(ended, [USER, ANSWER]) == [["a" + END]]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "marked.jinja").write_text("\ufeff{{ messages[0].content }}", encoding="utf-8")
    assert load_template(str(tmp_path / "marked.jinja")).render([USER]) == "q"


# --- tools -------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get", "description": "Get it.", "parameters": SCHEMA}
WRAPPED = {"type": "function", "function": FUNCTION}
FORMS = [
    FUNCTION,
    {"type": "function", **FUNCTION},
    {"name": "get", "description": "Get it.", "inputSchema": SCHEMA},
    {"name": "get", "description": "Get it.", "inputSchema": SCHEMA, "annotations": {"readOnlyHint": True}},
    {"name": "get", "description": "Get it.", "input_schema": SCHEMA},
    {"type": "function", "id": "get", "description": "Get it.", "inputSchema": {"jsonSchema": SCHEMA}},
    {**WRAPPED, "strict": None},
]


@pytest.mark.parametrize("tool", FORMS)
def test_tools_without_a_wrapper_and_in_mcp_style(tool):
    for name in BUILT_IN:
        template = load_template(name)
        assert template.render([USER, ANSWER], [tool]) == template.render([USER, ANSWER], [WRAPPED])
    reads = "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.parameters | tojson }}{% endfor %}"
    template = jinja("{{ m.content }}", reads)
    assert template.render([USER, ANSWER], [tool]) == template.render([USER, ANSWER], [WRAPPED])


def test_a_template_that_reads_bare_tools_gets_them_as_they_are():
    template = jinja("{{ m.content }}", "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}")
    assert template.render([USER], [FUNCTION]).startswith('{"name": "get"')
    assert template.render([USER], [WRAPPED]).startswith('{"type": "function"')


@pytest.mark.parametrize(
    "tool",
    [{"name": ""}, {"type": "web_search"}, {"type": "function", "function": {}}, {"name": "f", "parameters": "x"}],
)
def test_a_tool_that_cannot_be_called_is_refused(tool):
    for template in (load_template("nano3"), jinja("{{ m.content }}")):
        with pytest.raises(ChatError, match=r"without a name|parameters of f"):
            template.training_sequences([USER, ANSWER], [tool])
    unnamed = {"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": {}}}]}
    with pytest.raises(ChatError, match="without a function name"):
        load_template("nano3").training_sequences([USER, unnamed])


def test_openais_old_function_calls():
    old = [USER, {"role": "assistant", "content": None, "function_call": {"name": "get", "arguments": "{}"}},
           {"role": "function", "name": "get", "content": "rain"}, ANSWER]  # fmt: skip
    new = [USER, calling({}, None), {"role": "tool", "content": "rain"}, ANSWER]
    for name in BUILT_IN:
        assert load_template(name).training_sequences(old) == load_template(name).training_sequences(new)


@both
def test_a_call_or_a_text_that_a_template_leaves_out_is_refused(marked):
    with pytest.raises(ChatError, match="leaves out the call of get"):
        jinja("{{ m.content }}", marked=marked).training_sequences([USER, calling({}, "look")])
    body = "{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}"
    with pytest.raises(ChatError, match="leaves out or changes 'look'"):
        jinja(body, marked=marked).training_sequences([USER, calling({}, "look")])
