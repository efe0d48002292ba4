"""A job on its node: run a recipe on the config that was frozen when the job was submitted.

    python FOLDER/code/train.py --frozen FOLDER/config-0.yaml --job FOLDER/JOB [key=value ...]

is what the sbatch scripts of nemotron_sft.slurm start, once per task. FOLDER/JOB is the prefix of what a job
leaves behind for its script:

    JOB_failure.txt            what the rank that failed first has to say
    JOB_RANK_traceback.txt     the same of every rank that failed
    JOB_stop                   the job was told to save and stop, and is to be queued again
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from nemotron_sft.console import visible
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.paths import TYPED


def run(task: Callable, arguments: list[str]) -> None:
    """Call `task` with the frozen config; exit with 2 for what the user can fix, 1 for any other error."""
    _, config, _, job, *overrides = arguments
    cfg = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_dotlist(overrides))
    typed = Path(config).with_name("command.txt")
    TYPED[:] = shlex.split(typed.read_text())[1:]  # without the interpreter
    sys.argv[1:] = TYPED[1:]
    rank = set_up_distributed()
    listen(job, rank)
    try:
        task(cfg)
    except UserError as error:
        failed(job, rank, f"error: {error}\n", 2)
    except Exception as error:
        where = f"rank {rank} on {os.uname().nodename} failed:\n"
        failed(job, rank, where + "".join(traceback.format_exception(error)), 1)


def set_up_distributed() -> int:
    """Tell torch.distributed what Slurm knows, and return this task's rank. The script sets MASTER_ADDR and _PORT."""
    rank = os.environ.get("SLURM_PROCID", "0")
    os.environ["RANK"] = rank
    os.environ["WORLD_SIZE"] = os.environ.get("SLURM_NTASKS", "1")
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    return int(rank)


def listen(job: str, rank: int) -> None:
    """Turn SIGUSR2, by which Slurm announces the time limit, into SIGTERM, with a note that the job is to go on.

    Training saves and leaves on SIGTERM (Megatron-Bridge's own handler); preparation just ends. Slurm signals a
    task's children as well, and SIGUSR2 would kill those that write a checkpoint: it is blocked, which they inherit,
    and this process takes it in a thread of its own.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    def wait() -> None:
        signal.sigwait({signal.SIGUSR2})
        if rank == 0:
            try:
                Path(f"{job}_stop").touch()
            except OSError as error:
                print(f"this job will not be queued again: {job}_stop: {first_line(error)}", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def failed(job: str, rank: int, text: str, status: int) -> None:
    """Leave `text` behind and end the process.

    The first rank to come here is the one to look at, the others only lost their connection to it. Its file has two
    names: a link is made once, and by one process only, also on network file systems.
    """
    text = visible(text)  # it ends up in a terminal, and may quote data
    own = Path(f"{job}_{rank}_traceback.txt")
    own.write_text(text)
    try:
        os.link(own, f"{job}_failure.txt")
    except FileExistsError:
        if Path(f"{job}_failure.txt").read_text() != text:
            print(f"rank {rank} failed too: {text.strip().splitlines()[-1]} ({own})", flush=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)  # no clean-up that might wait for other ranks; Slurm ends them when this one is gone
