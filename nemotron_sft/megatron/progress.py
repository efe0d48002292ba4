"""What a person sees of a run, and metrics.jsonl: callbacks of Megatron-Bridge's training loop."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Progress:
    """Callbacks that print one progress line and write one JSON line per logged step.

    metrics.jsonl: {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"} for training,
    {"step", "validation_loss"} and {"step", "test_loss"} for evaluation. Losses are means over trained tokens, in
    nats; seconds count from the start of the process.
    """

    def __init__(self, metadata: dict, run_dir: Path, terminal, started: float, rank: int):
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
        for event in ("on_train_start", "on_train_step_end", "on_eval_end", "on_test_end"):
            manager.register(event, getattr(self, event))

    def on_train_start(self, context) -> None:
        state = context.state
        self.total = state.cfg.train.train_iters
        self.begin = state.train_state.step
        self.tokens_per_step = self.tokens_per_pack * state.cfg.train.global_batch_size
        self.clock = time.perf_counter()
        self.since = self.begin
        self._metrics = (self.run_dir / "metrics.jsonl").open("a") if self.rank == 0 else None

    def on_train_step_end(self, context) -> None:
        step = context.state.train_state.step + 1  # Bridge counts after this callback
        if self.first_step is None:
            self.first_step = time.time() - self.started
        interval = context.state.cfg.logger.log_interval
        if step % interval and step != self.total:
            return
        loss = context.loss_dict["lm loss"].item() if context.loss_dict else float("nan")
        now = time.perf_counter()
        speed = (step - self.since) * self.tokens_per_step / (now - self.clock)
        self.clock, self.since = now, step
        self.tokens = (step - self.begin) * self.tokens_per_step
        self.losses.append((step, loss))
        grad_norm = context.grad_norm
        self._write(
            step=step,
            loss=loss,
            lr=context.optimizer.param_groups[0]["lr"],
            grad_norm=None if grad_norm is None else float(grad_norm),
            tokens_per_second=round(speed, 1),
            seconds=round(time.time() - self.started, 3),
        )
        average = (
            self.tokens / max(1e-9, time.time() - self.started - self.first_step)
            if step > self.begin + 1
            else speed
        )
        left = (self.total - step) * self.tokens_per_step / average
        self._line(
            f"{100 * step / self.total:3.0f}%  step {step}/{self.total}  loss {loss:.4f}  "
            f"{speed:,.0f} tok/s  {_clock(left)} left",
            done=step == self.total,
        )

    def on_eval_end(self, context) -> None:
        step, loss = context.state.train_state.step, context.total_loss_dict["lm loss"].item()
        if self.validation and self.validation[-1][0] == step:
            return  # Bridge validates once more after the last step
        self.validation.append((step, loss))
        self._write(step=step, validation_loss=loss)
        self._line(f"      step {step}  validation loss {loss:.4f}", done=True)
        self.clock = time.perf_counter()  # the evaluation's time is not the next step's

    def on_test_end(self, context) -> None:
        self.test = context.total_loss_dict["lm loss"].item()
        self._write(step=context.state.train_state.step, test_loss=self.test)

    def _write(self, **values) -> None:
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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
