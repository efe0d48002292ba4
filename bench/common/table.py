"""Results of cases as a table: ms per step, tokens/s, MFU, memory, and the busiest kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

PEAK = 989e12  # FLOP/s of an H100 or H200 in bf16


def rows_of(cases: Iterable[tuple[str, dict]], tokens: int, flops: Callable[[dict], float]) -> dict[str, dict]:
    """A row per segment of every case. tokens: of a step; flops(result): of a step, of what was computed."""
    rows = {}
    for name, part in cases:
        for segment, values in part["segments"].items():
            rows[f"{name} + {segment}" if segment else name] = {
                "ms": values["ms"],
                "tokens_per_second": tokens / values["ms"] * 1000,
                "mfu": flops(part) / values["ms"] * 1000 / PEAK,
                "peak_gib": part["peak_gib"],
            } | {key: values[key] for key in ("mean_ms", "fastest_ms", "slowest_ms", "steps", "host_ms")}
    return rows


def print_rows(rows: dict[str, dict]) -> None:
    """The table."""
    print(f"\n{'case':58} {'ms/step':>9} {'tok/s':>9} {'MFU':>7} {'peak GiB':>9}")
    for name, row in rows.items():
        print(
            f"{name:58} {row['ms']:9.1f} {row['tokens_per_second']:9,.0f} {row['mfu']:7.1%} {row['peak_gib']:9.1f}  "
            + "  ".join(f"{key} {value:.1f}" for key, value in row["host_ms"].items())
        )


def print_profiles(profiles: dict[str, dict], kernels: int) -> None:
    """The profile of every case that has one, with its busiest kernels."""
    for name, profile in profiles.items():
        print(f"\n{name}: {json.dumps({k: v for k, v in profile.items() if k != 'kernels'}, default=float)}")
        for kernel, count, spent in profile["kernels"][:kernels]:
            print(f"   {spent:8.2f} ms {count:7.1f} x {kernel}")
