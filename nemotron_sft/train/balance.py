"""Packs dealt to data-parallel ranks so that all of them have as much attention to compute in every step.

Packs hold as many tokens as one another, but a pack of one long document costs attention many times what a pack of
short ones costs: its squared lengths add up to more. All ranks wait for the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dealing:
    """How Megatron's sampler gives the samples of a step to ranks: micro batch by micro batch, rank by rank."""

    global_batch: int  # packs of a step
    ranks: int  # data-parallel ones
    micro_batch: int  # packs of a row

    def slots(self) -> np.ndarray:
        """Places in the step of each rank's packs: (ranks, global_batch / ranks) int."""
        places = np.arange(self.global_batch).reshape(-1, self.ranks, self.micro_batch)
        return places.transpose(1, 0, 2).reshape(self.ranks, -1)


def deal(costs: np.ndarray, dealing: Dealing) -> np.ndarray:
    """Which of a step's packs stands at each place: (global_batch,) int, a permutation.

    costs: (global_batch,), of each pack. The costliest packs are dealt first, each to the rank that has least so far
    and room left (longest processing time first). Deterministic.
    """
    slots = dealing.slots()
    order, sums, filled = np.empty(len(costs), int), np.zeros(dealing.ranks), np.zeros(dealing.ranks, int)
    for pack in np.argsort(-costs, kind="stable"):
        open_ranks = np.where(filled < slots.shape[1], sums, np.inf)
        rank = int(open_ranks.argmin())
        order[slots[rank, filled[rank]]] = pack
        sums[rank] += costs[pack]
        filled[rank] += 1
    return order


def lost_share(costs: np.ndarray, dealing: Dealing, balanced: bool, fixed: float = 0.0) -> float:
    """The share of a step that ranks wait for the slowest: 1 - mean / max of what they compute.

    costs: (global_batch,); fixed: what a pack costs besides, in the same unit.
    """
    order = deal(costs, dealing) if balanced else np.arange(len(costs))
    sums = (costs + fixed)[order][dealing.slots()].sum(axis=1)
    return float(1 - sums.mean() / sums.max())
