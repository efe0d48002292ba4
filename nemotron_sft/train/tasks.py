"""Tasks for lm-eval: those that it has, and those made of files of prompts with checkable answers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nemotron_sft.config import nearest
from nemotron_sft.data.chat import ChatError, load_template
from nemotron_sft.errors import UserError
from nemotron_sft.files import JSON_LINES
from nemotron_sft.paths import ROOT
from nemotron_sft.train import scorers
from nemotron_sft.train.prompts import EXACT_MARGIN, name_of_file, read_prompts

TINY = ROOT / "data" / "tiny" / "heldout.jsonl"
LONGEST = 256  # new tokens for an answer that need not be exact, unless the user says another number


def prompts_of(task: str) -> Path | None:
    """The prompts of a task that is not lm-eval's: `tiny`, or a file as heldout.path takes it."""
    return TINY if task == "tiny" else Path(task) if task.endswith(JSON_LINES) else None


def name_of(task: str) -> str:
    """What a task is called in tables and files."""
    return name_of_file(task) if prompts_of(task) else task


def known(tasks: tuple[str, ...]) -> Any:
    """lm-eval's TaskManager.

    Raises UserError for a task that does not exist or is given twice, and for prompts that cannot be scored.
    """
    names = [name_of(task) for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--tasks: two tasks are called {twice}")
    for path in filter(None, map(prompts_of, tasks)):
        read_prompts(path, "--tasks")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = [task for task in tasks if not prompts_of(task)]
    manager = TaskManager(include_defaults=bool(theirs))  # the defaults are thousands of files
    for task in theirs:
        if task not in manager.all_tasks:
            close = nearest(task, list(manager.all_tasks))
            hint = f"did you mean {close}?" if close else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks: lm-eval has no task {task}: {hint}")
    return manager


def task_of(name: str, path: Path, tokenizer: Any, ends: list[str], thinking: bool, longest: int | None) -> dict:
    """lm-eval's config of a task made of prompts with checkable answers, in the chat template.

    tokenizer: transformers' own, with a chat template; ends: the tokens that end an answer; thinking: whether the model
    is to reason; longest: new tokens of an answer, reasoning included. Raises UserError for a line that cannot be
    asked.
    """
    from datasets import Dataset

    prompts = read_prompts(path, "--tasks")
    texts = rendered(tokenizer, prompts, thinking)
    expected = [record["answer"] for _, record in prompts if record["score"] == "exact"]
    longest = longest or LONGEST
    if len(expected) == len(prompts) and not thinking:  # what goes on beyond that is wrong
        lengths = [len(tokenizer.encode(answer, add_special_tokens=False)) for answer in expected]
        longest = min(longest, max(lengths) + EXACT_MARGIN)
    rows = [{"text": text, "record": json.dumps(record)} for text, (_, record) in zip(texts, prompts, strict=True)]
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "record",
        "process_results": _right,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ends, "do_sample": False, "max_gen_toks": longest},
        "metadata": {"version": 1},
    }


def rendered(tokenizer: Any, prompts: list[tuple[str, dict]], thinking: bool) -> list[str]:
    """The texts that ask the prompts in the tokenizer's chat template. Raises UserError."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = load_template("chat template", tokenizer.chat_template, special_tokens=special)
    texts = []
    for where, record in prompts:
        try:
            texts.append(template.generation_prompt(record["messages"], record.get("tools"), thinking=thinking))
        except ChatError as error:
            raise UserError(f"{where}: {error}") from None
    return texts


def _right(row: dict, answers: list[str]) -> dict[str, float]:
    return {"acc": float(scorers.score(answers[0].strip(), json.loads(row["record"])))}
