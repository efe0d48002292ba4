"""The record of a training run: lineage.json beside its checkpoints, and its W&B run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from nemotron_sft.config import TrainConfig
from nemotron_sft.console import say
from nemotron_sft.errors import first_line
from nemotron_sft.record import digests, lineage
from nemotron_sft.record.lineage import MODEL
from nemotron_sft.record.names import resolve
from nemotron_sft.record.wandb import Tracker, sample_tag
from nemotron_sft.train.checkpoints import newest_checkpoint, step_of, whole_iterations
from nemotron_sft.train.progress import read_metrics


class Training:
    """The record of a training run, and its W&B run. A context manager; does nothing on ranks other than 0.

        with Training(config, composed, metadata, data_dir, run_dir, rank, terminal) as tracked:
            tracked.register(callbacks)   every checkpoint that is saved becomes a ModelArtifact-sft
            tracked.log(step=..., ...)    metrics

    Aliases: `latest` is the newest checkpoint, `iter-N` its step, and `best` the one with the lowest validation loss
    among those that were saved at a step with a validation.
    """

    def __init__(self, config: TrainConfig, composed: Any, metadata: dict, data_dir: Path, run_dir: Path, rank: int,
                 terminal: TextIO):  # fmt: skip
        self.rank, self.run_dir, self.config, self.terminal = rank, run_dir, config, terminal
        if rank:
            return
        earlier = lineage.read(run_dir)
        model = asdict(config.model)
        inputs = [lineage.of_data(data_dir, metadata)]
        saved = whole_iterations(run_dir / "checkpoints")
        reached = step_of(saved[-1]) if saved else 0  # later steps will be trained again
        outputs = [self._here(output) for output in earlier["outputs"]] if earlier else []
        outputs = [output for output in outputs if output["metadata"]["step"] <= reached]
        self.record = lineage.record("train", lineage.plain(composed), inputs, outputs)
        self.record["tracking"] = earlier["tracking"] if earlier else None
        self.losses = validation_losses(run_dir, outputs, reached)
        self.best = None
        self._saving = threading.Lock()
        self._hashing = ThreadPoolExecutor(1, "lineage")  # in order; hashing lets other threads run
        self.save()
        self.tracker = Tracker(config.tracking, self.record, run_dir, sample_tag(metadata), self.say)
        self._hashing.submit(self._describe_start, config.init_from, model)

    def _here(self, output: dict) -> dict:
        """An earlier output under the run directory's present name: it may have moved, or be named in another way."""
        return output | {"path": str(self.run_dir / "checkpoints" / Path(output["path"]).name)}

    def __enter__(self) -> Training:
        if self.rank == 0:
            known = [output["path"] for output in self.record["outputs"]]
            for path in whole_iterations(self.run_dir / "checkpoints"):
                if str(path) not in known:
                    self._hashing.submit(self._describe, path)  # saved, but then the run was killed
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.rank:
            return
        self._hashing.shutdown(wait=True)
        for output in self._choose():
            self.tracker.output(output, ["best"])
        self.save()
        self.tracker.close(0 if kind is None or (kind is SystemExit and not error.code) else 1)
        self.save()

    def register(self, manager) -> None:
        """Let Bridge's CallbackManager call this."""
        manager.register("on_train_start", self.on_train_start)
        manager.register("on_checkpoint_save", self.on_checkpoint_save)

    def on_train_start(self, context) -> None:
        """Not before: Bridge's set-up walks through all loggers, and importing wandb in a thread adds some."""
        if self.rank == 0:
            self.tracker.start()

    def log(self, step: int, **values: float | None) -> None:
        """Send metrics of a step to W&B; a validation loss also decides which checkpoint is the best."""
        if "validation_loss" in values:
            self.losses[step] = values["validation_loss"]
        self.tracker.log({name: value for name, value in values.items() if value is not None}, step)

    def answers(self, step: int, columns: list[str], rows: list[list[str]]) -> None:
        """A table of prompts and answers."""
        self.tracker.table("answers", columns, rows, step)

    def on_checkpoint_save(self, context) -> None:
        """Bridge has committed a checkpoint; an asynchronous one may be older than the current step."""
        if self.rank == 0:
            newest = newest_checkpoint(Path(context.state.cfg.checkpoint.save))
            self._hashing.submit(self._describe, newest)

    def say(self, line: str) -> None:
        """Print a line to the terminal."""
        say(line, self.terminal)

    def save(self) -> None:
        """Write lineage.json; what recipes/evaluate.py has added to it stays."""
        with self._saving:
            if evaluations := (lineage.read(self.run_dir) or {}).get("evaluations"):
                self.record["evaluations"] = evaluations
            lineage.write(self.run_dir, self.record)

    def _describe_start(self, init_from: str, model: dict) -> None:
        loaded = newest_checkpoint(Path(init_from))
        settings = (model, self.config.seed, self.config.tracking.digests)
        entry = self._safely(lineage.of_model, init_from, loaded, *settings)
        if entry:
            self.record["inputs"].insert(0, entry)
        self._safely(self.save)
        self.tracker.inputs()

    def _describe(self, path: Path) -> None:
        self._safely(self._record_checkpoint, path)

    def _record_checkpoint(self, path: Path) -> None:
        entry = self._checkpoint(path)
        others = [output for output in self.record["outputs"] if output["path"] != str(path)]
        self.record["outputs"] = sorted([*others, entry], key=lambda output: output["metadata"]["step"])
        self._choose()
        self.save()
        with contextlib.suppress(OSError):  # it may have been rotated away
            lineage.write(path, self.record | {"outputs": [entry]})
        self.tracker.output(entry, entry["aliases"])

    def _checkpoint(self, path: Path) -> dict:
        files = digests.describe(path, lineage.inside(path), self.config.tracking.digests)
        step = step_of(path)
        metadata = {
            "step": step,
            "validation_loss": self.losses.get(step),
            "model": self.config.model.name,
            "inputs": {entry["artifact"]: entry["digest"] for entry in self.record["inputs"]},
        }
        return lineage.artifact(MODEL, path, files, metadata, aliases=[])

    def _choose(self) -> list[dict]:
        """Give every output its aliases; returns the best one if it has changed."""
        outputs = self.record["outputs"]
        for output in outputs:
            output["metadata"]["validation_loss"] = self.losses.get(output["metadata"]["step"])
        scored = [output for output in outputs if output["metadata"]["validation_loss"] is not None]
        best = min(scored, key=lambda output: output["metadata"]["validation_loss"], default=None)
        for output in outputs:
            step = output["metadata"]["step"]
            output["aliases"] = [
                *(("best",) if output is best else ()),
                *(("latest",) if output is outputs[-1] else ()),
                f"iter-{step}",
            ]
        changed = best is not None and best["path"] != self.best
        self.best = best["path"] if best else None
        return [best] if changed else []

    def _safely(self, function: Callable, *arguments: Any) -> Any:
        """Nothing that goes wrong in keeping records may end a training run."""
        try:
            return function(*arguments)
        except BaseException as error:  # in a thread: there is nobody to pass it on to
            with contextlib.suppress(Exception):
                self.say(f"lineage: {first_line(error)}")
            return None


def validation_losses(run_dir: Path, outputs: list[dict], reached: int) -> dict[int, float]:
    """By step, of a run that goes on from step `reached`: what its lineage knows, and what metrics.jsonl does.

    A validation is in metrics.jsonl at once, and in the lineage when the next checkpoint is or the run ends; the run
    may have been killed in between.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    known = [output["metadata"] for output in outputs]
    known += [line for line in metrics if "validation_loss" in line and line["step"] <= reached]
    return {line["step"]: line["validation_loss"] for line in known if line["validation_loss"] is not None}


def resolve_names(config: TrainConfig, rank: int, world_size: int) -> None:
    """Replace wandb: names in data.path and init_from by paths. Rank 0 resolves them for all. Raises UserError."""
    names = [config.data.path, config.init_from]
    if not any(name.startswith("wandb:") for name in names):
        return
    if rank == 0:
        names = [resolve(name, config.tracking, config.output_dir) for name in names]
    if world_size > 1:
        import torch

        torch.distributed.broadcast_object_list(names, src=0)
    config.data.path, config.init_from = names
