"""Records out of files: JSON lines, JSON arrays, Parquet and Arrow, plain or compressed, here or on a remote file
system."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemotron_sft.data import columnar, hub
from nemotron_sft.data.jsontext import NotJSON, loads
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.files import JSON_LINES

FORMATS = (*JSON_LINES, ".json", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
COLUMNAR = (".parquet", ".arrow")
_SPACE = b"\xef\xbb\xbf \t\r\n"  # what may stand before the first record: a byte order mark and blanks
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class File:
    """One data file.

    path: local path or fsspec URL; for a file on the hub its name inside the dataset.
    label: how messages and the lineage name it. stamp: changes when the content does (size and time, ETag, or
    the commit of a hub dataset). hub: (repository, commit) of a file on the hub. name: what tells it from the other
    files of its dataset, wherever the dataset lies.
    """

    path: str
    label: str
    bytes: int
    stamp: str
    hub: tuple[str, str] | None = None
    name: str = ""

    @property
    def format(self) -> str:
        """ ".jsonl", ".parquet" and so on; the compression does not count."""
        suffixes = [s for s in Path(self.path).suffixes if s not in COMPRESSED]
        return suffixes[-1] if suffixes else ""

    @property
    def compression(self) -> str:
        """ ".gz", ".zst" or ""."""
        return next((p for p in COMPRESSED if self.path.endswith(p)), "")


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop) of plain JSON lines, row groups of Parquet, record batches of Arrow, else
    all of it."""

    file: File
    start: int
    stop: int
    bytes: int


def pieces(file: File, piece_bytes: int) -> list[Piece]:
    """A file as pieces of about `piece_bytes`, in order. They depend on the file and on piece_bytes only."""
    if file.format in COLUMNAR:
        with opened(file) as handle, _whole_columns(file, handle):
            if file.format == ".parquet":
                return [Piece(file, i, i + 1, size) for i, size in enumerate(columnar.parquet_sizes(handle))]
            return _arrow_pieces(file, columnar.arrow_sizes(handle), piece_bytes)
    if file.compression or _is_array(file):
        return [Piece(file, 0, -1, file.bytes)]
    starts = range(0, file.bytes, piece_bytes)
    return [Piece(file, s, min(s + piece_bytes, file.bytes), min(piece_bytes, file.bytes - s)) for s in starts]


def _arrow_pieces(file: File, sizes: list[int], piece_bytes: int) -> list[Piece]:
    """Record batches in groups: they are small, and whoever wants one has to step over those before it."""
    found, start = [], 0
    for stop in range(1, len(sizes) + 1):
        size = sum(sizes[start:stop])
        if size >= piece_bytes or stop == len(sizes):
            found.append(Piece(file, start, stop, size))
            start = stop
    return found


def whole(file: File) -> Piece:
    """The file as one piece, read from its beginning."""
    return Piece(file, 0, -1, file.bytes)


# --- opening -----------------------------------------------------------------------------------------------


@contextmanager
def opened(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises UserError when it cannot be opened or is damaged."""
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
            if file.compression == ".gz":
                yield cast(BinaryIO, gzip.open(raw))  # noqa: SIM115
            elif file.compression == ".zst":
                yield io.BufferedReader(_Zstandard(raw), 1 << 20)
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{file.label}: damaged {file.compression} file: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{file.label}: no such file any more") from None
    except PermissionError:
        raise UserError(f"{file.label}: no permission to read it") from None


class _Zstandard(io.RawIOBase):
    """The content of a .zst file: all its frames, and EOFError where the last one is cut off. zstandard's own reader
    ends quietly in both cases."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self.raw, self.frames = raw, zstandard.ZstdDecompressor()
        self.frame: Any = None  # the one that is being read
        self.rest, self.content = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            self.rest = self.rest or self.raw.read(1 << 18)
            if not self.rest:
                if self.frame:
                    raise EOFError("it ends in the middle")
                return 0
            self.frame = self.frame or self.frames.decompressobj()
            self.content = self.frame.decompress(self.rest)
            self.rest = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        part, self.content = self.content[: len(buffer)], self.content[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


@contextmanager
def _whole_columns(file: File, handle: BinaryIO) -> Iterator[None]:
    """Report a damaged Parquet or Arrow file in one line."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        handle.seek(0)
        _refuse_pointer(file, handle.read(64))
        kind = file.format[1:].capitalize()
        raise UserError(f"{file.label}: not a whole {kind} file: {first_line(error)}") from None


def _refuse_pointer(file: File, start: bytes) -> None:
    if start.startswith(_POINTER):
        raise UserError(f"{file.label}: a Git LFS pointer instead of the data: run git lfs pull there")


def _is_array(file: File) -> bool:
    """Whether a JSON file holds one array rather than one record a line (which may be an array, too)."""
    with opened(file) as handle:
        start = handle.read(64).lstrip(_SPACE)
        if not start.startswith(b"["):
            return False
        line, ended, after = start.partition(b"\n")
        if not ended:
            line += handle.readline(1 << 24)
        after = (after + handle.read(64)).lstrip(_SPACE)
        return not (line.rstrip(_SPACE).endswith(b"]") and after.startswith(b"["))


# --- records -----------------------------------------------------------------------------------------------


def read(
    piece: Piece, columns: list[str] | None, bad: Callable[[int, str, str], None] | None = None
) -> Iterator[tuple[int, dict]]:
    """(position, record) of every record of a piece; `columns` limits what is decoded from Parquet and Arrow.

    bad(position, reason, detail) is told of what is no record: a line that is not JSON, or not an object. Without
    it, and for a file that is damaged as a whole, raises UserError, naming file and line.
    """
    file = piece.file

    def refuse(position: int, reason: str, detail: str) -> None:
        raise UserError(f"{locate(file, position)}: {detail}")

    source = _rows(piece, columns) if file.format in COLUMNAR else _elements(file) if _is_array(file) else _lines(piece)
    for position, record in source:
        if type(record) is dict:
            yield position, record
        elif type(record) is list and record and all(type(message) is dict for message in record):
            yield position, {"messages": record}
        elif isinstance(record, ValueError):
            reason, *hint = record.args
            (bad or refuse)(position, "not JSON", f"not JSON ({reason})" + "".join(hint))
        else:
            (bad or refuse)(position, "not an object", f"{type(record).__name__} instead of a JSON object")


def _lines(piece: Piece) -> Iterator[tuple[int, object]]:
    """JSON lines. A line belongs to the piece in which its first byte lies."""
    by_bytes = not piece.file.compression
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
                    record = loads(line)
                except NotJSON as error:
                    record = _malformed(piece.file, line, error)
                yield position, record
            position += len(line) if by_bytes else 1


def _malformed(file: File, line: bytes, error: NotJSON) -> ValueError:
    """The same error, with a look at the line."""
    _refuse_pointer(file, line)
    hint = "the file may be cut off; " if not line.endswith(b"\n") else ""
    if line.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        return ValueError(str(error), ": it is compressed and not named so (.gz, .zst)")
    if line.strip() == b"{":
        hint = "a record is one line, or an element of one JSON array; "
    return ValueError(str(error), f": {hint}the line begins {line[:60].decode(errors='replace').rstrip()!r}")


def _elements(file: File) -> Iterator[tuple[int, object]]:
    """One JSON array. It has to be parsed as a whole, so large data should come as JSON lines."""
    with opened(file) as handle:
        try:
            records = loads(handle.read())
        except NotJSON as error:
            raise UserError(f"{file.label}:{error.line}: not JSON ({error})") from None
    yield from enumerate(records)


def _rows(piece: Piece, columns: list[str] | None) -> Iterator[tuple[int, object]]:
    """Parquet and Arrow."""
    rows = columnar.parquet_rows if piece.file.format == ".parquet" else columnar.arrow_rows
    with opened(piece.file) as handle, _whole_columns(piece.file, handle):
        yield from rows(handle, columns, piece.start, piece.stop)


def locate(file: File, position: int) -> str:
    """ "file:line" of a record, counted from 1 (the row or element for Parquet, Arrow and JSON arrays)."""
    return locate_all(file, [position])[position]


def locate_all(file: File, positions: list[int]) -> dict[int, str]:
    """`locate` for several records of a file, by position, which reads it once."""
    if file.compression or file.format in COLUMNAR or _is_array(file):
        return {position: f"{file.label}:{position + 1}" for position in positions}
    found, line, done = {}, 1, 0
    with opened(file) as handle:
        for position in sorted(positions):
            while done < position and (block := handle.read(min(position - done, 1 << 22))):
                line += block.count(b"\n")
                done += len(block)
            found[position] = f"{file.label}:{line}"
    return found
