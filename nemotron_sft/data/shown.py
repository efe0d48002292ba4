"""A pack as runs of text: which of it is trained, and which tokens are special."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemotron_sft.console import visible
from nemotron_sft.data.packed import read_pack

if TYPE_CHECKING:
    from nemotron_sft.data.tokens import Tokenizer

Run = tuple[str, bool, bool]  # text, whether it is trained, whether it is a special token


def marked_text(runs: list[Run], colours: bool) -> Any:
    """Runs as rich text: trained green, context grey, special tokens bold, control characters shown.

    Without `colours`, as in a pipe, trained text stands between « and ».
    """
    from rich.text import Text

    text, is_open = Text(), False
    for piece, trained, is_special in runs:
        if not colours and trained != is_open:
            text.append("«" if trained else "»")
            is_open = trained
        text.append(visible(piece), ("bold " if is_special else "") + ("green" if trained else "bright_black"))
    if is_open:
        text.append("»")
    return text


def described(path: Path, index: int, metadata: dict, tokenizer: Tokenizer, limit: int | None) -> dict:
    """A pack's sequences as runs of text, up to `limit` tokens of them, and a drawing of its layout."""
    ids, mask, cu = read_pack(path, index)
    is_special = np.isin(ids, tokenizer.added_ids)
    sequences, left = [], limit or len(ids)
    for low, high in pairwise(cu.tolist()):
        if left <= 0:
            break
        end = min(high, low + left)
        left -= high - low
        runs = [
            (tokenizer.decode(ids[a:b]), bool(mask[a]), bool(is_special[a]))
            for a, b in _runs(mask[low:end], is_special[low:end], low)
        ]
        sequences.append(
            {
                "low": low,
                "high": high,
                "trained": int(mask[low:high].sum()),
                "runs": runs,
                "hidden": high - end,
            }
        )
    strip = [(a, b - a, "t" if mask[a] else "c") for a, b in _runs(mask, np.zeros_like(is_special), 0)]
    gap = metadata["pack_size"] / 600
    strip += [(int(edge) - gap / 2, gap, "b") for edge in cu[1:-1]]
    return {
        "split": path.name.split(".")[0], "number": index, "tokens": len(ids), "trained": int(mask.sum()),
        "padding": metadata["pack_size"] - len(ids), "sequences": sequences,
        "hidden_sequences": len(cu) - 1 - len(sequences), "strip": strip,
    }  # fmt: skip


def _runs(mask: np.ndarray, is_special: np.ndarray, offset: int) -> list[tuple[int, int]]:
    """Cut (n,) tokens where the mask changes, and around every special token; [start, end) pairs + offset."""
    new = np.ones(len(mask), bool)
    new[1:] = (mask[1:] != mask[:-1]) | is_special[1:] | is_special[:-1]
    edges = [*(np.flatnonzero(new) + offset).tolist(), len(mask) + offset]
    return list(pairwise(edges))
