"""Which forms of a message a Jinja template can read, found by rendering small conversations.

Messages reach a template as they are. But where it cannot read the form that the data has (arguments as JSON text
instead of an object, content in parts, a tool without its wrapper), it would print Python's own notation, escape
the JSON twice, or leave the thing out, without a word. It then gets the form that it can read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from nemotron_sft.data.chat.messages import (
    REASONING,
    ChatError,
    as_object,
    calls_with,
    plain_content,
    reasoning_of,
    wrapped,
)

_USER = {"role": "user", "content": "q"}
_ANSWER = {"role": "assistant", "content": "a"}


class Forms:
    """What a template reads. render(messages, tools) -> text, or ChatError where the template raises."""

    def __init__(self, render: Callable[[list[dict], list[dict]], str]):
        self._render = render

    def adapt(
        self, messages: list[dict], tools: list[dict], reasoning_field: str | None
    ) -> tuple[list[dict], list[dict]]:
        """Checked messages and tools, changed only where the template could not read them as they are."""
        adapted = [self._adapted(message, index, reasoning_field) for index, message in enumerate(messages)]
        if any("function" not in tool for tool in tools) and not self.reads_bare_tools:
            tools = wrapped(tools)
        return adapted, tools

    def _adapted(self, message: dict, index: int, reasoning_field: str | None) -> dict:
        content = message["content"]
        if message["role"] == "assistant":
            message = _with_reasoning(message, index, reasoning_field, self)
        elif isinstance(content, (list, dict)) and not self._reads_content(content):
            message = {**message, "content": plain_content(content)}
        if message["content"] is None and not self.reads_null:
            message = {**message, "content": ""}
        if isinstance(message["content"], str) and not self.reads_text:
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if "tool_calls" in message:
            if self.arguments == "object":
                message = calls_with(message, lambda arguments: as_object(arguments, index))
            elif self.arguments == "text":
                message = calls_with(message, _as_text)
        return message

    def _reads_content(self, content: Any) -> bool:
        parts = isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content)
        return self.reads_parts if parts else self.reads_objects

    @cached_property
    def arguments(self) -> str:
        """How the arguments of tool calls have to come: "object", "text", or as they are ("given")."""
        good = {}
        for name, arguments in (("object", {"argkey": "argvalue"}), ("text", '{"argkey": "argvalue"}')):
            text = self._first(_calls(arguments)) or ""
            good[name] = _shown(text, "argkey", "argvalue")
        if good["object"] == good["text"]:
            return "given"
        return "object" if good["object"] else "text"

    @cached_property
    def reads_null(self) -> bool:
        """Whether the content of an answer with tool calls may be null; "None" is not printed for it."""
        texts = [self._first([chat for chat in _calls({}) if chat[1]["content"] == content]) for content in (None, "")]
        null, empty = texts
        if empty is None:
            return True
        return null is not None and null.count("None") == empty.count("None")

    @cached_property
    def reads_text(self) -> bool:
        """Whether content may be text; some templates of models that see images take nothing but parts."""
        question, parts = {"role": "user", "content": "textq"}, [{"type": "text", "text": "textq"}]
        text = self._first(([question, _ANSWER], [question])) or ""
        return "textq" in text or not _shown(self._first([[{"role": "user", "content": parts}]]) or "", "textq")

    @cached_property
    def reads_parts(self) -> bool:
        """Whether content may be a list of text parts."""
        question = {"role": "user", "content": [{"type": "text", "text": "partq"}]}
        return _shown(self._first(([question, _ANSWER], [question])) or "", "partq")

    @cached_property
    def reads_objects(self) -> bool:
        """Whether a tool's result may be an object, which the template writes as JSON."""
        conversations = ([*chat[:2], {**chat[2], "content": {"objkey": "objvalue"}}] for chat in _calls({}))
        return _shown(self._first(conversations) or "", '"objkey"', "objvalue")

    @cached_property
    def reads_bare_tools(self) -> bool:
        """Whether tools may come without OpenAI's {"type": "function", "function": ...} around them."""
        schema = {"type": "object", "properties": {"argname": {"type": "string", "description": "argdesc"}}}
        tool = {"name": "toolname", "description": "tooldesc", "parameters": schema}
        return _shown(self._first([[_USER]], [tool]) or "", "toolname", "tooldesc", "argname")

    @cached_property
    def reasoning(self) -> str | None:
        """The name under which the template reads an answer's reasoning, None if there is none."""
        for name in REASONING:
            if "reasonq" in (self._first([[_USER, {**_ANSWER, name: "reasonq"}]]) or ""):
                return name
        return None

    def _first(self, conversations: Any, tools: list[dict] | None = None) -> str | None:
        """The text of the first of these conversations that the template renders, None if it renders none."""
        for conversation in conversations:
            try:
                return self._render(conversation, tools or [])
            except ChatError:
                continue
        return None


def _with_reasoning(message: dict, index: int, field: str | None, forms: Forms) -> dict:
    """An answer with its reasoning under `field`, and its content as text where the template takes no parts."""
    content = message["content"]
    parts = isinstance(content, list)
    if field is None and not (parts and not forms.reads_parts):
        return message
    reasoning = reasoning_of(message, index)
    message = {key: value for key, value in message.items() if field is None or key not in REASONING}
    if parts:
        message["content"] = plain_content(content)
    if reasoning and (field or parts):
        message[field or "reasoning_content"] = reasoning
    return message


def _calls(arguments: Any) -> Iterator[list[dict]]:
    """Conversations with one tool call and its result, in the ways that templates insist on."""
    function = {"name": "toolname", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    result = {"role": "tool", "name": "toolname", "tool_call_id": "call00001", "content": "r"}
    for content in ("", None, "c"):
        yield [_USER, {"role": "assistant", "content": content, "tool_calls": [call]}, result, _ANSWER]
        yield [_USER, {"role": "assistant", "content": content, "tool_calls": [call]}, result]


def _shown(text: str, *words: str) -> bool:
    """Whether a text has these words, and none of them in Python's quotes or as JSON inside JSON."""
    bad = ("'%s'", '\\"%s', "'%s\\")
    return all(word in text and not any(form % word.strip('"') in text for form in bad) for word in words)


def _as_text(arguments: Any) -> str:
    return (arguments.strip() or "{}") if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
