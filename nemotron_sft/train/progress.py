"""What a person sees of a run, and metrics.jsonl: callbacks of Megatron-Bridge's training loop."""

from __future__ import annotations

import gc
import json
import math
import time
from pathlib import Path
from typing import TextIO

from nemotron_sft.errors import UserError
from nemotron_sft.files import AtomicFile
from nemotron_sft.train.batches import dataset_names
from nemotron_sft.train.start import this_machine

# Dense bf16 matrix products in FLOP/s, from NVIDIA's data sheets. The first name found in the device's counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "H20": 148e12,
    "GB200": 2500e12, "B200": 2250e12, "GB300": 2500e12, "B300": 2250e12, "A100": 312e12, "L40S": 362e12,
}  # fmt: skip


class Progress:
    """Callbacks that print one progress line and write one JSON line per logged step.

    metrics.jsonl: {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"} for training,
    {"step", "validation_loss"} and {"step", "test_loss"} for evaluation, {"step", "score/NAME", ...} for the prompts of
    heldout.path. Losses are means over trained tokens, in
    nats; seconds count from the start of the process.

    The other fields of a training line are means over the steps since the last one: step_ms;
    trained_fraction (of the tokens, padding included, those with a loss); data_wait_ms; and on a GPU
    tokens_per_second_per_gpu, tflops_per_gpu, mfu (tflops_per_gpu over PEAK_FLOPS), and peak_memory_gib so far.
    FLOPs are Megatron-Bridge's count (training/utils/flop_utils.py): 6 per parameter of a matrix product and token,
    and causal attention inside each document, 6 * layers * hidden * length. Recomputed activations don't count, nor
    does what `step` left out.

    By dataset, of the step that the line is about: loss/NAME and trained_tokens/NAME, and in lines of evaluations
    validation_loss/NAME, validation_tokens/NAME, test_loss/NAME, test_tokens/NAME. A dataset without a trained token in
    the step is left out. The mean of these losses over their tokens is the loss. Where tokens are weighted
    (train.loss_per, weights in the data) it is their mean by loss_share/NAME, validation_share/NAME, test_share/NAME.

    Raises UserError at the first logged loss that is not a number, naming the packs read since the last line.
    """

    def __init__(self, metadata: dict, run_dir: Path, terminal, started: float, rank: int, consumed):
        self.consumed = consumed  # step.ForwardStep
        self.datasets = dataset_names(metadata)
        split = metadata["splits"]["training"]
        self.tokens_per_pack = split["tokens"] / max(1, split["packs"])
        self.run_dir, self.terminal, self.started, self.rank = run_dir, terminal, started, rank
        self.first_step: float | None = None
        self.losses: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.test: float | None = None
        self.tokens = 0.0
        self._printed = -5.0
        self.tracked = None  # tracking.Training

    def register(self, manager) -> None:
        """Let Bridge's CallbackManager call this."""
        for event in ("on_train_start", "on_train_step_end", "on_eval_end", "on_test_end"):
            manager.register(event, getattr(self, event))
        for event in ("on_train_step_start", "on_eval_start", "on_test_start"):
            manager.register(event, lambda context: self.consumed.losses.reset())

    def on_train_start(self, context) -> None:
        """Note where the run begins, and open metrics.jsonl."""
        state = context.state
        if state.cfg.train.manual_gc:  # what is alive now stays: later collections need not walk through all of it
            gc.collect()
            gc.freeze()
        self.total = state.cfg.train.train_iters
        self.begin = state.train_state.step
        self.tokens_per_step = self.tokens_per_pack * state.cfg.train.global_batch_size
        self.since = self.begin
        self._start_interval(state)
        self._metrics = self._continued() if self.rank == 0 else None

    def _continued(self) -> TextIO:
        """metrics.jsonl, open behind the line of the step that training goes on from.

        A run that was killed leaves lines of later steps, which will be trained again, and perhaps half a line.
        """
        path = self.run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= self.begin]
        for line in kept:
            for name, found in (("loss", self.losses), ("validation_loss", self.validation)):
                if name in line:
                    found.append((line["step"], line[name]))
            if "test_loss" in line and line["step"] == self.total:
                self.test = line["test_loss"]
        with AtomicFile(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        return path.open("a")

    def on_train_step_end(self, context) -> None:
        """Print and write a line whenever one is due. Raises UserError for a loss that is no number."""
        step = context.state.train_state.step + 1  # Bridge counts after this callback
        if self.first_step is None:
            self.first_step = time.time() - self.started
        interval = context.state.cfg.logger.log_interval
        if step % interval and step != self.total:
            return
        state, grad_norm = context.state, context.grad_norm
        loss = from_last_stage(context.loss_dict)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {step} is {loss}: look at packs {sorted(set(self.consumed.packs))} of training.npy "
                f"(recipes/show.py DIR --pack N), lower optimizer.lr, or resume from an earlier checkpoint"
            )
        elapsed, steps = time.perf_counter() - self.clock, step - self.since
        speed = steps * self.tokens_per_step / elapsed
        self.tokens = (step - self.begin) * self.tokens_per_step
        self.losses.append((step, loss))
        self._write(
            state,
            step=step,
            loss=loss,
            lr=context.optimizer.param_groups[0]["lr"],
            grad_norm=None if grad_norm is None else float(grad_norm),
            tokens_per_second=round(speed, 1),
            step_ms=round(1000 * elapsed / steps, 2),
            trained_fraction=round(self.consumed.trained / max(1, self.consumed.tokens), 4),
            data_wait_ms=round(1000 * self.consumed.waited / steps, 3),
            **self._gpu(state, speed, elapsed),
            **self._by_dataset(state, "loss", "trained_tokens", "loss_share"),
            seconds=round(time.time() - self.started, 3),
        )
        self.since = step
        self._start_interval(state)
        average = (
            self.tokens / max(1e-9, time.time() - self.started - self.first_step) if step > self.begin + 1 else speed
        )
        left = (self.total - step) * self.tokens_per_step / average
        self._line(
            f"{100 * step / self.total:3.0f}%  step {step}/{self.total}  loss {loss:.4f}  "
            f"{speed:,.0f} tok/s  {_clock(left)} left",
            done=step == self.total,
        )

    def _start_interval(self, state) -> None:
        self.clock = time.perf_counter()
        self.flops = state.train_state.floating_point_operations_so_far
        self.consumed.reset()

    def _gpu(self, state, speed: float, elapsed: float) -> dict[str, float]:
        """The fields that only a GPU has."""
        import torch

        if this_machine().on_cpu:
            return {}
        name = torch.cuda.get_device_name()
        world = torch.distributed.get_world_size()
        # Bridge adds a step's FLOPs after this callback, so the count runs one step behind the clock.
        flops = (state.train_state.floating_point_operations_so_far - self.flops) / elapsed / world
        flops -= self.consumed.skipped_flops / elapsed  # no work done
        peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
        return {
            "tokens_per_second_per_gpu": round(speed / world, 1),
            "tflops_per_gpu": round(flops / 1e12, 1),
            "mfu": None if peak is None else round(flops / peak, 4),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }

    def _by_dataset(self, state, loss: str, tokens: str, share: str) -> dict[str, float]:
        """The fields by dataset, named as given. All ranks call it, since each has a part of the losses."""
        if not self.datasets:
            return {}
        values: dict[str, float] = {}
        totals = self.consumed.losses.totals(len(self.datasets))
        whole = sum(weight for _, weight, _ in totals)
        for name, (mean, weight, trained) in zip(self.datasets, totals, strict=True):
            if trained:
                values |= {f"{loss}/{name}": mean, f"{tokens}/{name}": trained}
                values |= {f"{share}/{name}": weight / whole} if state.cfg.dataset.weighted else {}
        return values

    def on_eval_end(self, context) -> None:
        """Write the validation loss."""
        step, loss = context.state.train_state.step, from_last_stage(context.total_loss_dict)
        # Before the return: all ranks take part, and only the first has read what was written before.
        by_dataset = self._by_dataset(context.state, "validation_loss", "validation_tokens", "validation_share")
        if self.validation and self.validation[-1][0] == step:
            return  # Bridge validates once more after the last step; so does a finished run, started again
        self.validation.append((step, loss))
        self._write(context.state, step=step, validation_loss=loss, **by_dataset)
        self._line(f"      step {step}  validation loss {loss:.4f}", done=True)
        self._start_interval(context.state)  # the evaluation's time is not the next step's
        self.since = step

    def on_test_end(self, context) -> None:
        """Write the test loss."""
        loss = from_last_stage(context.total_loss_dict)
        by_dataset = self._by_dataset(context.state, "test_loss", "test_tokens", "test_share")
        if self.test is not None:
            return  # a finished run, started again
        self.test = loss
        self._write(context.state, step=context.state.train_state.step, test_loss=self.test, **by_dataset)

    def scored(self, state, step: int, scores: dict[str, float], answers: tuple[list[str], list[list[str]]]) -> None:
        """Record the scores of an evaluation, whose time is not the next step's.

        answers: columns and rows of what was asked and answered.
        """
        self._write(state, step=step, **{f"score/{name}": score for name, score in scores.items()})
        if self.rank == 0:
            self.tracked.answers(step, *answers)
        self._line(
            f"      step {step}  " + "  ".join(f"{name} {score:.1%}" for name, score in scores.items()), done=True
        )
        self._start_interval(state)
        self.since = step

    def _write(self, state, **values) -> None:
        ours = state.cfg.logger.skip_train_metrics_log  # otherwise Bridge writes those that are not by dataset
        for name, value in values.items() if state.tensorboard_logger else ():
            if name != "step" and value is not None and (ours or "/" in name):
                state.tensorboard_logger.add_scalar(name, value, values["step"])
        if self._metrics:
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
            self.tracked.log(**values)

    def _line(self, text: str, done: bool) -> None:
        """On a terminal one line that rewrites itself, elsewhere a line at most every 5 s."""
        if self.rank:
            return
        if self.terminal.isatty():
            print(f"\r\033[K{text}", end="\n" if done else "", file=self.terminal, flush=True)
        elif done or time.monotonic() - self._printed >= 5:
            self._printed = time.monotonic()
            print(text, file=self.terminal, flush=True)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, none if there is no such file; half a line at its end is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def from_last_stage(losses: dict | None) -> float:
    """The loss, on every rank: with pipeline parallelism only the last stage, and so the last rank, has it."""
    import torch
    from megatron.core.parallel_state import get_pipeline_model_parallel_world_size

    loss = losses["lm loss"].float() if losses else torch.zeros((), device="cuda")
    if get_pipeline_model_parallel_world_size() > 1:
        loss = loss.reshape(()).clone()
        torch.distributed.broadcast(loss, torch.distributed.get_world_size() - 1)
    return loss.item()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
