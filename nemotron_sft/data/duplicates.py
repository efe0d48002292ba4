"""Records that hold the same conversation as an earlier one of the blend, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_sft.data import reading
from nemotron_sft.data.plan import Plan, Unit
from nemotron_sft.data.spool import Spool

EXAMPLES = 3  # of every dataset


@dataclass(frozen=True)
class Duplicates:
    """The records of all units, in order; arrays (records,).

    conversation: uint64, hash. bounds: (units + 1,), where each unit's records start. earlier: int64, the number of
    the first record with the same conversation, which is a record's own number if there is none before it.
    """

    conversation: np.ndarray
    bounds: np.ndarray
    earlier: np.ndarray

    def of_unit(self, number: int) -> np.ndarray:
        """(records of the unit,) bool: whether each repeats an earlier record."""
        low, high = self.bounds[number : number + 2]
        return self.earlier[low:high] < np.arange(low, high)


def find_duplicates(spools: list[Spool]) -> Duplicates:
    """Compare the records of all units. Takes 24 bytes for every record, however long."""
    hashes = []
    for spool in spools:
        index = spool.index()
        hashes.append(index["conversation"][first_of_record(index)])
    conversation = np.concatenate([np.empty(0, np.uint64), *hashes])
    order = np.argsort(conversation, kind="stable")
    new = np.ones(len(order), bool)
    new[1:] = conversation[order[1:]] != conversation[order[:-1]]
    earlier = np.empty_like(order)
    earlier[order] = order[new][np.cumsum(new) - 1]
    return Duplicates(conversation, np.cumsum([0, *map(len, hashes)]), earlier)


def first_of_record(index: np.ndarray) -> np.ndarray:
    """(sequences,) bool: whether a sequence is the first that its record gave."""
    first = np.ones(len(index), bool)
    first[1:] = (index["piece"][1:] != index["piece"][:-1]) | (index["position"][1:] != index["position"][:-1])
    return first


def leave_out(found: Duplicates, spools: list[Spool]) -> None:
    """Take the records that repeat an earlier one out of what the spool files give, and out of their statistics."""
    for number, spool in enumerate(spools):
        repeated = found.of_unit(number)
        if not repeated.any():
            continue
        index = spool.index()
        first = first_of_record(index)
        spool.leave_out(repeated[np.cumsum(first) - 1])
        spool.stats["records_kept"] -= int(repeated.sum())
        spool.stats["passes"] -= int(index["copies"][first][repeated].sum())


def describe(found: Duplicates, spools: list[Spool], todo: Plan) -> list[dict]:
    """Per dataset: the count of its records that repeat an earlier one, and where the first few of them are."""
    about: list[dict[str, Any]] = [{"count": 0, "examples": []} for _ in todo.datasets]
    for number, unit in enumerate(todo.units):
        repeated = np.flatnonzero(found.of_unit(number)) + found.bounds[number]
        mine = about[unit.dataset]
        mine["count"] += len(repeated)
        for record in repeated[: EXAMPLES - len(mine["examples"])].tolist():
            places = [_place(found, spools, todo.units, which) for which in (record, int(found.earlier[record]))]
            mine["examples"].append(dict(zip(("at", "repeats"), places, strict=True)))
    shown: dict[reading.File, list[int]] = {}
    for file, position in (place for mine in about for example in mine["examples"] for place in example.values()):
        shown.setdefault(file, []).append(position)
    names = {file: reading.locate_all(file, positions) for file, positions in shown.items()}
    for mine in about:
        mine["examples"] = [{key: names[f][p] for key, (f, p) in example.items()} for example in mine["examples"]]
    return about


def _place(found: Duplicates, spools: list[Spool], units: tuple[Unit, ...], record: int) -> tuple[reading.File, int]:
    """The file of a record, and its position there."""
    number = int(np.searchsorted(found.bounds, record, side="right")) - 1
    index = spools[number].index()
    entry = index[np.flatnonzero(first_of_record(index))[record - found.bounds[number]]]
    return units[number].pieces[int(entry["piece"])].file, int(entry["position"])
