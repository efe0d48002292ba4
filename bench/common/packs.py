"""Random packs with something to learn in them, in the formats of recipes/prep.py."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from nemotron_sft.data.packed import FORMAT, VERSION, empty_packs, pack_dtype, write_metadata, write_packs
from nemotron_sft.data.packing import pack


def make_data(out: Path, packs: int, pack_size: int = 4096, vocabulary: int = 32768) -> dict:
    """Write `packs` packs as training.npy and training.idx.parquet. Returns facts about the lengths.

    Document lengths are log-normal, 16 documents a pack; the last two thirds of each are trained.
    """
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(300), 0.9, 16 * packs), 16, pack_size).astype(int)
    bins = pack(lengths, pack_size)
    records = empty_packs(packs, pack_dtype(pack_size, int(np.bincount(bins).max())))
    for number, record in enumerate(records):
        ends = np.concatenate([[0], np.cumsum(lengths[bins == number])])
        record["cu_seqlens"] = ends[-1]
        record["cu_seqlens"][: len(ends)] = ends
        record["input_ids"][: ends[-1]] = tokens(rng, ends[-1], vocabulary)
        for start, end in itertools.pairwise(ends):
            record["loss_mask"][start + (end - start) // 3 : end] = 1
    training = write(out, records, pack_size, vocabulary)
    used = np.diff(records["cu_seqlens"]).astype(float)
    return {
        "packs": packs,
        "documents": training["sequences"],
        "fill": training["fill"],
        "effective_context": float((used**2).sum() / used.sum()),
    }


def tokens(rng: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    """Something to learn: frequent and rare tokens, half of them a function of the token before. (count,) int."""
    drawn = (vocabulary * rng.random(count) ** 3).astype(int)
    follows = np.roll(drawn, 1) * 7919 % vocabulary
    return np.where(rng.random(count) < 0.5, follows, drawn)


def write(out: Path, records: np.ndarray, pack_size: int, vocabulary: int) -> dict:
    """A prep output with these training packs and no others; the entry of its split in metadata.json."""
    out.mkdir(parents=True, exist_ok=True)
    empty = {"packs": 0, "sequences": 0, "tokens": 0, "trained_tokens": 0, "fill": 0, "file": None}
    training = write_packs(out / "training.npy", [records], len(records))
    write_packs(out / "training.idx.parquet", [records], len(records))
    write_metadata(
        out,
        {
            "format": FORMAT,
            "version": VERSION,
            "format_on_disk": "npy",
            "pack_size": pack_size,
            "sample": None,
            "tokenizer": {"model": "random", "digest": "", "vocab_size": vocabulary, "eos_id": 0, "pad_id": 0},
            "template": {"name": "none", "digest": ""},
            "inputs": [],
            "blend": {"name": "random", "datasets": [{"name": "random"}]},
            "splits": {"training": training, "validation": empty, "test": empty},
        },
    )
    return training
