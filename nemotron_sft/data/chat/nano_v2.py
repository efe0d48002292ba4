"""NVIDIA's Nemotron Nano v2 template (9B and 12B).

The same text as templates/nano_v2.jinja. It writes an answer in full only while it is the newest message: behind
the opening that the prompt gives it, and without its tool calls. Every answer is therefore trained in a sequence
of its own, as the model gives it: behind the prompt, tool calls and end of turn included. Reasoning has no place
in it except inside the content, closed with </think>.
"""

from __future__ import annotations

import json
from importlib import resources

from nemotron_sft.data.chat.messages import ChatError, wrapped
from nemotron_sft.data.chat.template import Span, Template

_SYSTEM, _USER, _ANSWER, _END = (
    "<SPECIAL_10>System\n",
    "<SPECIAL_11>User\n",
    "<SPECIAL_11>Assistant\n",
    "\n<SPECIAL_12>\n",
)
_OFF, _ON = "<think></think>", "<think>\n"
_TOOLS = """You can use the following tools to assist the user if required:
<AVAILABLE_TOOLS>%s</AVAILABLE_TOOLS>

If you decide to call any tool(s), use the following format:
<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, {{"name": "tool_name2", "arguments": "tool_args2"}}]\
</TOOLCALL>

The user will execute tool-calls and return responses from tool(s) in this format:
<TOOL_RESPONSE>[{{"tool_response1"}}, {{"tool_response2"}}]</TOOL_RESPONSE>

Based on the tool responses, you can call additional tools if needed, correct tool calls if any errors are found, \
or just respond to the user."""


class NanoV2(Template):
    """Nemotron Nano v2."""

    @classmethod
    def jinja(cls) -> str:
        """The template as Jinja, for whatever serves the model."""
        return resources.files("nemotron_sft.data.chat").joinpath("templates/nano_v2.jinja").read_text()

    def _text(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        last = len(messages) - 1
        parts = [text for _, text in _blocks(messages, tools)]
        if messages[last]["role"] == "assistant":
            content = messages[last]["content"].strip()
            parts[-1] = _ANSWER + _opening(messages, variables) + content + _END if content else ""
        return "".join(parts)

    def _prompt(self, messages: list[dict], tools: list[dict], variables: dict) -> str:
        past = "".join(text for _, text in _blocks(messages, tools))
        return past + _ANSWER + _opening(messages, variables)

    def _sequences(
        self, messages: list[dict], tools: list[dict], trained: list[bool], variables: dict
    ) -> list[list[Span]]:
        blocks = _blocks(messages, tools)
        found = []
        for i, message in enumerate(messages):
            if trained[i]:
                if message.get("reasoning_content", "").strip():
                    raise ChatError(
                        "reasoning not rendered", f"message {i}: {self.name} takes reasoning inside the content only"
                    )
                opening = _ANSWER + _opening(messages[: i + 1], variables)
                rest = _content(message["content"].strip(), message) + _END
                past = _merged(blocks[: 1 + i - _has_system(messages)])
                if self.train_generation_prompt:
                    found.append([*past, ("assistant", opening), ("assistant", rest)])
                else:
                    found.append([*past[:-1], (past[-1][0], past[-1][1] + opening), ("assistant", rest)])
        return found or [_merged(blocks)]

    def _check_context(self, messages: list[dict], sequences: list[list[Span]]) -> None:
        for i, message in enumerate(messages):
            if (message["role"] == "developer" or (i and message["role"] == "system")) and message["content"].strip():
                raise ChatError(
                    "message not rendered", f"message {i}, a {message['role']}'s: {self.name} leaves it out"
                )


def _blocks(messages: list[dict], tools: list[dict]) -> list[Span]:
    """The system block, which is always there, and one block for every further message, as history."""
    has_system = _has_system(messages)
    system = _without_flags(messages[0]["content"]) if has_system else ""
    listing = _TOOLS % json.dumps([tool["function"] for tool in wrapped(tools)], ensure_ascii=False) if tools else ""
    gap = "\n\n" if system and listing else ""
    blocks = [("system", f"{_SYSTEM}{system}{gap}{listing}\n")]
    for i in range(has_system, len(messages)):
        role, content = messages[i]["role"], messages[i]["content"]
        if role == "user":
            text = f"{_USER}{_without_flags(content)}\n"
        elif role == "assistant":
            _, closed, rest = content.partition("</think>")
            text = (
                _ANSWER + _content((rest.partition("</think>")[0] if closed else content).strip(), messages[i]) + _END
            )
        elif role == "tool":
            opens = i == 0 or messages[i - 1]["role"] != "tool"
            closes = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            text = (f"{_USER}<TOOL_RESPONSE>[" if opens else "") + content + ("]</TOOL_RESPONSE>\n" if closes else ", ")
        else:
            text = ""  # a later system message, or a developer's
        blocks.append(("history" if role == "assistant" else role, text))
    return blocks


def _merged(blocks: list[Span]) -> list[Span]:
    """Spans in which consecutive tool results are one."""
    spans: list[Span] = []
    for role, text in blocks:
        if spans and role == spans[-1][0] == "tool":
            spans[-1] = (role, spans[-1][1] + text)
        else:
            spans.append((role, text))
    return spans


def _content(content: str, message: dict) -> str:
    """What an answer says, with its tool calls."""
    if not (calls := message.get("tool_calls")):
        return content
    functions = [call.get("function", call) for call in calls]
    listed = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
    gap = "\n\n" if content else ""
    return f"{content}{gap}<TOOLCALL>{json.dumps(listed, ensure_ascii=False)}</TOOLCALL>"


def _opening(messages: list[dict], variables: dict) -> str:
    """What a prompt puts behind the header: thinking on or off, as the flags in the messages say.

    A flag in a user message goes before what the caller asks, and that goes before one in the system message.
    """
    thinking = True
    if _has_system(messages):
        thinking = _flag(messages[0]["content"], thinking)
    for name, value in variables.items():
        if name != "enable_thinking" or not isinstance(value, bool):
            raise ChatError("bad chat_template_kwargs", f"nano_v2 has no {name}={value!r}")
        thinking = value
    for message in messages:
        if message["role"] == "user":
            thinking = _flag(message["content"], thinking)
    return _ON if thinking else _OFF


def _flag(content: str, thinking: bool) -> bool:
    """`thinking`, changed where the content says so. (The published template also sees /think in a </think>.)"""
    return True if "/think" in content else False if "/no_think" in content else thinking


def _without_flags(content: str) -> str:
    return content.replace("/think", "").replace("/no_think", "").strip()


def _has_system(messages: list[dict]) -> bool:
    return messages[0]["role"] == "system"
