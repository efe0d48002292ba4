"""Chat data -> packed training data.

    plan       the inputs, cut into work units                          nothing written      plan.py
    run_unit   records -> template -> tokens, one spool file per unit   any process          units.py
    merge      split, pack, write                                       once all units are done              merge.py

    output/data/NAME/
        spool/KEY.spool      tokens of one unit; gone once the output is complete
        training.npy  validation.npy  test.npy
        report.html
        metadata.json        written last: without it the output does not exist

A rerun after any kind of death continues where the last one stopped. Units are merged in a fixed order, so
the number of workers leaves no trace in the output.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from nemotron_sft.config import Prep
from nemotron_sft.console import progress, say
from nemotron_sft.data import plan as plans
from nemotron_sft.data.forms import listed
from nemotron_sft.data.merge import merge
from nemotron_sft.data.ngrams import WORDS
from nemotron_sft.data.packed import read_metadata
from nemotron_sft.data.packing import pack
from nemotron_sft.data.plan import Plan, Unit
from nemotron_sft.data.tokens import preload
from nemotron_sft.data.units import run_unit, trusted
from nemotron_sft.errors import UserError


def run(cfg: Prep) -> dict:
    """Prepare the data that `cfg` describes and return its metadata (docs/format.md lists the fields).

    An output that exists already is left alone. Besides what metadata.json holds there are "directory", the
    output's, and "unchanged", whether it was left alone.
    Raises UserError for anything the user can fix; the output then does not exist, and a rerun continues.
    """
    started = time.monotonic()
    inputs = plans.find_inputs(cfg)
    directory = plans.output_directory(cfg, inputs.name)
    workers = cfg.workers or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        pool = None
        if (
            workers > 1
            and inputs.bytes > plans.UNIT_BYTES
            and (cfg.force or not (directory / "metadata.json").exists())
        ):
            pool = stack.enter_context(start_workers(workers, cfg))  # they get ready while the plan is made
        todo = plans.plan(cfg, inputs)
        stack.enter_context(disk_errors(directory))
        stack.enter_context(locked(directory))
        if cfg.force:
            if cfg.shards == 1:  # otherwise the shards have started over
                shutil.rmtree(directory / "spool", ignore_errors=True)
        elif found := finished(todo):
            return {**found, "directory": str(directory), "unchanged": True}
        describe_inputs(todo)
        if workers > 1 and not pool and len(waiting(todo, todo.units)) > 1:
            pool = stack.enter_context(start_workers(workers, cfg))
        run_units(todo, pool)
        metadata = merge(cfg, todo, started, threads=min(4, workers))
        return {**metadata, "directory": str(directory), "unchanged": False}


def run_shard(cfg: Prep) -> str:
    """Tokenize the units of one share, cfg.shard of cfg.shards, and return what was done in words.

    Shares can run at the same time on any machines that see the directory. `run` with the same settings merges
    them, after doing what a lost share has left undone. Raises UserError.
    """
    if cfg.shard is None or not 0 <= cfg.shard < cfg.shards:
        raise UserError(f"shard={cfg.shard} is not one of the {cfg.shards} shards: take 0 .. {cfg.shards - 1}")
    todo = plans.plan(cfg)
    mine = todo.units[cfg.shard :: cfg.shards]
    with ExitStack() as stack:
        stack.enter_context(disk_errors(todo.directory))
        stack.enter_context(locked(todo.directory, shared=True))
        if cfg.force:
            for unit in mine:
                todo.spool(unit).unlink(missing_ok=True)
        elif finished(todo):
            return f"nothing changed: {todo.directory} is up to date"
        workers = min(cfg.workers or len(os.sched_getaffinity(0)), len(waiting(todo, mine)))
        run_units(todo, stack.enter_context(start_workers(workers, cfg)) if workers > 1 else None, mine)
    return f"shard {cfg.shard} of {cfg.shards}: {len(mine)} of {len(todo.units)} units in {todo.directory / 'spool'}"


def describe_inputs(todo: Plan) -> None:
    """Say how each dataset is read, and what it is compared with, one line each."""
    for dataset, form in zip(todo.datasets, todo.forms, strict=True):
        unread = f"; not read: {listed(form.unread)}" if form.unread else ""
        if keys := [key for key in form.unread_keys if key not in todo.template.source]:
            unread += f"; not read of messages: {listed(keys)}"
        say(f"dataset {dataset.name}: {form}{'' if dataset.form else ', by its first records'}{unread}")
    if todo.evaluation:
        about = todo.evaluation.describe()
        short = f"; {about['too_short']:,} are too short to be found again" if about["too_short"] else ""
        found = f"{about['records']:,} records, {about['runs']:,} runs of {WORDS} words"
        say(f"decontaminate: {', '.join(about['files'])}: {found}{short}")


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = os.strerror(error.errno).lower()
            raise UserError(f"{place}: {reason}; make room or set output_dir, then rerun") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            reason = os.strerror(error.errno).lower()
            raise UserError(f"cannot write {place}: {reason}; set output_dir") from None
        raise


@contextmanager
def locked(directory: Path, shared: bool = False) -> Iterator[None]:
    """One preparation at a time in a directory, or any number of its shards. The lock goes with the process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {directory}: {os.strerror(error.errno or 0).lower()}; set output_dir") from None
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory} is in use by another prep: wait, or set output_dir") from None
        yield


def finished(todo: Plan) -> dict | None:
    """The metadata of a whole output that this very plan produced, or None."""
    try:
        metadata = read_metadata(todo.directory)
    except UserError:
        return None
    if metadata.get("fingerprint") != todo.fingerprint:
        return None
    for part in metadata["splits"].values():
        path = todo.directory / (part["file"] or "")
        if part["file"] and not (path.is_file() and path.stat().st_size == part["bytes"]):
            return None
    return metadata


def waiting(todo: Plan, units: Sequence[Unit]) -> list[Unit]:
    """Those of the units that have no spool file yet."""
    return [unit for unit in units if not todo.spool(unit).exists()]


def run_units(todo: Plan, pool: Executor | None = None, mine: Sequence[Unit] | None = None) -> None:
    """Run the units that have no spool file yet, in the processes of `pool` or else here.

    `mine`: only those; other processes, here or elsewhere, do the others meanwhile.
    """
    folder = todo.directory / "spool"
    folder.mkdir(exist_ok=True)
    if mine is None:
        wanted = {todo.spool(unit).name for unit in todo.units}
        for path in folder.iterdir():  # left by a killed process or by other settings
            if path.name not in wanted:
                path.unlink()
    chosen = todo.units if mine is None else mine
    missing = waiting(todo, chosen)
    if not missing:
        return
    todo = trusted(todo, pool)
    total = sum(unit.bytes for unit in chosen)
    tokens, started = 0, time.monotonic()
    with progress("tokenizing", total) as advance:
        advance(total - sum(unit.bytes for unit in missing))
        for unit, stats in _each(todo, missing, pool):
            tokens += stats["tokens"]
            advance(unit.bytes, f"{tokens / (time.monotonic() - started):,.0f} tokens/s")


def _each(todo: Plan, units: list[Unit], pool: Executor | None) -> Iterator[tuple[Unit, dict]]:
    """(unit, statistics) of every unit, as they are done."""
    if not pool:
        for unit in units:
            yield unit, run_unit(todo, unit)
        return
    settings = replace(todo, units=(), files=())  # the lists would be sent along with every unit
    futures = {pool.submit(run_unit, settings, unit): unit for unit in units}
    pack(np.ones(1, np.int32), 1)  # loads compiled code, half a second that would otherwise follow the units
    for future in as_completed(futures):
        yield futures.pop(future), future.result()


@contextmanager
def start_workers(count: int, cfg: Prep) -> Iterator[Executor]:
    """Worker processes that are opening the tokenizer. They end with the `with` block, or with this process.

    Raises UserError if one of them is killed.
    """
    # A fork server: workers start with the modules imported, and without this process's threads and locks.
    context = get_context("forkserver")
    context.set_forkserver_preload(["nemotron_sft.data.units"])
    pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(plans.tokenizer_path(cfg),))
    try:
        for _ in range(count):
            pool.submit(os.getpid)  # a process is started when there is something for it to do
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, by hand or for lack of memory: rerun to continue, with fewer "
            "workers (workers=N) if memory is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: str) -> None:
    """Set up a worker: it leaves Ctrl-C to its parent, and ends when the parent ends, whatever the cause."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    preload(tokenizer)
