"""Prompts with checkable answers: read from JSONL files, checked, rendered and tokenized as at inference.

A line is {"messages", "answer", optional "score", "choices", "tools"}; docs/evaluation.md says more.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_sft.config import Heldout
from nemotron_sft.data.chat import ChatError, Template
from nemotron_sft.data.opened import open_template, open_tokenizer
from nemotron_sft.errors import UserError
from nemotron_sft.files import JSON_LINES
from nemotron_sft.train import scorers

EXACT_MARGIN = 4  # new tokens that an exact answer gets beyond the length of what is expected: then it is wrong


@dataclass
class Prompts:
    """The prompts of all files, one after another."""

    records: list[dict]  # as in the files, "score" filled in
    files: dict[str, range]  # name: which records are the file's
    paths: dict[str, str]
    places: list[str]  # "file:line" of every prompt
    ids: list[np.ndarray]  # int32, one array per prompt, ending in the generation prompt
    budget: list[int]  # new tokens, at most
    decode: Callable[[np.ndarray], str]
    eos_id: int
    thinking: bool  # whether the answers begin with reasoning

    def right(self, answers: list[str]) -> list[bool]:
        """Whether each answer is right."""
        return [scorers.score(answer, record) for answer, record in zip(answers, self.records, strict=True)]

    def scores(self, right: list[bool]) -> dict[str, float]:
        """The share of right answers in each file."""
        return {name: sum(right[i] for i in rows) / len(rows) for name, rows in self.files.items()}

    def chance(self) -> dict[str, float]:
        """What is scored in each file by chance; see scorers.chance."""
        return {name: scorers.chance([self.records[i] for i in rows]) for name, rows in self.files.items()}

    def about(self) -> dict[str, dict]:
        """path, number of prompts and chance level of each file."""
        return {
            name: {"path": self.paths[name], "prompts": len(rows), "chance": self.chance()[name]}
            for name, rows in self.files.items()
        }

    def answer(self, tokens: list[int]) -> str:
        """New tokens as the answer that is scored: what follows the reasoning, nothing if that has no end."""
        text = self.decode(np.array(tokens, np.int32))
        return (after_reasoning(text) if self.thinking else text).strip()

    def question(self, index: int) -> str:
        """The text of a prompt's last message."""
        content = self.records[index]["messages"][-1].get("content")
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def after_reasoning(text: str) -> str:
    """What follows the reasoning at the beginning of an answer; nothing if that has no end."""
    return text.partition("</think>")[2]


def named_files(path: Any) -> dict[str, Path]:
    """heldout.path, one file or {name: file}, as names and files. Raises UserError."""
    if path is None:
        return {}
    if isinstance(path, str):
        return {name_of_file(path): Path(path)}
    if not isinstance(path, dict) or not all(isinstance(file, str) for file in path.values()):
        raise UserError("heldout.path must be a file, or files by name: heldout.path={math: a.jsonl, tools: b.jsonl}")
    if bad := next((name for name in path if "/" in str(name)), None):
        raise UserError(f"heldout.path: the name {bad!r} has a slash in it; it is the end of score/NAME in the metrics")
    return {str(name): Path(file) for name, file in path.items()}


def name_of_file(path: str | Path) -> str:
    """What a file of prompts is called: its name without .jsonl."""
    path = Path(path)
    return path.stem if path.suffix in JSON_LINES else path.name


def load_prompts(config: Heldout, metadata: dict) -> Prompts | None:
    """The prompts of heldout.path, with the data's own template and tokenizer; None without one.

    Raises UserError naming file and line for what cannot be asked or scored.
    """
    files = named_files(config.path)
    if not files:
        return None
    template, tokenizer = open_template(metadata), open_tokenizer(metadata)
    records, places, texts, rows = [], [], [], {}
    for name, path in files.items():
        found = read_prompts(path, "heldout.path")
        rows[name] = range(len(records), len(records) + len(found))
        for where, record in found:
            records.append(record)
            places.append(where)
            texts.append(_rendered(template, record, config.thinking, where))
    flat, offsets = tokenizer.encode_batch(texts)
    ids = [flat[start:end] for start, end in itertools.pairwise(offsets)]
    budget = [config.max_new_tokens] * len(records)
    if not config.thinking:  # an exact answer that goes on beyond its length, and another spelling's, is wrong
        exact = [i for i, record in enumerate(records) if record["score"] == "exact"]
        lengths = np.diff(tokenizer.encode_batch([records[i]["answer"] for i in exact])[1]) if exact else []
        for i, length in zip(exact, lengths, strict=True):
            budget[i] = min(budget[i], int(length) + EXACT_MARGIN)
    paths = {name: str(path) for name, path in files.items()}
    return Prompts(records, rows, paths, places, ids, budget, tokenizer.decode, tokenizer.eos_id, config.thinking)


def read_prompts(path: Path, named_by: str) -> list[tuple[str, dict]]:
    """("file:line", record) of every line that is not empty. named_by: what the user set. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        hint = "; set heldout.path=null to train without prompts" if named_by == "heldout.path" else ""
        raise UserError(f"{named_by}: {path}: {reason}{hint}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            found.append((where, _checked(line, where)))
    if not found:
        raise UserError(f"{named_by}: {path} holds no prompts")
    return found


def _checked(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__} instead of an object")
    if "messages" not in record:
        raise UserError(f'{where}: no "messages"')
    if problem := scorers.problem(record):
        raise UserError(f"{where}: {problem}")
    return {**record, "score": record.get("score", "exact")}


def _rendered(template: Template, record: dict, thinking: bool, where: str) -> str:
    try:
        text = template.generation_prompt(record["messages"], record.get("tools"), thinking=thinking)
    except ChatError as error:
        raise UserError(f"{where}: {error}") from None
    if (role := record["messages"][-1].get("role")) not in ("user", "tool", "function"):
        raise UserError(
            f"{where}: the last message is of the {role}, whom nobody answers: end with a user's or a tool's"
        )
    return text
