"""Time that data-parallel ranks wait for the slowest, simulated: packs in seeded order, and dealt by what they cost.

    python bench/balance.py

Packs of 32,768 tokens, half of them one long conversation each (8,192 tokens to all of the pack), half of them short
chats; 8 packs a rank and step. A pack costs what its matrix products and its attention cost in FLOPs; 200 steps each.
"""

from __future__ import annotations

import numpy as np

from nemotron_sft.console import table
from nemotron_sft.train.balance import Dealing, lost_share

PACK, PACKS, STEPS = 32768, 8, 200
RANKS = (8, 16, 64, 256, 1024)
# Active parameters, and attention layers x their width: FLOPs are 6 per parameter and token, and 6 x layers x width per
# squared length (causal, forward and backward).
MODELS = {"Nemotron 3 Nano": (3.58e9, 6 * 4096), "dense 8B": (8.0e9, 32 * 4096)}


def squared_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sums of squared lengths of `count` packs: a long conversation and short ones behind it, or short ones alone."""
    long = np.where(rng.random(count) < 0.5, rng.integers(8192, PACK + 1, count), 0).astype(float)
    return long**2 + (PACK - long) * 1000.0


def lost(model: str, ranks: int, balanced: bool) -> float:
    """Mean share of a step's time that is lost."""
    rng = np.random.default_rng(0)
    parameters, attention = MODELS[model]
    dealing = Dealing(PACKS * ranks, ranks, 1)
    costs = (6 * attention * squared_lengths(rng, dealing.global_batch) for _ in range(STEPS if ranks < 1024 else 20))
    return float(np.mean([lost_share(each, dealing, balanced, 6 * parameters * PACK) for each in costs]))


def main() -> None:
    """Print the table."""
    rows = [
        (model, ranks, f"{lost(model, ranks, False):.1%}", f"{lost(model, ranks, True):.2%}")
        for model in MODELS
        for ranks in RANKS
    ]
    table("Share of a step lost to the slowest rank", ["model", "ranks", "in order", "dealt by cost"], rows)


if __name__ == "__main__":
    main()
