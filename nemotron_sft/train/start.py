"""What comes before Megatron: its imports made possible on this machine, and its output sent to a file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path

from nemotron_sft.errors import UserError


def start_bridge() -> bool:
    """Make Megatron-Bridge importable, on what this machine has; returns whether that is only a CPU."""
    import torch

    from nemotron_sft.train.compat.slim import slim_imports

    slim_imports()
    if torch.cuda.is_available():
        from nemotron_sft.train.compat.gpu import use_gpu

        use_gpu()
        return False
    from nemotron_sft.train.compat.cpu import use_cpu

    use_cpu()
    return True


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
