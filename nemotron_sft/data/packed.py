"""Packed data on disk: the writer, the memory-mapped reader, and the metadata that commits an output.

    output/data/<blend>/
        training.npy validation.npy test.npy   one record per pack (see `pack_dtype`); np.load opens them
        metadata.json                          written last: without it the output does not exist

A file appears under its name only when it is whole: it is written to a temporary name, synced, and renamed.
`ParquetWriter` writes Megatron-Bridge's own packed schema instead. docs/format.md describes every byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson

from nemotron_sft.data.packing import compiled
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.files import AtomicFile, write_json

FORMAT, VERSION = "nemotron-sft-packed", 2
READABLE = (1, 2)  # version 1 has neither source nor weight
SPLITS = ("training", "validation", "test")


def pack_dtype(pack_size: int, max_sequences: int, version: int = VERSION) -> np.dtype:
    """The dtype of one pack.

    input_ids  int32 (pack_size,)          tokens; past the last boundary the pad id
    loss_mask  uint8 (pack_size,)          1 where the token itself is assistant output, so a training target
    cu_seqlens int32 (max_sequences + 1,)  boundaries in tokens: sequence k is cu_seqlens[k]:cu_seqlens[k+1];
                                           entries after the last boundary repeat it
    source     uint16 (max_sequences,)     the dataset that sequence k is from, an index into the metadata's list
    weight     float32 (max_sequences,)    what a token of sequence k counts in the loss; 1 unless the data says else

    Fields are aligned to 4 bytes, hence up to 3 bytes of padding where pack_size is not a multiple of 4.
    """
    fields = [
        ("input_ids", "<i4", (pack_size,)),
        ("loss_mask", "u1", (pack_size,)),
        ("cu_seqlens", "<i4", (max_sequences + 1,)),
        ("source", "<u2", (max_sequences,)),
        ("weight", "<f4", (max_sequences,)),
    ]
    return np.dtype(fields if version > 1 else fields[:3], align=True)


def empty_packs(packs: int, dtype: np.dtype) -> np.ndarray:
    """(packs,) of `dtype` without a token, every sequence with weight 1, for a writer to fill."""
    records = np.zeros(packs, dtype)
    if "weight" in (dtype.names or ()):
        records["weight"] = 1
    return records


def separate(records: np.ndarray, used: np.ndarray, pad_id: int) -> None:
    """Make ids and masks of signed tokens, in place.

    records: (packs,) of `pack_dtype`, whose input_ids hold, as spools do, the id of a context token and ~id of a
    trained one; used: (packs,) int64, the tokens of each pack. What follows them becomes pad_id.
    """
    rows = records.view(np.uint8).reshape(len(records), -1)
    compiled(_separate)(rows, used, records["input_ids"].shape[1], pad_id)


class PackWriter:
    """Stream `packs` records of `dtype` to a .npy file; memory holds one chunk at a time.

        with PackWriter(path, packs, dtype) as writer:
            writer.write(records)  # (n,) of dtype, as often as you like
        writer.bytes, writer.sha256

    Raises ValueError, and leaves no file, when the number of records is not `packs`.
    """

    def __init__(self, path: str | Path, packs: int, dtype: np.dtype, threads: int = 1):
        self.file = AtomicFile(path, threads)
        self.packs, self.dtype, self.written = packs, dtype, 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.file)
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def write(self, records: np.ndarray) -> None:
        """Append records, (n,) of the writer's dtype."""
        if records.dtype != self.dtype:
            raise ValueError(f"records of {records.dtype} for a file of {self.dtype}")
        self.written += len(records)
        if len(records):
            self._append(records)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self.written != self.packs:
            error = ValueError(f"{self.file.path}: {self.written} packs written, {self.packs} announced")
            self._stack.__exit__(ValueError, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)

    @property
    def bytes(self) -> int:
        """Size of the file so far."""
        return self.file.bytes

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file."""
        return self.file.sha256

    # What a format decides:

    def _open(self, stack: ExitStack) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.packs,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def _append(self, records: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(records).view(np.uint8))


class ParquetWriter(PackWriter):
    """The same, into Megatron-Bridge's packed schema, which its GPTSFTPackedParquetDataset reads.

    Columns: input_ids list<int32> without padding, loss_mask list<int8>, seq_start_id list<int32>. Bridge
    pairs loss_mask[j] with the label input_ids[j + 1], so the mask moves one place to the left inside every
    sequence; the last token of a sequence, which has no label, gets 0.

    Raises ValueError for a name that Bridge would not read.
    """

    # Bridge decodes a whole row group for every pack that it picks at random, so groups are smaller than the
    # 500 packs of Bridge's own writer.
    ROW_GROUP = 64

    def _open(self, stack: ExitStack) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not str(self.file.path).endswith(".idx.parquet"):
            raise ValueError(f"{self.file.path}: Megatron-Bridge reads packs from names ending in .idx.parquet")
        kinds = {"input_ids": pa.int32(), "loss_mask": pa.int8(), "seq_start_id": pa.int32()}
        self.schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
        self.parquet = stack.enter_context(pq.ParquetWriter(self.file, self.schema, compression="zstd"))

    def _append(self, records: np.ndarray) -> None:
        import pyarrow as pa

        for low in range(0, len(records), self.ROW_GROUP):
            columns = _bridge_columns(records[low : low + self.ROW_GROUP])
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values, offsets in columns]
            self.parquet.write_table(pa.table(lists, schema=self.schema))


def open_packs(path: str | Path) -> np.memmap:
    """Memory-map a packed .npy file: (packs,) of `pack_dtype`, read-only. Opening reads the header only.

    Raises UserError for a file that is missing, truncated, of another kind, or pickled.
    """
    path = Path(path)
    again = "copy it again, or prepare the data again with recipes/prep.py"
    if not path.is_file():
        raise UserError(f"no packed data at {path}: prepare it with recipes/prep.py")
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header: dict[Any, Any] = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = read_header[version](file)
        except (ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is no .npy file ({first_line(error)}): {again}") from None
        offset = file.tell()
    if dtype.hasobject:
        raise UserError(
            f"{path} holds pickled Python objects (Megatron-Bridge's old packed format): "
            "prepare the data again with recipes/prep.py"
        )
    if not _is_pack(dtype) or len(shape) != 1 or fortran:
        raise UserError(
            f"{path} holds {dtype} of shape {shape}, not packs (input_ids int32, loss_mask uint8, cu_seqlens int32, "
            "source uint16, weight float32): prepare the data again with recipes/prep.py"
        )
    size, promised = path.stat().st_size, offset + shape[0] * dtype.itemsize
    if size != promised:
        kind = "truncated" if size < promised else "longer than it should be"
        raise UserError(f"{path} is {kind}: {size:,} bytes where its header promises {promised:,}; {again}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def write_packs(
    path: str | Path, chunks: Iterable[np.ndarray], packs: int, threads: int = 1, datasets: int = 1
) -> dict:
    """Write chunks of records, `packs` (at least one) in all, in the format that the name asks for.

    `.idx.parquet` is Bridge's, everything else .npy. Returns what metadata.json says of a split: packs, sequences,
    tokens, trained_tokens, weights (the least and the most, and their sums over sequences and over trained tokens),
    datasets (for each of `datasets` its sequences, tokens and trained_tokens), fill (tokens / (packs * pack_size)),
    file, bytes and sha256 (hex). Raises ValueError, and leaves no file, when the chunks hold fewer or more packs.
    """
    path, chunks = Path(path), iter(chunks)
    first = next(chunks)
    kind = ParquetWriter if path.suffix == ".parquet" else PackWriter
    counts, weights, least, most = np.zeros((datasets, 3), np.int64), np.zeros(2), np.inf, 0.0
    with kind(path, packs, first.dtype, threads) as writer:
        for records in chain([first], chunks):
            writer.write(records)
            source, weight, lengths, trained = sequences_of(records)
            for column, amounts in enumerate((None, lengths, trained)):
                counts[:, column] += np.bincount(source, amounts, datasets).astype(np.int64)
            weights += weight.sum(dtype=float), (weight * trained).sum(dtype=float)
            least, most = min(least, float(weight.min())), max(most, float(weight.max()))
    sums = [dict(zip(("sequences", "tokens", "trained_tokens"), row, strict=True)) for row in counts.tolist()]
    total = {key: sum(row[key] for row in sums) for key in sums[0]}
    return {
        "packs": packs, **total,
        "weights": {"least": least, "most": most, "sequences": float(weights[0]), "tokens": float(weights[1])},
        "datasets": sums, "fill": round(total["tokens"] / (packs * first["input_ids"].shape[1]), 6),
        "file": path.name, "bytes": writer.bytes, "sha256": writer.sha256,
    }  # fmt: skip


def sequences_of(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every sequence in packs (n,) of any version: source and weight as in the file (0 and 1 in version 1), its
    tokens int64, and how many of them are trained int64; each (sequences,), pack after pack."""
    cu = records["cu_seqlens"].astype(np.int64)
    used = np.diff(cu) > 0
    starts = (cu[:, :-1] + np.arange(len(cu))[:, None] * records["loss_mask"].shape[1])[used]
    lengths = np.diff(cu)[used]
    trained = compiled(_sums)(np.ascontiguousarray(records["loss_mask"]).reshape(-1), starts, lengths)
    if "source" not in (records.dtype.names or ()):
        return np.zeros(len(starts), np.uint16), np.ones(len(starts), np.float32), lengths, trained
    return records["source"][used], records["weight"][used], lengths, trained


def _bridge_columns(records: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bridge's columns for (n,) packs as (values, offsets): pack p has values[offsets[p]:offsets[p+1]]."""
    cu = records["cu_seqlens"]
    used = np.diff(cu) > 0
    pack = np.nonzero(used)[0]
    shifted = np.zeros_like(records["loss_mask"])
    shifted[:, :-1] = records["loss_mask"][:, 1:]
    shifted[pack, cu[:, 1:][used] - 1] = 0
    real = np.arange(shifted.shape[1]) < cu[:, -1:]
    tokens, sequences = (
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32) for counts in (cu[:, -1], used.sum(1))
    )
    ids, mask, starts = records["input_ids"][real], shifted[real].view(np.int8), cu[:, :-1][used]
    return [(ids, tokens), (mask, tokens), (starts, sequences)]


def read_pack(path: str | Path, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One pack without its padding, from either format.

    Returns ids int32 (tokens,), loss_mask uint8 (tokens,), cu_seqlens int32 (sequences + 1,). Parquet has
    lost the mask of each sequence's first token, which is never a target. Raises UserError when there is no
    such pack.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        packs = open_packs(path)
        _check_index(path, index, len(packs))
        ids, mask, cu = (packs[index][name] for name in ("input_ids", "loss_mask", "cu_seqlens"))
        cu = cu[: int((np.diff(cu) > 0).sum()) + 1]
        return np.array(ids[: cu[-1]]), np.array(mask[: cu[-1]]), np.array(cu)

    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no whole Parquet file ({first_line(error)}): prepare it again") from None
    with file:
        _check_index(path, index, file.metadata.num_rows)
        group = 0
        while index >= (rows := file.metadata.row_group(group).num_rows):
            index, group = index - rows, group + 1
        row = file.read_row_group(group).slice(index, 1).to_pydict()
    ids = np.array(row["input_ids"][0], np.int32)
    cu = np.array([*row["seq_start_id"][0], len(ids)], np.int32)
    mask = np.roll(np.array(row["loss_mask"][0], np.uint8), 1)
    mask[cu[:-1]] = 0
    return ids, mask, cu


def read_sequences(path: str | Path, index: int) -> tuple[np.ndarray, np.ndarray] | None:
    """source uint16 and weight float32 (sequences,) of a pack's sequences; None where the format has no place for
    them (version 1, Parquet). Raises UserError when there is no such pack."""
    if Path(path).suffix == ".parquet":
        return None
    packs = open_packs(path)
    _check_index(Path(path), index, len(packs))
    if "source" not in (packs.dtype.names or ()):
        return None
    used = np.diff(packs[index]["cu_seqlens"]) > 0
    return packs[index]["source"][used], packs[index]["weight"][used]


def read_metadata(directory: str | Path) -> dict:
    """The metadata of a finished output; UserError where there is none or one of another format version."""
    path = Path(directory) / "metadata.json"
    try:
        metadata = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no metadata.json in {directory}: not a finished output of recipes/prep.py") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}): prepare the data again with recipes/prep.py") from None
    found = (metadata.get("format"), metadata.get("version")) if isinstance(metadata, dict) else None
    if found not in [(FORMAT, version) for version in READABLE]:
        raise UserError(f"{path} says format, version {found}, not {(FORMAT, VERSION)}: prepare the data again")
    return metadata


def _is_pack(dtype: np.dtype) -> bool:
    """Whether dtype is `pack_dtype` of some sizes, in any version."""
    try:
        pack_size, boundaries = dtype["input_ids"].shape[0], dtype["cu_seqlens"].shape[0]
        return any(dtype == pack_dtype(pack_size, boundaries - 1, version) for version in READABLE)
    except (KeyError, IndexError, TypeError, ValueError):  # fields that are missing or no arrays
        return False


def _check_index(path: Path, index: int, packs: int) -> None:
    if not 0 <= index < packs:
        raise UserError(f"no pack {index} in {path}: it has {packs}, numbered from 0")


def write_metadata(directory: str | Path, metadata: dict) -> None:
    """Write metadata.json. It is the commit mark of an output, so write it last."""
    write_json(Path(directory) / "metadata.json", metadata)


def find_data(path: str, output_dir: str | Path) -> Path:
    """The prep output to train on; "latest" is the one committed last under output_dir/data."""
    if path != "latest":
        return Path(path)
    root = Path(output_dir, "data")
    committed = sorted(root.glob("*/metadata.json"), key=lambda file: file.stat().st_mtime)
    if not committed:
        raise UserError(f"no prepared data under {root}: run python recipes/prep.py first, or give data=PATH")
    return committed[-1].parent


# --- compiled by Numba -------------------------------------------------------------------------------------


def _separate(rows: np.ndarray, used: np.ndarray, pack_size: int, pad_id: int) -> None:
    """`separate`, of packs as bytes, (packs, bytes of one): ids and mask are their first two fields."""
    for pack in range(len(rows)):
        ids = rows[pack, : 4 * pack_size].view(np.int32)
        mask = rows[pack, 4 * pack_size : 5 * pack_size]
        for place in range(used[pack]):
            sign = ids[place] >> 31  # -1 where the token is trained, so that its id is inverted
            mask[place] = sign & 1
            ids[place] ^= sign
        ids[used[pack] :] = pad_id


def _sums(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums (n,) int64 of values[start : start + length]."""
    sums = np.empty(len(starts), np.int64)
    for part in range(len(starts)):
        total = 0
        for value in values[starts[part] : starts[part] + lengths[part]]:
            total += value
        sums[part] = total
    return sums
