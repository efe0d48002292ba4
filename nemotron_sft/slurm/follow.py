"""Following submitted jobs to their end."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Task:
    """A job, or one element of an array, to be followed."""

    id: str
    label: str
    log: Path
    exit: Path
    quiet: bool
    read: int = 0  # bytes of the log that were shown
    status: int | None = None
    missing: int = field(default=0, repr=False)  # polls that did not find it in the queue


TICK, POLL = 0.5, 5.0  # seconds between looks at the files, and at the queue
OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


def follow(tasks: list[Task]) -> int:
    """Show the tasks' output until all have ended; the exit status of the first that failed, or 0.

    A job tells its end by its exit file. The queue is asked only to notice jobs that could not write one: cancelled
    before they started, or on a node that died.
    """
    asked, reason, done = time.monotonic() - POLL + 1, "", 0
    try:
        while open_tasks := [task for task in tasks if task.status is None]:
            for task in open_tasks:
                if not task.quiet:
                    show(task)
                if text := read(task.exit).strip():
                    task.status = int(text)
                    finish(task)
            if time.monotonic() - asked >= POLL:
                asked = time.monotonic()
                reason = ask(open_tasks, reason)
                quiet = [task for task in tasks if task.quiet]
                ended = sum(task.status is not None for task in quiet)
                if ended != done:
                    done = ended
                    print(f"{done} of {len(quiet)} shards done", flush=True)
            time.sleep(TICK)
    except KeyboardInterrupt:
        jobs = " ".join(sorted({task.id.split("_")[0] for task in tasks}))
        print(f"\nno longer following; the job goes on (scancel {jobs} ends it)", file=sys.stderr)
        return 130
    return next((task.status for task in tasks if task.status), 0)


def read(path: Path, start: int = 0) -> str:
    """The text of a file from byte `start` on; nothing if it does not exist (yet)."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def show(task: Task, everything: bool = False) -> None:
    """Print the whole lines that a task's log has gained; `everything`: also a last one without an end."""
    text = read(task.log, task.read)
    if not everything:
        text = text[: text.rfind("\n") + 1]
    task.read += len(text.encode())
    for line in text.splitlines():
        print(f"{task.label}{line}", flush=True)


def finish(task: Task) -> None:
    """Show the rest of a log; of a quiet task only if it failed, and then its end."""
    if not task.quiet:
        show(task, everything=True)
    elif task.status:
        print(f"{task.label} (job {task.id}) failed; {task.log} ends:")
        print("\n".join(read(task.log).splitlines()[-30:]), flush=True)


def ask(tasks: list[Task], reason: str) -> str:
    """Look the tasks up in the queue. Prints why one is waiting if that is news; returns it.

    A task that is twice not there, and has no exit file, has ended some other way.
    """
    ids = ",".join(sorted({task.id.split("_")[0] for task in tasks}))
    queue = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T %r", "-j", ids], capture_output=True, text=True)
    if queue.returncode and "Invalid job id" not in queue.stderr:
        return reason  # Slurm does not answer at the moment
    lines = [line.split(maxsplit=2) for line in queue.stdout.splitlines()]
    states = {line[0]: line[1:] for line in lines if line[1] not in OVER}
    for task in tasks:
        if task.id in states:
            task.missing = 0
            continue
        task.missing += 1
        if task.missing > 1 and task.status is None and not read(task.exit):
            task.status = 1
            finish(task)
            print(f"{task.label}job {task.id} ended as {final_state(task.id)}", flush=True)
    waiting = [state[1] for state in states.values() if state[0] == "PENDING" and state[1:] != ["Dependency"]]
    if waiting and waiting[0] not in (reason, "None"):
        print(f"waiting in the queue: {waiting[0]}", flush=True)
        return waiting[0]
    return reason


def final_state(job: str) -> str:
    """How Slurm says a job ended: CANCELLED, NODE_FAIL, ...; from its memory, or else from accounting."""
    for command in (["scontrol", "-o", "show", "job", job], ["sacct", "-n", "-X", "-P", "-o", "State", "-j", job]):
        try:
            told = subprocess.run(command, capture_output=True, text=True).stdout
        except FileNotFoundError:
            continue
        if found := re.search(r"JobState=(\S+)", told) or re.search(r"^([A-Z_]+)", told):
            return found[1]
    return "unknown to Slurm"
