"""How much memory is free, of this machine and for this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nemotron_sft.train.start import this_machine


def free_memory() -> int:
    """Bytes that a model may still take on this machine: of the GPU, or of memory and what limits this process."""
    import torch

    if not this_machine().on_cpu:
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    return min([free, *left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def left_in_groups(mine: Path, root: Path) -> Iterator[int]:
    """Bytes left in each control group with a limit that this process is in: a container's, a Slurm job's and step's.

    mine: /proc/self/cgroup; root: /sys/fs/cgroup. Both versions of control groups, which name their files otherwise.
    """
    with contextlib.suppress(OSError):
        for line in mine.read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind and "memory" not in kind.split(","):
                continue
            top = root / "memory" if kind else root
            used, limit = ("usage_in_bytes", "limit_in_bytes") if kind else ("current", "max")
            group = Path(path.lstrip("/"))
            for each in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # not seen from inside a container, or without a limit
                    names = (top / each / f"memory.{name}" for name in (limit, used))
                    yield int(next(names).read_text()) - int(next(names).read_text())
