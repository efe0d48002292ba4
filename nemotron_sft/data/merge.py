"""Tokens of all units -> packs: split, pack, write, and commit with metadata.json."""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nemotron_sft import __version__
from nemotron_sft.config import Prep
from nemotron_sft.console import progress
from nemotron_sft.data import duplicates, packed, reading, report, shares
from nemotron_sft.data.packed import SPLITS, pack_dtype, write_packs
from nemotron_sft.data.packing import members, pack
from nemotron_sft.data.plan import Plan, template_options
from nemotron_sft.data.shares import scrambled
from nemotron_sft.data.spool import Spool
from nemotron_sft.data.units import CONTAMINATED, LENGTH_EDGES, SUMS
from nemotron_sft.errors import UserError

CHUNK_TOKENS = 1 << 20  # of output assembled at once; twice as many leave the caches, and take a third more CPU time
CHOSEN = (*shares.TOO_LONG, CONTAMINATED)  # drops that the settings ask for


@dataclass
class Sequences:
    """Where the sequences are, repeats included; all arrays (N,), so 20 bytes each however long they are."""

    length: np.ndarray  # int32, tokens
    spool: np.ndarray  # int32, number of the spool file
    start: np.ndarray  # int64, byte offset of the tokens in it
    weight: np.ndarray  # float32, of the tokens in the loss

    def __len__(self) -> int:
        return len(self.length)


def merge(cfg: Prep, todo: Plan, started: float | None = None, threads: int = 1) -> dict:
    """Split, pack and write the tokens of all units, which must be done. Returns the metadata.

    Writing metadata.json is the commit; unless cfg.keep_spool, the spool is removed after it. Raises UserError.
    """
    started = time.monotonic() if started is None else started
    directory = todo.directory
    with ExitStack() as stack:
        _allow_open_files(len(todo.units))
        spools = [stack.enter_context(Spool(todo.spool(unit))) for unit in todo.units]
        mix = _settle(cfg, todo, spools)
        conversations, sequences = _load(spools)
        if not len(sequences):
            raise UserError(f"blend {todo.name}: nothing to train on in {len(todo.files)} files")
        if cfg.format == "parquet" and (sequences.weight != 1).any():
            raise UserError("format=parquet has no place for weights in the loss, which this data has: use format=npy")
        (directory / "metadata.json").unlink(missing_ok=True)  # an older output ceases to exist here
        ratios = asdict(cfg.split)
        which = assign_splits(conversations, [ratios[name] for name in SPLITS], cfg.seed)
        del conversations
        splits = {}
        for number, name in enumerate(SPLITS):
            chosen = np.flatnonzero(which == number).astype(np.int32)
            splits[name] = _write_split(cfg, todo, name, sequences, chosen, spools, threads)
        lengths = np.sum([spool.stats["lengths"] for spool in spools], axis=0).tolist()
        backends = {spool.stats["backend"] for spool in spools}
    metadata = _metadata(cfg, todo, mix, splits, lengths, backends, time.monotonic() - started)
    report.write_report(directory, metadata, todo.tokenizer)
    packed.write_metadata(directory, metadata)
    if not cfg.keep_spool:
        shutil.rmtree(directory / "spool")
    return metadata


def _settle(cfg: Prep, todo: Plan, spools: list[Spool]) -> list[dict]:
    """Decide in the spools which records count. Returns the mix; see `_mix`. Raises UserError."""
    repeats = duplicates.find_duplicates(spools)
    if cfg.dedup:
        duplicates.leave_out(repeats, spools)
    if todo.proportions:
        shares.take_shares(todo, spools)
    for spool in spools:
        shares.cut(spool, todo.pack_size, todo.truncate)
        shares.count(spool)
    mix = _mix(todo, [spool.stats for spool in spools])
    for entry, about in zip(mix, duplicates.describe(repeats, spools, todo), strict=True):
        entry["duplicates"] = about
    _check_drops(mix, cfg.max_drop_ratio)
    _check_records(mix, todo)
    return mix


def _metadata(
    cfg: Prep, todo: Plan, mix: list[dict], splits: dict, lengths: list[int], backends: set[str], seconds: float
) -> dict:
    """What metadata.json holds; docs/format.md explains it."""
    tokenizer = todo.tokenizer
    return {
        "format": packed.FORMAT,
        "version": packed.VERSION,
        "pack_size": cfg.pack_size,
        "format_on_disk": cfg.format,
        "tokenizer": {"model": tokenizer.name, "revision": tokenizer.revision, "digest": tokenizer.digest,
                      "backend": " and ".join(sorted(backends)), "vocab_size": tokenizer.vocab_size,
                      "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id},
        "template": {**template_options(cfg, tokenizer), "digest": todo.template.digest},
        "blend": {"name": todo.name, "mix": "proportions" if todo.proportions else "passes", "datasets": mix},
        "splits": splits,
        "split_ratios": asdict(cfg.split),
        "lengths": {"edges": LENGTH_EDGES, "counts": lengths},
        "over_long": cfg.over_long,
        "max_drop_ratio": cfg.max_drop_ratio,
        "dedup": cfg.dedup,
        "decontaminate": todo.evaluation.describe() if todo.evaluation else None,
        "sample": cfg.sample,
        "seed": cfg.seed,
        "inputs": [{"dataset": todo.datasets[number].name, "path": file.label, "bytes": file.bytes, "stamp": file.stamp}
                   for number, file in dict.fromkeys((u.dataset, p.file) for u in todo.units for p in u.pieces)],
        "code_version": __version__,
        "fingerprint": todo.fingerprint,
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(sum(part["tokens"] for part in splits.values()) / seconds),
    }  # fmt: skip


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 100:
        wanted = count + 100 if hard == resource.RLIM_INFINITY else min(hard, count + 100)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _mix(todo: Plan, stats: list[dict]) -> list[dict]:
    """Per dataset: what was read, kept and dropped, and its requested and realised share of the mix.

    Shares count records: requested is weight x records that pass the filter (the weight alone where weights are
    proportions), realised what was really taken, repeats included.
    """
    mix = []
    for number, dataset in enumerate(todo.datasets):
        mine = [(unit, s) for unit, s in zip(todo.units, stats, strict=True) if unit.dataset == number]
        dropped: dict[str, dict] = {}
        for unit, s in mine:
            for reason, entry in s["dropped"].items():
                if reason not in dropped:
                    piece, position = entry["first"]
                    first = reading.locate(unit.pieces[piece].file, position)
                    dropped[reason] = {"count": 0, "first": first, "detail": entry["detail"]}
                dropped[reason]["count"] += entry["count"]
        flags = sum((Counter(s["flags"]) for _, s in mine), Counter())
        sums = {key: sum(s[key] for _, s in mine) for key in (*SUMS, *shares.COUNTS)}
        about = {"name": dataset.name, "path": dataset.path, "weight": dataset.weight}
        about["loss_weight"] = dataset.loss_weight
        about |= {"form": str(todo.forms[number]), "flags": dict(sorted(flags.items()))}
        mix.append({**about, **sums, "dropped": dropped})
    asked = [entry["weight"] * (1 if todo.proportions else entry["records_matched"]) for entry in mix]
    taken = [entry["passes"] for entry in mix]
    for entry, a, t in zip(mix, asked, taken, strict=True):
        entry |= {"requested_share": a / (sum(asked) or 1), "realised_share": t / (sum(taken) or 1)}
    return mix


def _check_records(mix: list[dict], todo: Plan) -> None:
    """Refuse a dataset that gives nothing: it is empty, or its filter, its weight or what was dropped leave nothing."""
    for entry, dataset in zip(mix, todo.datasets, strict=True):
        if entry["sequences"]:
            continue
        matched = entry["records_matched"]
        if not entry["records_read"]:
            reason = f"no records in {dataset.path}"
        elif not matched:
            reason = f"none of {entry['records_read']:,} records matches its filter {dataset.filter}"
        elif entry["records_kept"] == 0 and entry["duplicates"]["count"]:
            reason = f"each of {matched:,} records repeats an earlier one"
        elif not entry["dropped"]:
            reason = f"weight={dataset.weight:g} takes none of {matched:,} records"
        else:
            why, drop = max(entry["dropped"].items(), key=lambda item: item[1]["count"])
            reason = f"nothing is left of {matched:,} records; most are dropped for {why}, first at {drop['first']}"
        raise UserError(f"dataset {entry['name']}: {reason}; correct that, or leave it out with weight: 0")


def _check_drops(mix: list[dict], limit: float) -> None:
    """Refuse data from which more than `limit` of the records had to be dropped."""
    for entry in mix:
        drops = {reason: drop for reason, drop in entry["dropped"].items() if reason not in CHOSEN}
        count = sum(drop["count"] for drop in drops.values())
        if count > limit * entry["records_matched"]:
            reason, drop = max(drops.items(), key=lambda item: item[1]["count"])
            raise UserError(
                f"dataset {entry['name']}: {count} of {entry['records_matched']} records dropped, more than "
                f"max_drop_ratio={limit:g}; mostly for {reason}, first at {drop['first']}"
            )


def _load(spools: list[Spool]) -> tuple[np.ndarray, Sequences]:
    """Hashes of the conversations, (N,) uint64, and the sequences of all spool files in order, repeated ones
    `copies` times."""
    count = sum(spool.stats["sequences"] for spool in spools)
    conversations = np.empty(count, np.uint64)
    found = Sequences(*(np.empty(count, dtype) for dtype in (np.int32, np.int32, np.int64, np.float32)))
    first = 0
    for number, spool in enumerate(spools):
        index = spool.index()
        here = slice(first, first := first + spool.stats["sequences"])
        copies = index["copies"]
        conversations[here] = np.repeat(index["conversation"], copies)
        for name in ("length", "start", "weight"):
            getattr(found, name)[here] = np.repeat(index[name], copies)
        found.spool[here] = number
    return conversations, found


def assign_splits(conversations: np.ndarray, ratios: list[float], seed: int) -> np.ndarray:
    """The split, 0..len(ratios)-1, of every sequence, by the hash of its conversation.

    conversations: (N,) uint64; ratios sum to 1. Returns (N,) int8. A split's share is its ratio, up to
    chance. Data too small for that still gives one conversation to every split with a ratio above 0 (the first,
    which is trained on, before all others, then the later ones) while there are enough different ones.
    """
    bounds = np.cumsum(ratios)[:-1] * 2.0**64
    which = np.empty(len(conversations), np.int8)
    for first in range(0, len(which), 1 << 20):  # in blocks, for the sake of memory
        draws = scrambled(conversations[first : first + (1 << 20)], seed).astype(np.float64)
        which[first : first + (1 << 20)] = np.searchsorted(bounds, draws, side="right")
    for split in (0, *reversed(range(1, len(ratios)))):
        if ratios[split] == 0 or (which == split).any():
            continue
        sizes = [len(np.unique(conversations[which == other])) for other in range(len(ratios))]
        largest = int(np.argmax(sizes))
        if sizes[largest] > (split > 0):
            draws = scrambled(conversations, seed)
            which[draws == draws[which == largest].max()] = split
    return which


def _write_split(
    cfg: Prep, todo: Plan, name: str, sequences: Sequences, chosen: np.ndarray, spools: list[Spool], threads: int
) -> dict:
    """Pack and write one split, the sequences numbered `chosen`; returns its entry for the metadata.

    An empty split has no file.
    """
    path = todo.directory / (name + {"npy": ".npy", "parquet": ".idx.parquet"}[cfg.format])
    for other in todo.directory.glob(f"{name}.*"):  # of an earlier run, perhaps in the other format
        if other != path or not len(chosen):
            other.unlink()
    if not len(chosen):
        nothing = dict.fromkeys(("packs", "sequences", "tokens", "trained_tokens"), 0)
        weights = {"least": 1.0, "most": 1.0, "sequences": 0.0, "tokens": 0.0}
        by_dataset = [dict.fromkeys(("sequences", "tokens", "trained_tokens"), 0) for _ in todo.datasets]
        return {**nothing, "weights": weights, "datasets": by_dataset, "fill": 0.0, "file": None, "bytes": 0,
                "sha256": None}  # fmt: skip
    order, bounds = members(pack(sequences.length[chosen], todo.pack_size, cfg.seed))
    order = chosen[order]
    packs = len(bounds) - 1
    dtype = pack_dtype(todo.pack_size, int(np.diff(bounds).max()))
    if cfg.format == "npy":
        _check_space(todo.directory, packs * dtype.itemsize)
    step = max(1, CHUNK_TOKENS // todo.pack_size)

    def assemble(first: int) -> np.ndarray:
        return _assemble(sequences, order, bounds[first : first + step + 1], todo, dtype, spools)

    def chunks(advance: Callable) -> Iterator[np.ndarray]:
        for records in _ahead(assemble, range(0, packs, step), threads):
            yield records
            advance(len(records))

    with progress(f"writing {path.name}", packs) as advance:
        return write_packs(path, chunks(advance), packs, threads, len(todo.datasets))


def _ahead(function: Callable, arguments: Iterable, threads: int) -> Iterator:
    """map(function, arguments) with up to `threads` results made ahead, by threads: reading, copying, hashing and
    writing arrays all let other threads run."""
    if threads == 1:
        yield from map(function, arguments)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for argument in arguments:
            ahead.append(pool.submit(function, argument))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory}: no space left: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free; "
            "make room or set output_dir, then rerun"
        )


def _assemble(
    sequences: Sequences,
    order: np.ndarray,
    bounds: np.ndarray,
    todo: Plan,
    dtype: np.dtype,
    spools: list[Spool],
) -> np.ndarray:
    """(len(bounds) - 1,) packs of `dtype`; pack p is made of the sequences order[bounds[p]:bounds[p + 1]]."""
    packs = len(bounds) - 1
    chosen = order[bounds[0] : bounds[-1]]
    counts = np.diff(bounds)
    row = np.repeat(np.arange(packs), counts)
    slot = np.arange(len(chosen)) - np.repeat(bounds[:-1] - bounds[0], counts)
    length = sequences.length[chosen].astype(np.int64)
    end = np.cumsum(length)
    end -= np.repeat((end - length)[bounds[:-1] - bounds[0]], counts)  # now counted from each pack's start

    records = packed.empty_packs(packs, dtype)
    target = memoryview(records.view(np.uint8))
    to = row * dtype.itemsize + (end - length) * 4  # input_ids is a pack's first field
    spool, start = sequences.spool[chosen], sequences.start[chosen]
    reading = np.lexsort((start, spool))  # in file order: disks and shared file systems like that
    columns = (column[reading].tolist() for column in (spool, start, to, to + length * 4))
    for number, begin, first, last in zip(*columns, strict=True):
        spools[number].read_into(target[first:last], begin)
    packed.separate(records, end[bounds[1:] - bounds[0] - 1], todo.tokenizer.pad_id)

    records["source"][row, slot] = np.array([unit.dataset for unit in todo.units])[spool]
    records["weight"][row, slot] = sequences.weight[chosen]
    boundaries = np.zeros((packs, dtype["cu_seqlens"].shape[0]), np.int32)
    boundaries[row, slot + 1] = end
    records["cu_seqlens"] = np.maximum.accumulate(boundaries, axis=1)
    return records
