"""Packs on disk -> Megatron batches.

One sample is one pack. The packs of a micro batch are joined into a single row of
`packs * pack_size` tokens in THD layout, where cu_seqlens keeps every document to itself; so the row length that
suits the GPU does not depend on the pack size the data was written with.

Where a row is split over ranks, documents are padded as context parallelism needs them when the row is made, so
the same packs serve every topology.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from nemotron_sft.data.packed import open_packs
from nemotron_sft.errors import UserError
from nemotron_sft.train.balance import Dealing, deal


@dataclasses.dataclass(frozen=True)
class Weighting:
    """What a trained token counts in the loss: `scale` times its sequence's weight and, with per="sequence", divided
    by the number of the sequence's trained tokens, so that every sequence counts the same whatever its length.

    The loss is divided by the sum of it all, so the scale changes no loss. It makes the mean over a split 1, as
    without weights, because losses of another kind (balance of experts) are weighed against the number of tokens.
    """

    per: str = "token"
    scale: float = 1.0
    weighted: bool = False  # whether anything counts more or less than another


PLAIN = Weighting()


def weighting(metadata: dict, per: str) -> Weighting:
    """The weighting of a prep output. per: "token" or "sequence"; UserError for another word."""
    if per not in ("token", "sequence"):
        raise UserError(f"train.loss_per={per}: choose token or sequence")
    training = metadata["splits"]["training"]
    equal = {"sequences": training["sequences"], "tokens": training["trained_tokens"], "least": 1, "most": 1}
    weights = training.get("weights", equal)  # version 1 has none
    if not weights[f"{per}s"]:
        raise UserError("every sequence of the training data has weight 0: there is nothing to train on")
    weighted = per == "sequence" or not weights["least"] == weights["most"] == 1
    return Weighting(per, training["trained_tokens"] / weights[f"{per}s"], weighted)


def dataset_names(metadata: dict) -> list[str]:
    """The datasets that the packs of a prep output tell apart, in the order of their numbers; [] if they cannot."""
    names = [dataset["name"] for dataset in metadata["blend"]["datasets"]]
    return names if metadata["version"] > 1 or len(names) == 1 else []


class PackedDataset:
    """The packs of one split, repeated in a seeded order that is new in every epoch.

    `length` samples in all, so that Megatron's sampler, which counts consumed samples, resumes in mid-epoch.
    Index i is pack `permutation(seed, i // packs)[i % packs]`. With `once_in`, the split is read in order
    and each run of `once_in` samples holds every pack once, then only padding (for validation).
    context_parallel, tensor_parallel: how many ranks share a row; weighting: what tokens count; mtp_depth: see
    `collate`. dealing: with it the packs of a step change places, so that every data-parallel rank has as much
    attention to compute; the packs of each step stay the same.
    """

    def __init__(
        self,
        path: Path,
        length: int,
        seed: int,
        once_in: int | None = None,
        context_parallel: int = 1,
        tensor_parallel: int = 1,
        weighting: Weighting = PLAIN,
        mtp_depth: int = 0,
        dealing: Dealing | None = None,
    ):
        packs = open_packs(path)
        self.count, self.length, self.seed, self.once_in = len(packs), length, seed, once_in
        self.context_parallel, self.tensor_parallel = context_parallel, tensor_parallel
        self.weighting, self.mtp_depth = weighting, mtp_depth
        self.dealing = dealing if dealing and dealing.ranks > 1 and not once_in else None
        self._dealt: tuple[int, np.ndarray] | None = None  # number of a step, and its packs in order
        # Read, not mapped: pages that were touched would count as this process's memory.
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 -- for as long as there is a dataset
        self.offset, self.bytes = packs.offset, packs.dtype.itemsize
        self.dtype = _numbered(packs.dtype)

    def __len__(self) -> int:
        return self.length

    def pack_number(self, index: int) -> int | None:
        """Which pack sample `index` is; None for a sample of padding only."""
        if self.once_in:
            position = index % self.once_in
            return position if position < self.count else None
        if not self.dealing:
            return self._in_turn(index)
        step, place = divmod(index, self.dealing.global_batch)
        if not self._dealt or self._dealt[0] != step:
            first = step * self.dealing.global_batch
            packs = np.array([self._in_turn(i) for i in range(first, first + self.dealing.global_batch)])
            self._dealt = step, packs[deal(np.array([self._squares(pack) for pack in packs]), self.dealing)]
        return int(self._dealt[1][place])

    def _in_turn(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        return int(_permutation(self.count, self.seed, epoch)[position])

    def _squares(self, number: int) -> float:
        """Sum of the squared lengths of a pack's sequences, which causal attention grows with."""
        kind, place = self.dtype.fields["cu_seqlens"][:2]
        raw = os.pread(self.file.fileno(), kind.itemsize, self.offset + number * self.bytes + place)
        return float((np.diff(np.frombuffer(raw, "<i4").astype(float)) ** 2).sum())

    def __getitem__(self, index: int) -> np.ndarray:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> np.ndarray:
        """The records of a micro batch: a structured array (len(indices),) of nemotron_sft.data.packed's fields and
        `number` int64, the place in the file, or -1 for padding."""
        records = np.zeros(len(indices), self.dtype)
        raw = records.view(np.uint8).reshape(len(indices), -1)
        for i, number in enumerate(map(self.pack_number, indices)):
            records["number"][i] = -1 if number is None else number
            if number is not None:
                os.preadv(self.file.fileno(), [raw[i, : self.bytes]], self.offset + number * self.bytes)
        return records

    def collate_fn(self, records: np.ndarray) -> dict:
        """The batch of some records, see `collate`."""
        return collate(records, self.context_parallel, self.tensor_parallel, self.weighting, self.mtp_depth)


def _numbered(dtype: np.dtype) -> np.dtype:
    """`dtype` as it lies in the file, with the record's `number` behind it, by which an error can name it."""
    names, size = dtype.names, -(-dtype.itemsize // 8) * 8
    offsets = [dtype.fields[name][1] for name in names]
    formats = [dtype[name] for name in names]
    return np.dtype(
        {"names": [*names, "number"], "formats": [*formats, "<i8"], "offsets": [*offsets, size], "itemsize": size + 8}
    )


@functools.lru_cache(maxsize=2)
def _permutation(packs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(packs)


def collate(
    records: np.ndarray,
    context_parallel: int = 1,
    tensor_parallel: int = 1,
    weighting: Weighting = PLAIN,
    mtp_depth: int = 0,
) -> dict:
    """Join packs into one THD row and shift the labels.

    records: structured array (n,) as in nemotron_sft.data.packed. With T = n * pack_size, returns tensors
    tokens, labels, position_ids (1, T) int64; loss_mask (1, T) float32, what the loss of a position counts (1, unless
    sequences have weights or `weighting` says otherwise); sources (1, T) int32, the dataset a token is from;
    cu_seqlens_q, cu_seqlens_kv (1, m) int32, which cover all of 0..T (a pack's padding is a sequence of its own);
    max_seqlen_q, max_seqlen_kv () int32;
    trained_positions (k,) int64, where loss_mask is not 0, and others up to a multiple of 128 (or T); and counts, a
    dict of plain numbers (tokens, trained, squares = the sum of squared lengths) with the packs' numbers and kept, the
    number of trained_positions of each context-parallel rank.

    Position i predicts token i + 1, so labels[i] = tokens[i + 1] and loss_mask[i] = mask[i + 1]; the last token of
    a document predicts nothing.

        tokens     <s> u  a  </s> <s> u  a  </s>        mask       0 0 1 1   0 0 1 1
        labels      u  a </s>  -   u  a </s>  -         loss_mask  0 1 1 0   0 1 1 0

    context_parallel > 1: each rank gets two of 2 * context_parallel equal pieces of every document (the zigzag of
    Transformer Engine's ring attention), so every document is padded to a multiple of that with tokens that have no
    loss; a pack's own padding is dropped. cu_seqlens_q_padded, cu_seqlens_kv_padded (1, m) are then the boundaries
    in the row and cu_seqlens_q those of the real tokens. T is a multiple of 2 * context_parallel * tensor_parallel,
    since sequence parallelism cuts each rank's share again. trained_positions then holds those of every rank in turn,
    each counted in the rank's own share of the row.

    mtp_depth: how many tokens further the model predicts as well; trained_positions then holds the positions from which
    a trained token is predicted by any of its heads.
    """
    import torch

    row, cu_seqlens = _joined(records, weighting)
    padded = None
    if context_parallel > 1:
        row, cu_seqlens, padded = _pad_documents(
            row, cu_seqlens, _is_document(records, cu_seqlens), 2 * context_parallel, tensor_parallel
        )
    in_row = cu_seqlens if padded is None else padded
    lengths = np.diff(cu_seqlens)
    row["position_ids"] = np.arange(in_row[-1]) - np.repeat(in_row[:-1], np.diff(in_row))

    batch = {name: torch.from_numpy(values)[None] for name, values in row.items()} | {"attention_mask": None}
    batch |= _boundary_tensors(cu_seqlens, padded)
    shares = _shares(row["loss_mask"] != 0, in_row, context_parallel, mtp_depth)
    kept = [_kept_positions(share, 128) for share in shares]
    batch["trained_positions"] = torch.from_numpy(np.concatenate(kept))
    counts = {
        "tokens": int(in_row[-1]),
        "trained": int((row["loss_mask"] != 0).sum()),
        "squares": int((lengths**2).sum()),
        "kept": [len(positions) for positions in kept],
        "packs": records["number"].tolist() if "number" in records.dtype.names else [],
    }
    return batch | {"counts": counts}


def _joined(records: np.ndarray, weighting: Weighting) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The row of `collate` before it is padded, arrays (T,), and its boundaries cu_seqlens (m + 1,) int64."""
    packs, pack_size = records["input_ids"].shape
    total = packs * pack_size
    tokens = records["input_ids"].reshape(total).astype(np.int64)
    mask = records["loss_mask"].reshape(total)
    cu_seqlens = _boundaries(records)
    last = cu_seqlens[1:] - 1

    labels, trained = np.append(tokens[1:], 0), np.append(mask[1:], 0) != 0
    labels[last], trained[last] = 0, False
    loss_mask, sources = _weighed(records, trained, cu_seqlens, weighting)
    row = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "sources": sources}
    return row, cu_seqlens


def _boundaries(records: np.ndarray) -> np.ndarray:
    """Where the sequences of joined packs begin and end, padding too: (m + 1,) int64, ascending, each once."""
    packs, pack_size = records["input_ids"].shape
    # Every pack's boundaries and its end. Unused entries repeat the last boundary.
    found = np.full((packs, records["cu_seqlens"].shape[1] + 1), pack_size, np.int64)
    found[:, :-1] = records["cu_seqlens"]
    found += np.arange(packs)[:, None] * pack_size
    found = found.ravel()
    return np.concatenate([found[:1], found[1:][found[1:] > found[:-1]]])


def _boundary_tensors(cu_seqlens: np.ndarray, padded: np.ndarray | None) -> dict:
    """What Bridge calls the boundaries of the tokens and of their places in the row, and the longest place."""
    import torch

    found = {}
    for suffix, boundaries in (("", cu_seqlens), ("_padded", padded)):
        if boundaries is not None:
            shared = torch.from_numpy(boundaries.astype(np.int32))[None]
            found |= {f"cu_seqlens_q{suffix}": shared, f"cu_seqlens_kv{suffix}": shared}
    in_row = cu_seqlens if padded is None else padded
    longest = torch.tensor(int(np.diff(in_row).max()), dtype=torch.int32)
    return found | {"max_seqlen_q": longest, "max_seqlen_kv": longest}


def _weighed(records: np.ndarray, trained: np.ndarray, cu_seqlens: np.ndarray, weighting: Weighting):
    """loss_mask (T,) float32 and sources (T,) int32 of a row, see `collate`. trained: (T,) bool, positions with a
    label to learn; cu_seqlens: (m + 1,), the row's boundaries, which bound packs' padding too."""
    lengths = np.diff(cu_seqlens)
    if "weight" not in records.dtype.names:
        source, weight = np.zeros(len(lengths), np.int32), np.ones(len(lengths), np.float32)
    else:
        cu = records["cu_seqlens"]
        used = np.concatenate([np.diff(cu) > 0, cu[:, -1:] < records["input_ids"].shape[1]], 1)  # last: the padding
        source, weight = (np.pad(records[name], ((0, 0), (0, 1)))[used] for name in ("source", "weight"))
    sources = np.repeat(source.astype(np.int32), lengths)
    weight = weight * np.float32(weighting.scale)
    if weighting.per == "sequence":
        weight = weight / np.maximum(1, np.add.reduceat(trained, cu_seqlens[:-1], dtype=np.int64)).astype(np.float32)
    return np.where(trained, np.repeat(weight, lengths), np.float32(0)), sources


def _kept_positions(trained: np.ndarray, multiple: int) -> np.ndarray:
    """Where `trained` (T,) bool is true, filled up with other positions to a multiple that matrix products like:
    int64 (k,), ascending, so that all T of them leave a row as it is."""
    kept = trained.copy()
    kept[np.flatnonzero(~trained)[: -np.count_nonzero(trained) % multiple]] = True
    return np.flatnonzero(kept)


def _shares(trained: np.ndarray, in_row: np.ndarray, ranks: int, mtp_depth: int) -> list[np.ndarray]:
    """What each context-parallel rank holds of `trained` (T,) bool, with the `mtp_depth` positions before each.

    in_row: (m + 1,) boundaries of the documents. A rank has pieces r and 2 * ranks - 1 - r of each document.
    """
    wanted = trained.copy()
    for ahead in range(1, mtp_depth + 1):
        wanted[:-ahead] |= trained[ahead:]
    if ranks == 1:
        return [wanted]
    lengths = np.diff(in_row)
    within = np.arange(in_row[-1]) - np.repeat(in_row[:-1], lengths)
    piece = within // np.repeat(lengths // (2 * ranks), lengths)
    holder = np.minimum(piece, 2 * ranks - 1 - piece)
    return [wanted[holder == rank] for rank in range(ranks)]


def _is_document(records: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Which sequences between `cu_seqlens` (m + 1,) are documents and not a pack's padding: bool (m,)."""
    pack_size = records["input_ids"].shape[1]
    pack, place = np.divmod(cu_seqlens[:-1], pack_size)
    documents = place < records["cu_seqlens"][pack, -1]
    documents[0] |= not documents.any()  # Megatron cannot take an empty row: one of only padding keeps a sequence
    return documents


def _pad_documents(row: dict, cu_seqlens, documents, multiple: int, tensor_parallel: int):
    """Copy the documents of a row (arrays of T) to places that are multiples of `multiple`.

    Returns the new row, the boundaries of the real tokens, and those of the places; see `collate`.
    """
    starts, lengths = cu_seqlens[:-1][documents], np.diff(cu_seqlens)[documents]
    room = -(-lengths // multiple) * multiple
    room[-1] += -room.sum() % (multiple * tensor_parallel)
    real, padded = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (lengths, room))
    within = np.arange(real[-1]) - np.repeat(real[:-1], lengths)  # position of every real token in its document
    source, target = within + np.repeat(starts, lengths), within + np.repeat(padded[:-1], lengths)
    spread = {}
    for name, values in row.items():
        spread[name] = np.zeros(padded[-1], values.dtype)
        spread[name][target] = values[source]
    return spread, real, padded


def packed_dataset_provider(
    path: str,
    packs: dict[str, int],
    evaluated: int,
    seed: int,
    ranks: tuple,
    weighting: Weighting = PLAIN,
    sources: int = 0,
    mtp_depth: int = 0,
    dealing: Dealing | None = None,
    **loader,
):
    """Bridge's DatasetProvider over a prep output.

    packs: number of packs by split; evaluated: samples per validation; ranks: context and tensor parallel sizes;
    weighting: what tokens count in the loss; sources: the number of datasets in the packs, 0 if they don't say;
    mtp_depth: how many tokens further the model predicts; dealing: how a step's packs go to data-parallel ranks;
    loader: fields of Bridge's DataloaderConfig.
    (A function, because Bridge's base class is expensive to import.)
    """
    from megatron.bridge.data.base import DatasetProvider

    @dataclasses.dataclass
    class PackedDatasetProvider(DatasetProvider):
        path: str = ""
        seed: int = 0
        weighted: bool = weighting.weighted
        sources: int = 0
        # Else Bridge gives the middle stages of a pipeline no boundaries, and documents see each other there. (No row
        # has a mask.)
        skip_getting_attention_mask_from_dataset: bool = False

        def build_datasets(self, context):
            endless = evaluated * 1_000_000  # validation never runs out of samples, whenever it is asked for
            split = {
                # One more than is trained on: Megatron's sampler refuses a finished run, which only evaluates again.
                "training": (context.train_samples + 1, None),
                "validation": (endless, evaluated),
                "test": (endless, evaluated),
            }
            return tuple(
                PackedDataset(
                    Path(self.path, f"{name}.npy"), length, self.seed, once_in, *ranks, weighting, mtp_depth, dealing
                )
                if packs[name]
                else None
                for name, (length, once_in) in split.items()
            )

    return PackedDatasetProvider(path=path, seed=seed, sources=sources, dataloader_type="single", **loader)
