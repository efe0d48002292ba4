"""Ends of steps on the GPU's clock and on the host's."""

from __future__ import annotations

import functools
import statistics
import time

from common.profile import summarise


class HostEvent:
    """Stands in for a CUDA event when a benchmark itself is tried on a CPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1000 * (end.time - self.time)


class Clock:
    """Times of steps, and what the host did in each of them.

    Each segment (a named setting) has warm_up + steps steps; profiled ones follow the last.
    """

    def __init__(self, segments: list[str], warm_up: int, steps: int, profiled: int):
        self.segments, self.warm_up, self.steps, self.profiled = segments, warm_up, steps, profiled
        self.events, self.host, self.losses = [], [], []
        self.profile = None
        self.memory = 0

    @property
    def total(self) -> int:
        """Steps to run."""
        return len(self.segments) * (self.warm_up + self.steps) + (self.profiled + 2 if self.profiled else 0)

    def tick(self, **parts: float) -> str | None:
        """A step has ended; parts are host seconds. Returns the name of the segment that begins now, if one does."""
        import torch

        on_gpu = _on_gpu()
        event = torch.cuda.Event(enable_timing=True) if on_gpu else HostEvent()
        event.record()
        self.events.append(event)
        self.host.append(parts)
        done, length = len(self.events), self.warm_up + self.steps
        if done == length * len(self.segments) and on_gpu:
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated()
        if self.profiled and done == length * len(self.segments) + 1:
            self.profile = torch.profiler.profile()
            self.profile.start()
        if self.profile and done == length * len(self.segments) + 1 + self.profiled:
            torch.cuda.synchronize()
            self.profile.stop()
        if done % length == 0 and done // length < len(self.segments):
            return self.segments[done // length]
        return None

    def results(self) -> dict:
        """Milliseconds per segment, peak memory, the profile if there is one, and the loss of every step."""
        import torch

        if _on_gpu():
            torch.cuda.synchronize()
        found = {name: self._segment(number) for number, name in enumerate(self.segments)}
        name = torch.cuda.get_device_name() if _on_gpu() else "CPU"
        losses = [float(loss) for loss in self.losses]
        result = {"segments": found, "peak_gib": self.memory / 2**30, "gpu": name, "losses": losses}
        if self.profile:
            result["profile"] = summarise(self.profile, self.profiled)
        return result

    def _segment(self, number: int) -> dict:
        first = number * (self.warm_up + self.steps) + self.warm_up
        window = range(first, first + self.steps)
        times = [self.events[i - 1].elapsed_time(self.events[i]) for i in window]
        return {
            "ms": statistics.median(times),
            "mean_ms": statistics.fmean(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
            "steps": self.steps,
            "host_ms": {key: statistics.median(1000 * self.host[i][key] for i in window) for key in self.host[first]},
        }


@functools.cache
def _on_gpu() -> bool:
    """Whether there is a GPU, and not the CPU that answers for one (nemotron_sft/train/compat/cuda.py)."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_name() != "CPU"
