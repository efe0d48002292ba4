"""Packed data on disk: the writer, the memory-mapped reader, and the metadata that commits an output.

    output/data/<blend>/
        training.npy validation.npy test.npy   one record per pack (see `pack_dtype`); np.load opens them
        metadata.json                          written last: without it the output does not exist

A file appears under its name only when it is whole: it is written to a temporary name, synced, and renamed.
`write_parquet` writes Megatron-Bridge's own packed schema instead. docs/format.md describes every byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from nemotron_sft.errors import UserError
from nemotron_sft.packing import compiled, members

FORMAT, VERSION = "nemotron-sft-packed", 1


def pack_dtype(pack_size: int, max_sequences: int) -> np.dtype:
    """The dtype of one pack.

    input_ids  int32 (pack_size,)          tokens; past the last boundary the pad id
    loss_mask  uint8 (pack_size,)          1 where the token itself is assistant output, so a training target
    cu_seqlens int32 (max_sequences + 1,)  boundaries in tokens: sequence k is cu_seqlens[k]:cu_seqlens[k+1];
                                           entries after the last boundary repeat it

    Fields are aligned to 4 bytes, hence up to 3 bytes of padding where pack_size is not a multiple of 4.
    """
    fields = [
        ("input_ids", "<i4", (pack_size,)),
        ("loss_mask", "u1", (pack_size,)),
        ("cu_seqlens", "<i4", (max_sequences + 1,)),
    ]
    return np.dtype(fields, align=True)


class AtomicFile:
    """A binary file that appears under `path` when the `with` block ends well, and not at all otherwise.

    Killed in the middle it leaves `.<name>.tmp`, which the next writer of the same path takes over; while a
    writer lives, a second one is refused with a UserError. `bytes` and `sha256` describe what was written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.bytes = 0
        self.closed = False  # pyarrow asks
        self._digest = hashlib.sha256()

    def __enter__(self):
        self._file = open(self.temporary, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path} is being written by another run: wait for it or end it") from None
        except OSError:  # a filesystem without locks
            pass
        self._file.truncate(0)
        return self

    def write(self, data) -> int:
        """Append any bytes-like object."""
        data = memoryview(data).cast("B")
        self._file.write(data)
        self._digest.update(data)
        self.bytes += data.nbytes
        return data.nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self.temporary, self.path)
                _sync_directory(self.path.parent)
            else:
                self.temporary.unlink(missing_ok=True)
        finally:
            self._file.close()  # and with it the lock

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class PackWriter(AtomicFile):
    """Stream `packs` records of `dtype` to a .npy file; memory holds one chunk at a time.

        with PackWriter(path, packs, dtype) as writer:
            writer.append(records)  # (n,) of dtype, as often as you like

    Raises ValueError, and leaves no file, when the number of records is not `packs`.
    """

    def __init__(self, path: str | Path, packs: int, dtype: np.dtype):
        super().__init__(path)
        self.packs, self.dtype, self.written = packs, dtype, 0

    def __enter__(self):
        super().__enter__()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.packs,)}
        np.lib.format.write_array_header_1_0(self, header)
        return self

    def append(self, records: np.ndarray) -> None:
        if records.dtype != self.dtype:
            raise ValueError(f"records of {records.dtype} for a file of {self.dtype}")
        self.written += len(records)
        if len(records):
            self.write(np.ascontiguousarray(records).view(np.uint8))

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self.written != self.packs:
            error = ValueError(f"{self.path}: {self.written} packs written, {self.packs} announced")
            super().__exit__(ValueError, error, None)
            raise error
        super().__exit__(kind, error, trace)


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
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = read_header[version](file)
        except (ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is no .npy file ({_first_line(error)}): {again}") from None
        offset = file.tell()
    if dtype.hasobject:
        raise UserError(
            f"{path} holds pickled Python objects (Megatron-Bridge's old packed format): "
            "prepare the data again with recipes/prep.py"
        )
    if not _is_pack(dtype) or len(shape) != 1 or fortran:
        raise UserError(
            f"{path} holds {dtype} of shape {shape}, not packs (input_ids int32, loss_mask uint8, "
            "cu_seqlens int32): prepare the data again with recipes/prep.py"
        )
    size, promised = path.stat().st_size, offset + shape[0] * dtype.itemsize
    if size != promised:
        kind = "truncated" if size < promised else "longer than it should be"
        raise UserError(f"{path} is {kind}: {size:,} bytes where its header promises {promised:,}; {again}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def fill_packs(
    out: np.ndarray,
    spools: Sequence[tuple[np.ndarray, np.ndarray]],
    spool: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    bounds: np.ndarray,
    pad_id: int,
) -> None:
    """Fill `out`, (n,) of `pack_dtype`, with sequences cut from flat token arrays.

    spools: one (ids int32 (T,), mask uint8 (T,)) per spool; of a memory map, only the tokens needed are read.
    spool, start, length: (m,) per sequence, in pack order: its spool, its first token there, its tokens.
    bounds: (n + 1,) pack p holds the sequences bounds[p]:bounds[p + 1] of these arrays.

    Raises ValueError when a pack would overflow or a sequence reaches past the end of its spool.
    """
    pack_size = out.dtype["input_ids"].shape[0]
    counts = np.diff(bounds)
    pack = np.repeat(np.arange(len(out)), counts)
    ends = np.cumsum(length, dtype=np.int64)
    before = np.concatenate([[0], ends])[bounds]  # tokens ahead of each pack
    end = ends - before[pack]
    tokens = np.diff(before)
    if len(out) and (tokens.max() > pack_size or counts.max() >= out.dtype["cu_seqlens"].shape[0]):
        raise ValueError(
            f"a pack of {tokens.max()} tokens in {counts.max()} sequences does not fit {out.dtype}"
        )

    out["input_ids"] = pad_id
    out["loss_mask"] = 0
    out["cu_seqlens"] = tokens[:, None]
    out["cu_seqlens"][:, 0] = 0
    rank = np.arange(len(pack)) - np.asarray(bounds)[pack]
    out["cu_seqlens"][pack, rank + 1] = end

    # Spool by spool, each from front to back: packs are shuffled, disks like order.
    reading = np.lexsort((start, spool))
    edges = np.searchsorted(np.asarray(spool)[reading], np.arange(len(spools) + 1))
    for (ids, mask), low, high in zip(spools, edges, edges[1:], strict=False):
        part = reading[low:high]
        if not len(part):
            continue
        if (start[part] + length[part]).max() > len(ids) or start[part].min() < 0:
            raise ValueError("a sequence reaches past the end of its spool")
        where = pack[part], end[part] - length[part], start[part], length[part]
        compiled(_copy)(out["input_ids"], out["loss_mask"], np.asarray(ids), np.asarray(mask), *where)


def _copy(out_ids, out_mask, ids, mask, pack, to, start, length):  # compiled by Numba
    for k in range(pack.size):
        for i in range(length[k]):
            out_ids[pack[k], to[k] + i] = ids[start[k] + i]
            out_mask[pack[k], to[k] + i] = mask[start[k] + i]


def stream_packs(
    spools: Sequence[tuple[np.ndarray, np.ndarray]],
    spool: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    bins: np.ndarray,
    pack_size: int,
    pad_id: int,
    chunk_bytes: int = 64 << 20,
) -> Iterator[np.ndarray]:
    """Yield the packs that `bins` (from packing.pack) describes, in order, in chunks of about `chunk_bytes`.

    spools, spool, start, length: as for `fill_packs`, the latter three (N,) like bins and in any order; a
    sequence is cut short by giving a smaller length. Yields (n,) of pack_dtype(pack_size, max_sequences).
    """
    order, bounds = members(bins)
    if len(bounds) == 1:
        return
    dtype = pack_dtype(pack_size, int(np.diff(bounds).max()))
    step = max(1, chunk_bytes // dtype.itemsize)
    for first in range(0, len(bounds) - 1, step):
        edges = bounds[first : first + step + 1]
        chosen = order[edges[0] : edges[-1]]
        out = np.zeros(len(edges) - 1, dtype)
        fill_packs(out, spools, spool[chosen], start[chosen], length[chosen], edges - edges[0], pad_id)
        yield out


def write_packs(path: str | Path, chunks: Iterable[np.ndarray], packs: int) -> dict:
    """Write the packs that `stream_packs` yields and return what metadata.json says of the split.

    The format follows the name: `.npy`, or Megatron-Bridge's `.idx.parquet`. Returns packs, sequences,
    tokens, trained_tokens, fill (tokens / (packs * pack_size)), file, bytes and sha256 (hex). Raises
    ValueError when the chunks do not hold `packs` packs, of which there must be at least one.
    """
    path = Path(path)
    tally = {"packs": 0, "sequences": 0, "tokens": 0, "trained_tokens": 0}
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        raise ValueError(f"{path}: no packs to write")

    def counted():
        for records in chain([first], chunks):
            tally["packs"] += len(records)
            tally["sequences"] += int((np.diff(records["cu_seqlens"]) > 0).sum())
            tally["tokens"] += int(records["cu_seqlens"][:, -1].sum(dtype=np.int64))
            tally["trained_tokens"] += int(records["loss_mask"].sum(dtype=np.int64))
            yield records
        if tally["packs"] != packs:
            raise ValueError(f"{path}: {tally['packs']} packs to write, {packs} announced")

    if path.suffix == ".parquet":
        file = write_parquet(path, counted())
    else:
        with PackWriter(path, packs, first.dtype) as file:
            for records in counted():
                file.append(records)
    places = packs * first["input_ids"].shape[1]
    fill = round(tally["tokens"] / places, 6)
    return tally | {"fill": fill, "file": path.name, "bytes": file.bytes, "sha256": file.sha256}


def write_parquet(path: str | Path, chunks: Iterable[np.ndarray], row_group: int = 64) -> AtomicFile:
    """Write packs in Megatron-Bridge's packed schema, which its GPTSFTPackedParquetDataset reads.

    Columns: input_ids list<int32> without padding, loss_mask list<int8>, seq_start_id list<int32>. Bridge
    pairs loss_mask[j] with the label input_ids[j + 1], so the mask moves one place to the left inside every
    sequence; the last token of a sequence, which has no label, gets 0.

    row_group: packs per row group. Bridge decodes a whole group for every pack that it picks at random, so
    the group is smaller than the 500 of Bridge's writer. Raises ValueError for a name Bridge would not read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not str(path).endswith(".idx.parquet"):
        raise ValueError(f"{path}: Megatron-Bridge reads packs from names ending in .idx.parquet")
    kinds = {"input_ids": pa.int32(), "loss_mask": pa.int8(), "seq_start_id": pa.int32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])

    def lists(counts, values, kind):
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(values, type=kind))

    with AtomicFile(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for records in chunks:
            for low in range(0, len(records), row_group):
                ids, mask, starts, tokens, sequences = _bridge_columns(records[low : low + row_group])
                columns = [
                    lists(tokens, ids, pa.int32()),
                    lists(tokens, mask, pa.int8()),
                    lists(sequences, starts, pa.int32()),
                ]
                writer.write_table(pa.table(columns, schema=schema))
    return file


def _bridge_columns(records: np.ndarray):
    """Flat ids, shifted mask and sequence starts of (n,) packs; tokens and sequences of each pack."""
    cu = records["cu_seqlens"]
    real = np.arange(records["input_ids"].shape[1]) < cu[:, -1:]
    shifted = np.zeros_like(records["loss_mask"])
    shifted[:, :-1] = records["loss_mask"][:, 1:]
    used = np.diff(cu) > 0
    pack = np.nonzero(used)[0]
    shifted[pack, cu[:, 1:][used] - 1] = 0
    return records["input_ids"][real], shifted[real].view(np.int8), cu[:, :-1][used], cu[:, -1], used.sum(1)


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
        ids, mask, cu = packs[index]
        cu = cu[: int((np.diff(cu) > 0).sum()) + 1]
        return np.array(ids[: cu[-1]]), np.array(mask[: cu[-1]]), np.array(cu)

    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no whole Parquet file ({_first_line(error)}): prepare it again") from None
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


def write_metadata(directory: str | Path, metadata: dict) -> None:
    """Write metadata.json, keys in the order given. It is the commit mark of an output, so write it last."""
    import orjson

    text = orjson.dumps(
        metadata, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    )
    with AtomicFile(Path(directory) / "metadata.json") as file:
        file.write(text)


def read_metadata(directory: str | Path) -> dict:
    """The metadata of a finished output; UserError where there is none or one of another format version."""
    import orjson

    path = Path(directory) / "metadata.json"
    try:
        metadata = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no metadata.json in {directory}: not a finished output of recipes/prep.py"
        ) from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}): prepare the data again with recipes/prep.py") from None
    found = (metadata.get("format"), metadata.get("version")) if isinstance(metadata, dict) else None
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{path} says format, version {found}, not {(FORMAT, VERSION)}: prepare the data again"
        )
    return metadata


def _is_pack(dtype: np.dtype) -> bool:
    """Whether dtype is `pack_dtype` of some sizes."""
    if dtype.names != ("input_ids", "loss_mask", "cu_seqlens"):
        return False
    ids, mask, cu = (dtype[name] for name in dtype.names)
    shapes = len(ids.shape) == 1 and mask.shape == ids.shape and len(cu.shape) == 1
    return shapes and (ids.base, mask.base, cu.base) == (np.dtype("<i4"), np.dtype("u1"), np.dtype("<i4"))


def _check_index(path: Path, index: int, packs: int) -> None:
    if not 0 <= index < packs:
        raise UserError(f"no pack {index} in {path}: it has {packs}, numbered from 0")


def _sync_directory(directory: Path) -> None:
    """Make a rename durable: the directory is a file of its own."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
