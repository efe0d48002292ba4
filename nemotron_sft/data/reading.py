"""Records out of files: JSON lines, JSON arrays and Parquet, plain or compressed, here or on a remote file system."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_sft.data import hub
from nemotron_sft.errors import UserError

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class File:
    """One data file.

    path: local path or fsspec URL; for a file on the hub its name inside the data set.
    label: how messages and the lineage name it. stamp: changes when the content does (size and time, ETag, or
    the commit of a hub data set). hub: (repository, commit) of a file on the hub.
    """

    path: str
    label: str
    bytes: int
    stamp: str
    hub: tuple[str, str] | None = None

    @property
    def format(self) -> str:
        """ ".jsonl", ".parquet" and so on; the compression does not count."""
        suffixes = [s for s in Path(self.path).suffixes if s not in COMPRESSED]
        return suffixes[-1] if suffixes else ""

    @property
    def packed(self) -> str:
        """ ".gz", ".zst" or ""."""
        return next((p for p in COMPRESSED if self.path.endswith(p)), "")


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop) of plain JSONL, row groups of Parquet, else all of it."""

    file: File
    start: int
    stop: int
    bytes: int


def pieces(file: File, piece_bytes: int) -> list[Piece]:
    """A file as pieces of about `piece_bytes`, in order. They depend on the file and on piece_bytes only."""
    if file.format == ".parquet":
        with opened(file) as handle:
            meta = _parquet(handle, file).metadata
            sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        return [Piece(file, i, i + 1, size) for i, size in enumerate(sizes)]
    if file.packed or (file.format == ".json" and _is_array(file)):
        return [Piece(file, 0, -1, file.bytes)]
    starts = range(0, file.bytes, piece_bytes)
    return [Piece(file, s, min(s + piece_bytes, file.bytes), min(piece_bytes, file.bytes - s)) for s in starts]


def whole(file: File) -> Piece:
    """The file as one piece, read from its beginning."""
    return Piece(file, 0, -1, file.bytes)


@contextmanager
def opened(file: File) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, decompressed. Raises UserError when it cannot be opened or is damaged."""
    import gzip
    import zlib

    import zstandard

    path = file.path
    try:
        if file.hub:
            path = hub.fetch(*file.hub, file.path)
        if "://" in path:
            import fsspec

            raw = fsspec.open(path, "rb").open()
        else:
            raw = open(path, "rb")  # noqa: SIM115
        with raw:
            if file.packed == ".gz":
                yield gzip.open(raw)  # noqa: SIM115
            elif file.packed == ".zst":
                yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw), 1 << 20)
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{file.label}: damaged {file.packed} file: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{file.label}: no such file any more") from None


def _is_array(file: File) -> bool:
    """Whether a .json file holds one array rather than one object a line."""
    with opened(file) as handle:
        return handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def read(piece: Piece, columns: list[str]) -> Iterator[tuple[int, dict]]:
    """(position, record) of every record of a piece; `columns` limits what is decoded from Parquet.

    Raises UserError, naming file and line, for a record that is not a JSON object.
    """
    file = piece.file
    if file.format == ".parquet":
        yield from _rows(piece, columns)
    elif file.format == ".json" and _is_array(file):
        yield from _elements(file)
    else:
        yield from _lines(piece)


def _lines(piece: Piece) -> Iterator[tuple[int, dict]]:
    """JSONL. A line belongs to the piece in which its first byte lies."""
    import orjson

    by_bytes = not piece.file.packed
    with opened(piece.file) as handle:
        position = 0
        if piece.start:  # step to the first line that begins at or after `start`
            handle.seek(piece.start - 1)
            position = piece.start - 1 + len(handle.readline())
        for line in handle:
            if position >= piece.stop >= 0:
                break
            if not line.isspace():
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    record = _after_mark(line, position) or _malformed(piece.file, position, line, error)
                if type(record) is not dict:
                    raise UserError(f"{locate(piece.file, position)}: {type(record).__name__} instead of a JSON object")
                yield position, record
            position += len(line) if by_bytes else 1


def _after_mark(line: bytes, position: int) -> Any:
    """The record behind the byte order mark that some editors put at the beginning of a file."""
    import orjson

    if position or not line.startswith(b"\xef\xbb\xbf"):
        return None
    try:
        return orjson.loads(line[3:])
    except orjson.JSONDecodeError:
        return None


def _malformed(file: File, position: int, line: bytes, error: ValueError):
    start = line[:60].decode(errors="replace").rstrip()
    hint = "the file may be cut off; " if not line.endswith(b"\n") else ""
    reason = str(error).partition(": line 1")[0]
    raise UserError(f"{locate(file, position)}: not JSON ({reason}): {hint}the line begins {start!r}")


def _elements(file: File) -> Iterator[tuple[int, dict]]:
    """One JSON array. It has to be parsed as a whole, so large data should come as JSONL."""
    import orjson

    with opened(file) as handle:
        try:
            records = orjson.loads(handle.read().removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError as error:
            raise UserError(f"{file.label}:{error.lineno}: not JSON ({error.msg})") from None
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{locate(file, position)}: {type(record).__name__} instead of a JSON object")
        yield position, record


def _parquet(handle, file: File):
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        return pq.ParquetFile(handle)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file.label}: not a Parquet file: {' '.join(str(error).split())}") from None


def _rows(piece: Piece, columns: list[str]) -> Iterator[tuple[int, dict]]:
    with opened(piece.file) as handle:
        table = _parquet(handle, piece.file)
        stop = piece.stop if piece.stop >= 0 else table.num_row_groups
        there = [column for column in columns if column in table.schema_arrow.names]
        position = sum(table.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=there):
            for row in batch.to_pylist():
                yield position, without_nulls(row)
                position += 1


def without_nulls(value: Any) -> Any:
    """Parquet gives every struct every key, null where the record had none: take those out again."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def locate(file: File, position: int) -> str:
    """ "file:line" of a record, counted from 1 (the row or element for Parquet and JSON arrays)."""
    if file.packed or file.format == ".parquet" or (file.format == ".json" and _is_array(file)):
        return f"{file.label}:{position + 1}"
    line, left = 1, position
    with opened(file) as handle:
        while left > 0 and (block := handle.read(min(left, 1 << 22))):
            line += block.count(b"\n")
            left -= len(block)
    return f"{file.label}:{line}"
