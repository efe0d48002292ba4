"""What comes before Megatron: its imports made possible on this machine, and its output sent to a file."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from nemotron_sft.errors import UserError
from nemotron_sft.train.compat.cpu import use_cpu
from nemotron_sft.train.compat.gpu import use_gpu
from nemotron_sft.train.compat.slim import slim_imports
from nemotron_sft.train.versions import check_versions


@dataclass(frozen=True)
class Machine:
    """What this process computes on, and its place among the processes of the run."""

    gpu_bytes: int | None  # memory of one GPU; None: the CPU computes
    rank: int = 0
    world_size: int = 1

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes."""
        return self.gpu_bytes is None

    @property
    def backend(self) -> str:
        """Of torch.distributed."""
        return "gloo" if self.on_cpu else "nccl"


@functools.cache
def this_machine() -> Machine:
    """Looked at once, before CUDA may seem to be there; on a GPU this chooses the one that the process works on."""
    import torch

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return Machine(None, rank, world_size)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return Machine(torch.cuda.get_device_properties().total_memory, rank, world_size)


def start_bridge() -> Machine:
    """Make Megatron-Bridge importable, on what this machine has."""
    machine = this_machine()
    check_versions(not machine.on_cpu)
    slim_imports()
    if machine.on_cpu:
        use_cpu()
    else:
        use_gpu()
    return machine


@contextlib.contextmanager
def log_to_file(path: Path):
    """Send everything this process and its children print to a file; yield the terminal that was stdout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(saved[0]), "w", buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.dup2(log, 1), os.dup2(log, 2)
        yield terminal
    except UserError:
        raise
    except Exception as error:
        if "No space left on device" in "".join(traceback.format_exception(error)):
            logging.raiseExceptions = False  # W&B's own log is on that disk too, and would say so at length
            raise UserError(
                f"the disk of {path.parent.parent} is full: free some space and start again with "
                f"run_dir={path.parent.parent}, which resumes from its last whole checkpoint"
            ) from error
        terminal.write(f"failed; Megatron's log is {path}\n")
        raise
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        terminal.close()
        for descriptor in (*saved, log):
            os.close(descriptor)
