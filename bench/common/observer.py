"""Bridge's training loop, observed: where the host's time goes in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from common.clock import Clock
from nemotron_sft.train.step import ForwardStep


class TimedStep:
    """A forward step that counts how long it waits for batches: `waited`, in seconds since the start."""

    def __init__(self, step: Callable):
        self.step, self.waited = step, 0.0

    def __call__(self, state, data_iterator, model, return_schedule_plan: bool = False):
        timed = None if data_iterator is None else self._timed(data_iterator)
        return self.step(state, timed, model, return_schedule_plan)

    def _timed(self, batches: Iterator) -> Iterator:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch


class CountingStep(ForwardStep):
    """This repository's forward step, whose counts survive `reset`, which Progress calls for every line it writes."""

    def __init__(self):
        self.tokens, self.skipped_flops, self.waited = 0, 0.0, 0.0
        self._before = (0, 0.0, 0.0)
        super().__init__()

    def reset(self) -> None:
        self._before = self.so_far()
        super().reset()

    def so_far(self) -> tuple[int, float, float]:
        """Of all steps: tokens, FLOPs left out for tokens without a loss, and seconds that batches were waited for."""
        tokens, skipped, waited = self._before
        return tokens + self.tokens, skipped + self.skipped_flops, waited + self.waited


class StepFromMemory(CountingStep):
    """The same, but the first batches are kept in GPU memory and served over and over: what a loader could cost."""

    KEPT = 16

    def __init__(self):
        super().__init__()
        self._held: list[dict] = []
        self._served = 0

    def __call__(self, state, data_iterator, model, return_schedule_plan: bool = False):
        return super().__call__(state, self._from_memory(data_iterator), model, return_schedule_plan)

    def _from_memory(self, batches: Iterator[dict]) -> Iterator[dict]:
        while True:
            if len(self._held) < self.KEPT:
                batch = next(batches)
                self._held.append({k: v.cuda() if hasattr(v, "cuda") and v.dim() else v for k, v in batch.items()})
            self._served += 1
            yield self._held[self._served % len(self._held)]


class Observer:
    """Callbacks of Bridge's loop that feed a Clock: host seconds in forward + backward, optimizer, data, logging.

    waited(): seconds that batches were waited for since the start. change(name, context): switches the running job to
    the setting of the next segment.
    """

    def __init__(self, clock: Clock, waited: Callable[[], float], change: Callable[[str, Any], None]):
        self.clock, self.waited, self.change = clock, waited, change
        self.optimizer = self.waited_before = 0.0
        self.begin = self.logged = time.perf_counter()

    def register(self, manager) -> None:
        """Let Bridge's CallbackManager call this observer."""
        for event in ("on_train_start", "on_train_step_start", "on_train_step_end"):
            manager.register(event, getattr(self, event))

    def on_train_start(self, context) -> None:
        """Time the optimizer, which has no callback of its own."""
        step = context.optimizer.step

        def timed():
            start = time.perf_counter()
            result = step()
            self.optimizer = time.perf_counter() - start
            return result

        context.optimizer.step = timed

    def on_train_step_start(self, context) -> None:
        self.begin = time.perf_counter()

    def on_train_step_end(self, context) -> None:
        """Tell the clock, and change what the next segment changes."""
        now, waited_now = time.perf_counter(), self.waited()
        waited = waited_now - self.waited_before
        parts = {
            "forward, backward": now - self.begin - self.optimizer - waited,
            "waiting for data": waited,
            "optimizer": self.optimizer,
            "between steps": self.begin - self.logged,
        }
        self.logged, self.waited_before = now, waited_now
        begins = self.clock.tick(**parts)
        self.clock.losses.append(context.loss_dict["lm loss"])
        if begins:
            self.change(begins, context)
