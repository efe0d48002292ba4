"""SIGTERM during training: finish the step, save a checkpoint, and leave in a way that says so."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def saving_on_sigterm(container, run_dir: Path, rank: int, terminal) -> Iterator[None]:
    """Around Megatron-Bridge's training loop: on SIGTERM it saves and exits, here with status 143 (128 + SIGTERM).

    Bridge agrees on the signal across ranks after every step, saves, and exits with 0, as it does when the user's
    own train.exit_interval or exit_duration_in_mins is reached. Only an unfinished run may not pass for a finished
    one, so the status is changed; a run that the user ended is left as it is.
    """
    train = container.train
    train.exit_signal_handler, train.exit_signal = True, signal.SIGTERM
    try:
        yield
    except SystemExit as stop:
        if stop.code or train.exit_interval or train.exit_duration_in_mins:
            raise
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # Slurm kills the other ranks as soon as the first has left
        if rank == 0:
            print(f"told to stop: saved a checkpoint; run_dir={run_dir} goes on from it", file=terminal, flush=True)
        sys.exit(128 + signal.SIGTERM)
