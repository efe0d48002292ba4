"""Memory-mapped packs -> Megatron batches.

One sample is one pack. The packs of a micro batch are joined into a single row of
`packs * pack_size` tokens in THD layout, where cu_seqlens keeps every document to itself; so the row length that
suits the GPU does not depend on the pack size the data was written with.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from nemotron_sft.packed import open_packs


class PackedDataset:
    """The packs of one split, repeated in a seeded order that is new in every epoch.

    `length` samples in all, so that Megatron's sampler, which counts consumed samples, resumes in mid-epoch.
    Index i is pack `permutation(seed, i // packs)[i % packs]`. With `once_in`, the split is read in order
    and each run of `once_in` samples holds every pack once, then only padding (for validation).
    """

    def __init__(self, path: Path, length: int, seed: int, once_in: int | None = None):
        self.packs = open_packs(path)
        self.length, self.seed, self.once_in = length, seed, once_in

    def __len__(self) -> int:
        return self.length

    def pack_number(self, index: int) -> int | None:
        """Which pack sample `index` is; None for a sample of padding only."""
        if self.once_in:
            position = index % self.once_in
            return position if position < len(self.packs) else None
        epoch, position = divmod(index, len(self.packs))
        return int(_permutation(len(self.packs), self.seed, epoch)[position])

    def __getitem__(self, index: int) -> np.ndarray:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> np.ndarray:
        """The records of a micro batch: a structured array of shape (len(indices),), see nemotron_sft.packed."""
        numbers = [self.pack_number(index) for index in indices]
        records = np.zeros(len(indices), self.packs.dtype)
        for row, number in enumerate(numbers):
            if number is not None:
                records[row] = self.packs[number]
        return records

    def collate_fn(self, records: np.ndarray) -> dict:
        return collate(records)


@functools.lru_cache(maxsize=2)
def _permutation(packs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(packs)


def collate(records: np.ndarray) -> dict:
    """Join packs into one THD row and shift the labels.

    records: structured array (n,) as in nemotron_sft.packed. With T = n * pack_size, returns tensors
    tokens, labels, position_ids (1, T) int64; loss_mask (1, T) float32; cu_seqlens_q, cu_seqlens_kv (1, m) int32,
    which cover all of 0..T (a pack's padding is a sequence of its own); max_seqlen_q, max_seqlen_kv () int32.

    Position i predicts token i + 1, so labels[i] = tokens[i + 1] and loss_mask[i] = mask[i + 1]; the last token of
    a document predicts nothing.

        tokens     <s> u  a  </s> <s> u  a  </s>        mask       0 0 1 1   0 0 1 1
        labels      u  a </s>  -   u  a </s>  -         loss_mask  0 1 1 0   0 1 1 0
    """
    import torch

    packs, pack_size = records["input_ids"].shape
    total = packs * pack_size
    tokens = records["input_ids"].reshape(total).astype(np.int64)
    mask = records["loss_mask"].reshape(total)
    offsets = np.arange(packs, dtype=np.int64)[:, None] * pack_size
    # Unused entries of cu_seqlens repeat the last boundary; unique() drops them, and adds each pack's end.
    cu_seqlens = np.unique(np.append(records["cu_seqlens"] + offsets, np.arange(packs + 1) * pack_size))
    lengths = np.diff(cu_seqlens)
    last = cu_seqlens[1:] - 1

    labels = np.roll(tokens, -1)
    loss_mask = np.roll(mask, -1).astype(np.float32)
    labels[last], loss_mask[last] = 0, 0
    position_ids = np.arange(total) - np.repeat(cu_seqlens[:-1], lengths)

    boundaries = torch.from_numpy(cu_seqlens.astype(np.int32))[None]
    longest = torch.tensor(int(lengths.max()), dtype=torch.int32)
    return {
        "tokens": torch.from_numpy(tokens)[None],
        "labels": torch.from_numpy(labels)[None],
        "loss_mask": torch.from_numpy(loss_mask)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "attention_mask": None,
        "cu_seqlens_q": boundaries,
        "cu_seqlens_kv": boundaries,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }


def packed_dataset_provider(path: str, packs: dict[str, int], evaluated: int, seed: int, **loader):
    """Bridge's DatasetProvider over a prep output.

    packs: number of packs by split; evaluated: samples per validation; loader: fields of Bridge's DataloaderConfig.
    (A function, because Bridge's base class is expensive to import.)
    """
    from megatron.bridge.data.base import DatasetProvider

    @dataclasses.dataclass
    class PackedDatasetProvider(DatasetProvider):
        path: str = ""
        seed: int = 0

        def build_datasets(self, context):
            endless = evaluated * 1_000_000  # validation never runs out of samples, whenever it is asked for
            split = {
                "training": (context.train_samples, None),
                "validation": (endless, evaluated),
                "test": (endless, evaluated),
            }
            return tuple(
                PackedDataset(Path(self.path, f"{name}.npy"), length, self.seed, once_in)
                if packs[name]
                else None
                for name, (length, once_in) in split.items()
            )

    return PackedDatasetProvider(path=path, seed=seed, dataloader_type="single", **loader)
