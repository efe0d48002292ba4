"""Prompts with checkable answers, asked before, during and after training: scores, and heldout.json with the answers.

    {"version": 2, "files": {NAME: {"path", "prompts", "chance"}},
     "asked": [{"step", "scores": {NAME: share of right answers}, "answers": [...], "right": [...]}],
     "prompts": [{"file", "question", "answer", "score"}]}

"asked" holds the first and the newest time; the scores of all times are in metrics.jsonl, as score/NAME.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_sft.config import Heldout as Settings
from nemotron_sft.errors import UserError
from nemotron_sft.files import write_json
from nemotron_sft.train.generate import Sampling, generate
from nemotron_sft.train.progress import Progress
from nemotron_sft.train.prompts import Prompts

VERSION = 2


def check(settings: Settings, container) -> None:
    """Raise UserError for what cannot be asked while this run trains."""
    if settings.path is not None and container.model.context_parallel_size > 1:
        raise UserError(
            "heldout.path: the prompts cannot be answered by ranks that share one sequence: set heldout.path=null or "
            "model.context_parallel_size=1"
        )


class Heldout:
    """Asks the prompts in the training loop: before the first step, every so many steps, and after the last.

    Training goes on as if it had not: no random numbers of training are drawn, nothing of the model is changed.
    """

    def __init__(self, settings: Settings, prompts: Prompts | None, run_dir: Path, rank: int, progress: Progress):
        self.settings, self.prompts, self.rank, self.progress = settings, prompts, rank, progress
        self.file = run_dir / "heldout.json"
        self.asked: list[dict] = []
        saved = read(self.file)
        if prompts and saved and saved["prompts"] == self._rows():  # resumed, and not other prompts than then
            self.asked = saved["asked"]

    def register(self, manager) -> None:
        """After Progress, which opens metrics.jsonl, and whose clock must not count the time of an evaluation."""
        manager.register("on_train_start", self.on_train_start)
        manager.register("on_train_step_end", self.on_train_step_end)

    def on_train_start(self, context) -> None:
        step = context.state.train_state.step
        self.asked = [entry for entry in self.asked if entry["step"] <= step]  # later steps will be trained again
        finished = step == context.state.cfg.train.train_iters and self.asked and self.asked[-1]["step"] != step
        if self.prompts and (not self.asked or finished):
            self._ask(context, step)

    def on_train_step_end(self, context) -> None:
        """Before the step's checkpoint is saved: whoever resumes from that has the scores, too."""
        step = context.state.train_state.step + 1  # Bridge counts after this callback
        every = self.settings.interval
        if self.prompts and (step == context.state.cfg.train.train_iters or (every and step % every == 0)):
            self._ask(context, step)

    def _ask(self, context, step: int) -> None:
        prompts, settings = self.prompts, self.settings
        sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
        with gathered(context.model, context.optimizer):
            tokens = generate(context.model, prompts.ids, prompts.budget, prompts.eos_id, sampling, settings.batch_size)
        answers = [prompts.answer(each) for each in tokens]
        right = prompts.right(answers)
        scores = prompts.scores(right)
        self.asked = [*self.asked[:1], {"step": step, "scores": scores, "answers": answers, "right": right}]
        self.progress.scored(context.state, step, scores, self.table())
        if self.rank == 0:
            write_json(self.file, {"version": VERSION, "files": prompts.about(), "asked": self.asked,
                                   "prompts": self._rows()})  # fmt: skip

    def _rows(self) -> list[dict]:
        """What was asked, as in heldout.json."""
        names = [name for name, rows in self.prompts.files.items() for _ in rows]
        return [
            {"file": name, "question": self.prompts.question(i), "answer": record["answer"], "score": record["score"]}
            for i, (name, record) in enumerate(zip(names, self.prompts.records, strict=True))
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the answers, first and newest, for W&B."""
        columns = ["file", "question", "expected", *(f"step {entry['step']}" for entry in self.asked)]
        answers = zip(*(entry["answers"] for entry in self.asked), strict=True)
        rows = [
            [row["file"], row["question"], _text(row["answer"]), *given]
            for row, given in zip(self._rows(), answers, strict=True)
        ]
        return columns, rows


@contextlib.contextmanager
def gathered(model: Sequence[Any], optimizer: Any) -> Iterator[None]:
    """All parameters as the last step left them, on every rank; as Bridge does it before it validates and saves.

    model: the chunks on this rank, as Bridge wraps them. With ddp.overlap_param_gather a step updates each rank's own
    share, and hooks of the next step's forward pass gather the others', bucket by bucket. Bridge sets these hooks
    after the first step only: until then nobody gathers. Without that overlap nothing is to be done.
    """
    if not getattr(model[0], "use_forward_hook", False):
        yield
        return
    import torch
    from megatron.bridge.training.train import disable_forward_pre_hook, enable_forward_pre_hook, force_param_sync

    hooked = bool(model[0].remove_forward_pre_hook_handles)
    with torch.no_grad():
        (disable_forward_pre_hook if hooked else force_param_sync)(model, optimizer)
    try:
        yield
    finally:
        if hooked:
            enable_forward_pre_hook(model)


def first_and_last(asked: list[dict]) -> list[tuple[str, list[float]]]:
    """(name of a file, its scores) of the "asked" of a heldout.json."""
    return [(name, [entry["scores"][name] for entry in asked]) for name in asked[0]["scores"]] if asked else []


def read(path: Path) -> dict | None:
    """A heldout.json; None if there is none, or one of another version."""
    try:
        saved = json.loads(path.read_text())
        return saved if saved["version"] == VERSION else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _text(answer) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
