"""Chat data -> packed training data.

    plan       the inputs, cut into work units                          nothing written
    run_unit   records -> template -> tokens, one spool file per unit   any process, any order, any machine
    merge      split, pack, write                                       once all units are done

    output/data/NAME/
        spool/KEY.spool      tokens of one unit; gone once the output is complete
        training.npy  validation.npy  test.npy
        report.html
        metadata.json        written last: without it the output does not exist

A unit's key is a fingerprint of its input and of every setting that shapes its tokens, and a spool file appears
under its name only when it is whole. So a rerun after any kind of death continues where the last one stopped, and
a changed setting can never pick up stale tokens. Units depend on the inputs alone and are merged in a fixed
order: the number of workers leaves no trace in the output.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_sft import __version__, sources
from nemotron_sft.blend import Dataset, load_blend
from nemotron_sft.chat import ChatError, Template
from nemotron_sft.config import Prep
from nemotron_sft.errors import UserError
from nemotron_sft.sources import File, Piece

SPLITS = ("training", "validation", "test")
LENGTH_EDGES = [0, *(2**k for k in range(4, 21))]  # of the length histogram, in tokens

UNIT_BYTES = 8 << 20  # of input: seconds of work, so that little is lost and processes stay evenly busy
MAX_UNITS = 2048  # ... but huge inputs get larger units: merging holds every spool file open
BATCH_CHARACTERS = 2 << 20  # of text tokenized in one call
CHUNK_TOKENS = 4 << 20  # of output assembled at once

CHOSEN = ("longer than pack_size", "no trained token within pack_size")  # drops that the settings ask for


@dataclass(frozen=True)
class Unit:
    """A piece of work: consecutive pieces of one data set's files. `dataset` indexes Plan.datasets."""

    key: str
    dataset: int
    pieces: tuple[Piece, ...]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs. Plain data that pickles."""

    name: str
    directory: Path  # of the output
    datasets: tuple[Dataset, ...]
    files: tuple[File, ...]
    units: tuple[Unit, ...]
    template: Template
    tokenizer: str
    pack_size: int
    truncate: bool
    messages_field: str
    tools_field: str
    sample: int | None
    seed: int
    fail_fast: bool
    fingerprint: str

    @property
    def spool(self) -> Path:
        return self.directory / "spool"


def run(cfg: Prep) -> dict:
    """Prepare the data that `cfg` describes and return its metadata (see docs/data.md for the fields).

    Raises UserError for anything the user can mend; the output then does not exist, and a rerun continues.
    """
    started = time.monotonic()
    validate(cfg)
    with disk_errors(cfg.output_dir or "output"):
        todo = plan(cfg)
        with _locked(todo.directory):
            if cfg.force:
                shutil.rmtree(todo.spool, ignore_errors=True)
            elif found := finished(todo):
                return {**found, "unchanged": True}
            run_units(todo, cfg.workers or len(os.sched_getaffinity(0)))
            return merge(cfg, todo, started)


def validate(cfg: Prep) -> None:
    """Refuse settings that cannot work, before anything is read."""
    ratios = asdict(cfg.split)
    if any(not 0 <= ratio <= 1 for ratio in ratios.values()) or not math.isclose(
        sum(ratios.values()), 1, abs_tol=1e-6
    ):
        given = " + ".join(f"{ratio:g}" for ratio in ratios.values())
        raise UserError(
            f"split: the ratios must be 0..1 and sum to 1, not {given} = {sum(ratios.values()):g}"
        )
    if cfg.split.training == 0:
        raise UserError("split.training is 0: there would be nothing to train on")
    for key, least in (("pack_size", 2), ("sample", 1), ("workers", 1)):
        if (value := getattr(cfg, key)) is not None and value < least:
            raise UserError(f"{key} must be at least {least}, not {value}")
    for key, choices in (("over_long", ("truncate", "drop")), ("format", ("npy", "parquet"))):
        if getattr(cfg, key) not in choices:
            raise UserError(f"{key} must be {' or '.join(choices)}, not {getattr(cfg, key)}")
    if not 0 <= cfg.max_drop_ratio <= 1:
        raise UserError(f"max_drop_ratio must be 0..1, not {cfg.max_drop_ratio:g}")


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left for {place}: free some or choose another output_dir; rerun continues"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"cannot write {place}: {os.strerror(error.errno)}; choose another output_dir"
            ) from None
        raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One preparation at a time; the lock goes with the process, however it ends."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory} is being written by another prep: wait for it, or set output_dir"
            ) from None
        yield


def finished(todo: Plan) -> dict | None:
    """The metadata of a complete output that this very plan produced, or None."""
    from nemotron_sft.packed import read_metadata

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


# --- plan --------------------------------------------------------------------------------------------------


def plan(cfg: Prep) -> Plan:
    """Find the inputs and cut them into units. The result depends on the inputs and settings alone."""
    from nemotron_sft.tokens import load_tokenizer

    name, datasets = load_blend(cfg.blend)
    template = _load_template(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer.model)
    shared = [
        1, tokenizer.digest, template.digest, cfg.pack_size, cfg.over_long, cfg.messages_field, cfg.tools_field,
        cfg.sample, cfg.seed, LENGTH_EDGES,
    ]  # fmt: skip
    found = [sources.find(dataset, download=cfg.sample is None) for dataset in datasets]
    total = sum(file.bytes for files in found for file in files)
    unit_bytes = max(UNIT_BYTES, total // MAX_UNITS)
    units = []
    for index, (dataset, files) in enumerate(zip(datasets, found, strict=True)):
        if cfg.sample is not None:  # the first rows in file order: one unit that stops early
            groups = [[sources.whole(file) for file in files]]
        else:
            groups = _grouped([p for file in files for p in sources.pieces(file, unit_bytes)], unit_bytes)
        about = [dataset.name, dataset.weight, dataset.filter]
        units += [
            Unit(_digest(shared, about, _identity(g)), index, tuple(g), sum(p.bytes for p in g))
            for g in groups
        ]
    directory = Path(cfg.output_dir or f"output/data/{name}" + (f"-sample{cfg.sample}" if cfg.sample else ""))
    return Plan(
        name=name,
        directory=directory,
        datasets=tuple(datasets),
        files=tuple(file for files in found for file in files),
        units=tuple(units),
        template=template,
        tokenizer=cfg.tokenizer.model,
        pack_size=cfg.pack_size,
        truncate=cfg.over_long == "truncate",
        messages_field=cfg.messages_field,
        tools_field=cfg.tools_field,
        sample=cfg.sample,
        seed=cfg.seed,
        fail_fast=cfg.max_drop_ratio == 0,
        fingerprint=_digest(
            [u.key for u in units], asdict(cfg.split), cfg.max_drop_ratio, cfg.format, tokenizer.pad_id
        ),
    )


def _load_template(cfg: Prep) -> Template:
    from nemotron_sft.chat import load_template

    return load_template(**cfg.template)


def _grouped(pieces: list[Piece], unit_bytes: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces together until a unit is full: many small files cost no more than one large file."""
    group, size = [], 0
    for piece in pieces:
        if group and size + piece.bytes > unit_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.bytes
    if group:
        yield group


def _identity(pieces: list[Piece]) -> list:
    return [[piece.file.label, piece.file.stamp, piece.start, piece.stop] for piece in pieces]


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(
        json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()


# --- units -------------------------------------------------------------------------------------------------


def run_units(todo: Plan, workers: int) -> None:
    """Run the units that have no spool file yet, in `workers` processes (in this one if there is only one)."""
    from nemotron_sft.console import progress

    todo.spool.mkdir(parents=True, exist_ok=True)
    keys = {unit.key for unit in todo.units}
    for path in todo.spool.iterdir():  # leftovers of a killed process or of other settings
        if path.suffix != ".spool" or path.stem not in keys:
            path.unlink()
    waiting = [unit for unit in todo.units if not (todo.spool / f"{unit.key}.spool").exists()]
    done = sum(unit.bytes for unit in todo.units) - sum(unit.bytes for unit in waiting)
    tokens, started = 0, time.monotonic()
    with progress("tokenizing", sum(unit.bytes for unit in todo.units)) as advance:
        advance(done, "")
        for unit, stats in (
            _in_processes(todo, waiting, workers) if min(workers, len(waiting)) > 1 else _here(todo, waiting)
        ):
            tokens += stats["tokens"]
            advance(unit.bytes, f"{tokens / (time.monotonic() - started):,.0f} tokens/s")


def _here(todo: Plan, units: list[Unit]) -> Iterator[tuple[Unit, dict]]:
    for unit in units:
        yield unit, run_unit(todo, unit)


def _in_processes(todo: Plan, units: list[Unit], workers: int) -> Iterator[tuple[Unit, dict]]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # A fork server: workers start with the modules already imported, and without this process's threads.
    context = get_context("forkserver")
    context.set_forkserver_preload(["nemotron_sft.prep", "nemotron_sft.tokens", "tokenizers", "fastokens"])
    pool = ProcessPoolExecutor(min(workers, len(units)), context, initializer=_start_worker, initargs=(todo,))
    with pool:
        futures = {pool.submit(_work, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, by hand or for lack of memory: rerun to continue, "
                "with fewer workers (workers=N) if memory is short"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_todo: Plan | None = None  # in a worker: the plan, sent once


def _start_worker(todo: Plan) -> None:
    """Set up a worker: one thread, since there is a process for every core, and an end with its parent."""
    import multiprocessing
    import signal
    import threading

    global _todo
    _todo = todo
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(unit: Unit) -> dict:
    with disk_errors(_todo.spool):
        return run_unit(_todo, unit)


@lru_cache(maxsize=1)
def _tokenizer(model: str):
    from nemotron_sft.tokens import load_tokenizer

    return load_tokenizer(model)


def run_unit(todo: Plan, unit: Unit) -> dict:
    """Tokenize one unit into its spool file and return its statistics. A unit that is done already is not redone.

    Raises UserError, naming file and line, for a record that is not JSON, and for a record that has to be dropped
    if the plan allows no drops.
    """
    from nemotron_sft.tokens import tokenize

    path = todo.spool / f"{unit.key}.spool"
    if path.exists():
        with Spool(path) as spool:
            return spool.stats
    work = _Work(todo, unit)
    tokenizer = _tokenizer(todo.tokenizer)
    with SpoolWriter(path) as spool:
        for batch in work.batches():
            ids, mask, offsets = tokenize(tokenizer, batch.sequences)
            work.write(batch, ids, mask, offsets, spool)
        work.stats["records_read"] = work.read
        spool.finish(work.stats)
    return work.stats


@dataclass
class _Batch:
    """Sequences waiting to be tokenized, with what is known of each."""

    sequences: list = field(default_factory=list)
    conversations: list[int] = field(default_factory=list)  # hash of the conversation it came from
    copies: list[int] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)  # (index of the piece, position)
    characters: int = 0


class _Work:
    """One unit in the making: counts, drops, and the batches to tokenize."""

    def __init__(self, todo: Plan, unit: Unit):
        self.todo, self.unit, self.dataset = todo, unit, todo.datasets[unit.dataset]
        self.read = 0
        self.stats: dict[str, Any] = {
            "dataset": unit.dataset, "records_read": 0, "records_matched": 0, "records_kept": 0, "passes": 0,
            "dropped": {}, "sequences": 0, "tokens": 0, "trained_tokens": 0, "truncated": 0,
            "lengths": [0] * (len(LENGTH_EDGES) - 1),
        }  # fmt: skip

    def batches(self) -> Iterator[_Batch]:
        """Render the unit's records, a bounded amount of text at a time."""
        todo, stats, batch = self.todo, self.stats, _Batch()
        for origin, record in self.records():
            stats["records_matched"] += 1
            copies = self.copies(origin)
            if not copies:
                continue
            stats["passes"] += copies
            try:
                sequences = todo.template.sequences(
                    _parsed(record.get(todo.messages_field), "messages"),
                    _parsed(record.get(todo.tools_field), "tools"),
                )
            except ChatError as error:
                self.drop(error.reason, origin, self.explained(error, record))
                continue
            stats["records_kept"] += 1
            text = "".join([text for spans in sequences for _, text in spans])
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            conversation = int.from_bytes(digest, "little")
            for spans in sequences:
                batch.sequences.append(spans)
                batch.conversations.append(conversation)
                batch.copies.append(copies)
                batch.origins.append(origin)
            batch.characters += len(text)
            if batch.characters >= BATCH_CHARACTERS:
                yield batch
                batch = _Batch()
            if stats["records_kept"] == todo.sample:
                break
        if batch.sequences:
            yield batch

    def records(self) -> Iterator[tuple[tuple[int, int], dict]]:
        """((index of the piece, position), record) of every record that passes the filter."""
        columns = [self.todo.messages_field, self.todo.tools_field, *self.dataset.filter]
        for index, piece in enumerate(self.unit.pieces):
            for position, record in sources.read(piece, columns):
                self.read += 1
                if not self.dataset.filter or self.dataset.keeps(record):
                    yield (index, position), record

    def copies(self, origin: tuple[int, int]) -> int:
        """How often a record enters the data: the whole passes, and one more for a seeded share of the records."""
        whole, part = divmod(self.dataset.weight, 1)
        if part:
            index, position = origin
            what = f"{self.todo.seed} {self.dataset.name} {Path(self.unit.pieces[index].file.path).name} {position}"
            digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
            whole += int.from_bytes(digest, "little") < part * 2**64
        return int(whole)

    def drop(self, reason: str, origin: tuple[int, int], detail: str = "") -> None:
        """Count a drop and remember the first of its kind. Fails at once if the plan allows no drops."""
        if self.todo.fail_fast and reason not in CHOSEN:
            where = sources.locate(self.unit.pieces[origin[0]].file, origin[1])
            raise UserError(
                f"{where}: {detail or reason}; mend the record or allow drops with max_drop_ratio=0.01"
            )
        entry = self.stats["dropped"].setdefault(reason, {"count": 0, "first": origin, "detail": detail})
        entry["count"] += 1

    def explained(self, error: ChatError, record: dict) -> str:
        name = self.todo.messages_field
        if error.reason == "no messages" and name not in record:
            return f"no messages: the record has no field {name} (messages_field), only {', '.join(record) or 'nothing'}"
        return str(error)

    def write(
        self, batch: _Batch, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray, spool: SpoolWriter
    ) -> None:
        """Cut what is over-long, drop what has nothing to train on, and append the rest to the spool.

        ids, mask: (tokens,); offsets: (sequences + 1,).
        """
        todo, stats = self.todo, self.stats
        lengths = np.diff(offsets)
        stats["lengths"] = (
            np.histogram(np.minimum(lengths, LENGTH_EDGES[-1]), LENGTH_EDGES)[0] + stats["lengths"]
        ).tolist()
        over = lengths > todo.pack_size
        kept = np.minimum(lengths, todo.pack_size)
        trained_before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        trained = trained_before[offsets[:-1] + kept] - trained_before[offsets[:-1]]
        whole = trained_before[offsets[1:]] - trained_before[offsets[:-1]]
        good = trained > 0
        if not todo.truncate:
            good &= ~over
        for i in np.flatnonzero(~good):
            reason = "no trained token" if whole[i] == 0 else CHOSEN[int(todo.truncate)]
            self.drop(reason, batch.origins[i])
        stats["truncated"] += int((over & good).sum())

        signed = np.where(mask, ~ids, ids).astype("<i4", copy=False)
        if over.any() or not good.all():
            pieces = [signed[offsets[i] : offsets[i] + kept[i]] for i in np.flatnonzero(good)]
            signed = np.concatenate([signed[:0], *pieces])
        index = np.empty(int(good.sum()), Spool.INDEX)
        index["conversation"] = np.array(batch.conversations, np.uint64)[good]
        index["copies"] = np.array(batch.copies, np.uint16)[good]
        index["length"], index["trained"] = kept[good], trained[good]
        spool.append(signed, index)
        copies = index["copies"].astype(np.int64)
        stats["sequences"] += int(copies.sum())
        stats["tokens"] += int((copies * index["length"]).sum())
        stats["trained_tokens"] += int((copies * index["trained"]).sum())


def _parsed(value: Any, what: str) -> Any:
    """Messages or tools; some data sets store them as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except ValueError as error:
            raise ChatError(f"bad {what}", f"text that is not JSON: {error}") from None
    return value


# --- spool files -------------------------------------------------------------------------------------------
# tokens (int32: the id of a context token, ~id of a trained one) | index (Spool.INDEX, one per sequence) |
# statistics (JSON) | the lengths of these three, in bytes (3 x int64) | magic. Written front to back, so that a
# unit's tokens never have to be in memory together.


class SpoolWriter:
    """Writes a spool file under a temporary name; `finish` commits it. Left without that, nothing remains."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
        self.index: list[np.ndarray] = []

    def __enter__(self) -> SpoolWriter:
        self.file = open(self.temporary, "wb")  # noqa: SIM115
        return self

    def append(self, signed: np.ndarray, index: np.ndarray) -> None:
        self.file.write(signed.data)
        self.index.append(index)

    def finish(self, stats: dict) -> None:
        tokens = self.file.tell()
        index = np.concatenate([np.empty(0, Spool.INDEX), *self.index]).tobytes()
        text = json.dumps(stats).encode()
        self.file.write(
            index + text + np.array([tokens, len(index), len(text)], "<i8").tobytes() + Spool.MAGIC
        )
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


class Spool:
    """A committed spool file. `stats`: its unit's statistics; `index`: (sequences,) of INDEX, read when asked for.

    Tokens are read with `pread` rather than mapped: pages of a mapping that is read in random order pile up in
    the process, and memory would grow with the data.
    """

    INDEX = np.dtype([("conversation", "<u8"), ("length", "<i4"), ("trained", "<i4"), ("copies", "<u2")])
    MAGIC = b"spool-1\n"

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, 32, max(0, size - 32))
        self.tokens, self._index, text = np.frombuffer(tail[:24].ljust(24, b"\0"), "<i8").tolist()
        if tail[24:] != self.MAGIC or self.tokens + self._index + text + 32 != size:
            raise UserError(f"{path} is damaged: delete it and rerun")
        self.stats = json.loads(os.pread(self.fd, text, self.tokens + self._index))

    @property
    def index(self) -> np.ndarray:
        return np.frombuffer(os.pread(self.fd, self._index, self.tokens), self.INDEX)

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill `target` with the tokens from byte `start` on."""
        while target.nbytes:
            got = os.preadv(self.fd, [target], start)
            start, target = start + got, target[got:]

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


# --- merge -------------------------------------------------------------------------------------------------


@dataclass
class _Sequences:
    """What merging knows of the sequences, repeats included; all arrays (N,)."""

    conversation: np.ndarray  # uint64
    length: np.ndarray  # int32
    trained: np.ndarray  # int32
    spool: np.ndarray  # int32, which spool file
    start: np.ndarray  # int64, byte offset of the tokens in it

    def __getitem__(self, which: np.ndarray) -> _Sequences:
        return _Sequences(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.length)


def merge(cfg: Prep, todo: Plan, started: float | None = None) -> dict:
    """Split, pack and write the tokens of all units, then commit by writing metadata.json. Returns the metadata."""
    from nemotron_sft.packed import write_metadata

    started = time.monotonic() if started is None else started
    directory = todo.directory
    (directory / "metadata.json").unlink(missing_ok=True)  # from here on an older output is no longer whole
    with ExitStack() as stack:
        _allow_open_files(len(todo.units))
        spools = [stack.enter_context(Spool(todo.spool / f"{unit.key}.spool")) for unit in todo.units]
        mix = _mix(todo, [spool.stats for spool in spools])
        _check_drops(todo, mix, cfg.max_drop_ratio)
        sequences = _load(spools)
        if not len(sequences):
            raise UserError(f"blend {todo.name}: no sequence to train on in {len(todo.files)} files")
        ratios = asdict(cfg.split)
        which = assign_splits(sequences.conversation, [ratios[name] for name in SPLITS], cfg.seed)
        splits = {}
        for number, name in enumerate(SPLITS):
            chosen = np.flatnonzero(which == number)
            splits[name] = _write_split(cfg, todo, name, sequences[chosen], spools)
    tokenizer = _tokenizer(todo.tokenizer)
    seconds = time.monotonic() - started
    tokens = sum(part["tokens"] for part in splits.values())
    metadata = {
        "format": "nemotron-sft-packed",
        "version": 1,
        "pack_size": cfg.pack_size,
        "format_on_disk": cfg.format,
        "tokenizer": {
            "model": cfg.tokenizer.model, "digest": tokenizer.digest, "backend": tokenizer.backend,
            "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id,
        },
        "template": {"name": todo.template.name, "digest": todo.template.digest, "mask": todo.template.mask},
        "blend": {"name": todo.name, "datasets": mix},
        "splits": splits,
        "split_ratios": ratios,
        "lengths": {
            "edges": LENGTH_EDGES,
            "counts": np.sum([spool.stats["lengths"] for spool in spools], axis=0).tolist(),
        },
        "over_long": cfg.over_long,
        "sample": cfg.sample,
        "seed": cfg.seed,
        "inputs": [{"path": file.label, "bytes": file.bytes, "stamp": file.stamp} for file in todo.files],
        "code_version": __version__,
        "fingerprint": todo.fingerprint,
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds),
    }  # fmt: skip
    _write_report(directory, metadata)
    write_metadata(directory, metadata)
    shutil.rmtree(todo.spool)
    return metadata


def _allow_open_files(count: int) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 100:
        wanted = count + 100 if hard == resource.RLIM_INFINITY else min(hard, count + 100)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _mix(todo: Plan, stats: list[dict]) -> list[dict]:
    """Per data set: what was read, kept and dropped, and its requested and realised share of the mix.

    Shares count records: requested is weight x records that pass the filter; realised is what was taken, repeats
    included, less the dropped ones.
    """
    mix = []
    for number, dataset in enumerate(todo.datasets):
        mine = [(unit, s) for unit, s in zip(todo.units, stats, strict=True) if unit.dataset == number]
        dropped: dict[str, dict] = {}
        for unit, s in mine:
            for reason, entry in s["dropped"].items():
                piece, position = entry["first"]
                if reason not in dropped:
                    first = sources.locate(unit.pieces[piece].file, position)
                    dropped[reason] = {"count": 0, "first": first, "detail": entry["detail"]}
                dropped[reason]["count"] += entry["count"]
        sums = {key: sum(s[key] for _, s in mine) for key in (
            "records_read", "records_matched", "records_kept", "passes", "sequences", "tokens", "trained_tokens", "truncated",
        )}  # fmt: skip
        mix.append(
            {"name": dataset.name, "path": dataset.path, "weight": dataset.weight, **sums, "dropped": dropped}
        )
    asked = [entry["weight"] * entry["records_matched"] for entry in mix]
    taken = [entry["passes"] for entry in mix]
    for entry, a, t in zip(mix, asked, taken, strict=True):
        entry["requested_share"] = a / (sum(asked) or 1)
        entry["realised_share"] = t / (sum(taken) or 1)
    return mix


def _check_drops(todo: Plan, mix: list[dict], limit: float) -> None:
    """Refuse to write data from which more than `limit` of the records had to be dropped."""
    for entry in mix:
        drops = {reason: drop for reason, drop in entry["dropped"].items() if reason not in CHOSEN}
        count = sum(drop["count"] for drop in drops.values())
        if count > limit * entry["records_matched"]:
            reason, drop = max(drops.items(), key=lambda item: item[1]["count"])
            raise UserError(
                f"data set {entry['name']}: {count} of {entry['records_matched']} records dropped, more than "
                f"max_drop_ratio={limit:g}; mostly {reason}, first at {drop['first']}"
                + (f" ({drop['detail']})" if drop["detail"] else "")
            )


def _load(spools: list[Spool]) -> _Sequences:
    """The sequences of all spool files in order, repeated ones `copies` times."""
    parts = []
    for number, spool in enumerate(spools):
        index = spool.index
        start = (np.cumsum(index["length"], dtype=np.int64) - index["length"]) * 4
        copies = index["copies"]
        where = np.full(len(index), number, np.int32)
        columns = (index["conversation"], index["length"], index["trained"], where, start)
        parts.append(
            [np.repeat(column, copies) if (copies != 1).any() else column.copy() for column in columns]
        )
    return _Sequences(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def scrambled(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Hashes (N,) uint64 -> (N,) uint64, another hash for every seed (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        z = hashes + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def assign_splits(conversations: np.ndarray, ratios: list[float], seed: int) -> np.ndarray:
    """The split, 0..len(ratios)-1, of every sequence by the hash of its conversation.

    conversations: (N,) uint64. Returns (N,) int8. The share of each split is its ratio up to chance. Data too small
    for that still gets one conversation for every split with a ratio above 0, the first split served last, as long as
    there are enough different conversations.
    """
    draws = scrambled(conversations, seed)
    bounds = np.cumsum(ratios)[:-1] * 2.0**64
    which = np.searchsorted(bounds, draws.astype(np.float64), side="right").astype(np.int8)
    for split in [*range(1, len(ratios)), 0]:
        if ratios[split] == 0 or (which == split).any():
            continue
        sizes = np.array([len(np.unique(draws[which == s])) for s in range(len(ratios))])
        largest = int(sizes.argmax())
        if sizes[largest] > 1:
            which[draws == draws[which == largest].max()] = split
    return which


def _write_split(cfg: Prep, todo: Plan, name: str, sequences: _Sequences, spools: list[Spool]) -> dict:
    """Pack and write one split; returns its entry for the metadata."""
    from nemotron_sft.console import progress
    from nemotron_sft.packed import pack_dtype, write_packs
    from nemotron_sft.packing import members, pack

    suffix = ".npy" if cfg.format == "npy" else ".idx.parquet"
    path = todo.directory / f"{name}{suffix}"
    for other in todo.directory.glob(f"{name}.*"):  # of an earlier run, perhaps in the other format
        if other != path or not len(sequences):
            other.unlink()
    if not len(sequences):
        return {"packs": 0, "sequences": 0, "tokens": 0, "trained_tokens": 0, "fill": 0.0, "file": None, "bytes": 0,
                "sha256": None}  # fmt: skip
    order, bounds = members(pack(sequences.length, todo.pack_size, cfg.seed))
    packs = len(bounds) - 1
    dtype = pack_dtype(todo.pack_size, int(np.diff(bounds).max()))
    if cfg.format == "npy":
        _check_space(todo.directory, packs * dtype.itemsize)
    step = max(1, CHUNK_TOKENS // todo.pack_size)

    def chunks(advance: Callable) -> Iterator[np.ndarray]:
        for first in range(0, packs, step):
            yield _assemble(sequences, order, bounds[first : first + step + 1], todo, dtype, spools)
            advance(min(step, packs - first))

    with progress(f"writing {path.name}", packs) as advance:
        return write_packs(path, chunks(advance), packs)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"no space left for {directory}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; "
            "free some or choose another output_dir; rerun continues"
        )


def _assemble(
    sequences: _Sequences,
    order: np.ndarray,
    bounds: np.ndarray,
    todo: Plan,
    dtype: np.dtype,
    spools: list[Spool],
) -> np.ndarray:
    """The packs whose sequences are order[bounds[0]:bounds[1]], order[bounds[1]:bounds[2]], ...

    Returns (len(bounds) - 1,) records of `dtype`.
    """
    packs = len(bounds) - 1
    chosen = order[bounds[0] : bounds[-1]]
    length = sequences.length[chosen].astype(np.int64)
    row = np.repeat(np.arange(packs), np.diff(bounds))
    slot = np.arange(len(chosen)) - (bounds[:-1] - bounds[0])[row]
    ends = np.cumsum(length)
    before = np.concatenate([[0], ends])[bounds[:-1] - bounds[0]]  # tokens ahead of each pack
    column = ends - length - before[row]

    records = np.zeros(packs, dtype)
    signed = np.full((packs, todo.pack_size), _tokenizer(todo.tokenizer).pad_id, "<i4")
    target = memoryview(signed).cast("B")
    spool, start = sequences.spool[chosen], sequences.start[chosen]
    at = (row * todo.pack_size + column) * 4
    reading = np.lexsort(
        (start, spool)
    )  # in file order, for the sake of spinning disks and shared file systems
    for number, begin, to, size in zip(
        *(x[reading].tolist() for x in (spool, start, at, length * 4)), strict=True
    ):
        spools[number].read_into(target[to : to + size], begin)

    trained = signed < 0
    records["loss_mask"] = trained
    records["input_ids"] = np.where(trained, ~signed, signed)
    boundaries = np.zeros((packs, dtype["cu_seqlens"].shape[0]), np.int32)
    boundaries[row, slot + 1] = column + length
    records["cu_seqlens"] = np.maximum.accumulate(boundaries, axis=1)
    return records


def _write_report(directory: Path, metadata: dict) -> None:
    """report.html beside the data."""
    from nemotron_sft import report

    report.write_report(directory, metadata)
