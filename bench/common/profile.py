"""A torch profile in a few numbers."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

KINDS = (
    ("communication", r"nccl"),
    ("optimizer", r"multi_tensor|adam|l2norm|lpnorm|^_update$|^_squares$"),
    ("attention", r"sdpa|flash|fmha|mha_"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitk|^_multiply"),
    ("copies and fills", r"memcpy|memset|fillfunctor|direct_copy|copy_kernel"),
)
SYNCHRONISE = re.compile(r"cuda(Stream|Event|Device)Synchronize|cudaMemcpy$")


def summarise(profile: Any, steps: int) -> dict:
    """GPU time by kind of kernel, the host's waiting and launching, and the busiest entries, all in ms per step."""
    events = profile.events()
    kernels = [
        event
        for event in events
        if "cuda" in str(event.device_type).lower() and not getattr(event, "is_user_annotation", False)
    ]
    host = [event for event in events if "cuda" not in str(event.device_type).lower()]
    kinds, times, counts = Counter(), Counter(), Counter()
    for event in kernels:
        kinds[kind_of(event.name)] += _milliseconds(event) / steps
        times[event.name[:90]] += _milliseconds(event) / steps
        counts[event.name[:90]] += 1 / steps
    calls = Counter()
    for event in host:
        if event.name.startswith("cu"):
            calls[event.name] += _milliseconds(event) / steps
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    return {
        "steps": steps,
        "wall_ms": (max(stop for _, stop in spans) - spans[0][0]) / 1000 / steps if spans else 0.0,
        "gpu_busy_ms": covered(spans) / 1000 / steps,
        "gpu_ms": dict(kinds.most_common()),
        "launches": sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in host) / steps,
        "host_waits_for_gpu_ms": sum(_milliseconds(event) for event in host if SYNCHRONISE.match(event.name)) / steps,
        "host_ms": dict(calls.most_common(12)),
        "kernels": [[name, counts[name], spent] for name, spent in times.most_common(25)],
    }


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "norms, activations, loss")


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    total = end = 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _milliseconds(event: Any) -> float:
    return event.time_range.elapsed_us() / 1000
