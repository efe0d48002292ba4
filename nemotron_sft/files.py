"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import orjson

from nemotron_sft.errors import UserError

JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")  # one JSON value a line


class AtomicFile:
    """A binary file that appears under `path` when the `with` block ends well, and not at all otherwise.

    Killed in the middle it leaves `.<name>.tmp`, which the next writer of the same path takes over; while a
    writer lives, a second one is refused with a UserError. `bytes` and `sha256` describe what was written.
    threads: with more than one, what is written is hashed at the same time.

    It is written in whole blocks, past the page cache where the file system can do that: what is written once and
    read much later, if here at all, would push other things out of memory, and filling the cache costs more than
    writing to a fast disk.
    """

    BLOCK = 8 << 20  # bytes; direct writes must be multiples of the disk's own blocks

    def __init__(self, path: str | Path, threads: int = 1):
        self._hashing = ThreadPoolExecutor(1) if threads > 1 else None
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.bytes = 0
        self.closed = False  # pyarrow asks
        self._digest = hashlib.sha256()
        self._block = memoryview(mmap.mmap(-1, self.BLOCK))  # in pages of its own, as direct writes demand

    def __enter__(self) -> Self:
        self._fd = os.open(self.temporary, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise UserError(f"{self.path} is being written by another run: wait for it or end it") from None
        except OSError:  # a filesystem without locks
            pass
        os.truncate(self._fd, 0)
        self._direct(True)
        return self

    def write(self, data: Any) -> int:
        """Append any bytes-like object."""
        view: memoryview = memoryview(data).cast("B")
        hashed = self._hashing.submit(self._digest.update, view) if self._hashing else None
        if not hashed:
            self._digest.update(view)
        rest = view
        while rest:
            filled = self.bytes % self.BLOCK
            part = rest[: self.BLOCK - filled]
            self._block[filled : filled + len(part)] = part
            self.bytes += len(part)
            rest = rest[len(part) :]
            if self.bytes % self.BLOCK == 0:
                self._write_out(self._block)
        if hashed:
            hashed.result()
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:  # pyarrow calls it
        """Nothing to do: nothing is kept back."""
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._direct(False)
                self._write_out(self._block[: self.bytes % self.BLOCK])
                os.fsync(self._fd)
                os.replace(self.temporary, self.path)
                _sync_directory(self.path.parent)
            else:
                self.temporary.unlink(missing_ok=True)
        finally:
            os.close(self._fd)  # and with it the lock
            if self._hashing:
                self._hashing.shutdown()

    def _direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        with suppress(OSError):  # a file system that cannot
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def _write_out(self, data: memoryview) -> None:
        while data:
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct(False)  # a file system that took the flag, and takes no such write
                written = os.write(self._fd, data)
            data = data[written:]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what was written."""
        return self._digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    """Make a rename durable: the directory is a file of its own."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data (NumPy scalars included) as indented JSON, atomically, keys in the order given."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    with AtomicFile(path) as file:
        file.write(orjson.dumps(value, option=options, default=str))
