"""What of the units' sequences enters the data: a share of the records, and of a sequence what a pack can hold.

Neither is decided when tokens are made, so that another pack size or another mix needs no tokenizing.
"""

from __future__ import annotations

import hashlib

import numpy as np

from nemotron_sft.data.duplicates import first_of_record
from nemotron_sft.data.plan import Plan, Unit
from nemotron_sft.data.spool import Spool

TOO_LONG = ("longer than pack_size", "no trained token within pack_size")  # reasons to drop a sequence
COUNTS = ("sequences", "tokens", "trained_tokens", "truncated")


def take_shares(todo: Plan, spools: list[Spool]) -> None:
    """Take so many records of every dataset, by a seeded draw, that they stand in the proportions of the weights.

    The dataset that is scarcest for its weight is taken whole and none is repeated. The records of the others with
    the least draws are taken, so more data of a dataset does not move those that are there by more than it must.
    Takes 8 bytes for every record of a dataset.
    """
    there = np.zeros(len(todo.datasets), np.int64)
    for unit, spool in zip(todo.units, spools, strict=True):
        index = spool.index()
        there[unit.dataset] += int((first_of_record(index) & (index["copies"] > 0)).sum())
    weights = np.array([dataset.weight for dataset in todo.datasets])
    scarcest = np.min((there / weights)[there > 0], initial=np.inf)  # an empty dataset is an error later
    wanted = np.where(there > 0, np.rint(weights * scarcest), 0).astype(np.int64)
    for number in range(len(todo.datasets)):
        mine = [pair for pair in zip(todo.units, spools, strict=True) if pair[0].dataset == number]
        draws = np.sort(np.concatenate([np.empty(0, np.uint64), *(_draws(todo, *pair)[0] for pair in mine)]))
        limit = draws[wanted[number] - 1] if wanted[number] else None
        for unit, spool in mine:
            drawn, record = _draws(todo, unit, spool)
            taken = np.zeros(len(drawn), bool) if limit is None else drawn <= limit
            spool.leave_out(~taken[record] if len(taken) else np.zeros(len(record), bool))
            spool.stats["passes"] = int(taken.sum())


def _draws(todo: Plan, unit: Unit, spool: Spool) -> tuple[np.ndarray, np.ndarray]:
    """Of a unit's records that are not left out their draws, (records,) uint64, and of every sequence the place of
    its record among these, (sequences,); a sequence that is left out has any place."""
    index = spool.index()
    first = first_of_record(index)
    names = [f"{todo.datasets[unit.dataset].name} {piece.file.name}" for piece in unit.pieces]
    seeds = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in names]
    there = first & (index["copies"] > 0)
    draws = np.array(seeds, np.uint64)[index["piece"][there]] + index["position"][there] * np.uint64(0xD1342543DE82EF95)
    return scrambled(draws, todo.seed), np.maximum(np.cumsum(there) - 1, 0)


def scrambled(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Hashes (N,) uint64 -> (N,) uint64, different for every seed: the output function of splitmix64 (Steele,
    Lea and Flood 2014)."""
    offset = np.array([(seed + 1) * 0x9E3779B97F4A7C15 % 2**64], np.uint64)
    z = hashes + offset
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def cut(spool: Spool, pack_size: int, truncate: bool) -> None:
    """Have the spool give no sequence of more than pack_size tokens: cut those that are longer, or drop them.

    What is cut before its first trained token is dropped too. Drops are counted in the spool's statistics.
    """
    index = spool.index()
    over = np.flatnonzero((index["length"] > pack_size) & (index["copies"] > 0))
    spool.stats["truncated"] = 0
    if not len(over):
        return
    trained = np.zeros(len(over), np.int32)
    signed = np.empty(pack_size, "<i4")
    for number, start in enumerate(index["start"][over].tolist() if truncate else ()):
        spool.read_into(memoryview(signed).cast("B"), start)
        trained[number] = np.count_nonzero(signed < 0)
    gone = over[trained == 0]
    if len(gone):
        first = (int(index["piece"][gone[0]]), int(index["position"][gone[0]]))
        spool.stats["dropped"][TOO_LONG[int(truncate)]] = {"count": len(gone), "first": first, "detail": ""}
        spool.leave_out(np.isin(np.arange(len(index)), gone))
    spool.cut = over, np.full(len(over), pack_size, np.int32), trained
    spool.stats["truncated"] = len(over) - len(gone)


def count(spool: Spool) -> None:
    """Put COUNTS of what the spool gives into its statistics, repeats included."""
    index = spool.index()
    copies = index["copies"].astype(np.int64)
    spool.stats |= {"sequences": int(copies.sum()), "tokens": int((copies * index["length"]).sum()),
                    "trained_tokens": int((copies * index["trained"]).sum())}  # fmt: skip
