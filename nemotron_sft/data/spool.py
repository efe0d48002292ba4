"""Spool files: the tokens of one work unit, on their way from a worker to the packs.

A file is, front to back:

    tokens      int32, the id of a context token, ~id of a trained one
    index       INDEX, one entry per sequence, in the order of the tokens
    statistics  JSON
    footer      the bytes of these three (3 x int64), and MAGIC

so a unit's tokens never have to be in memory together, and a file cut short is recognised.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from nemotron_sft.errors import UserError

# conversation: hash of the conversation a sequence comes from; start: byte of the file where its tokens begin; copies:
# how often it enters the data; weight: of its tokens in the loss; piece, position: its record, in the unit's piece of
# that number.
INDEX = np.dtype([("conversation", "<u8"), ("start", "<i8"), ("length", "<i4"), ("trained", "<i4"), ("copies", "<u2"),
                  ("weight", "<f4"), ("piece", "<u4"), ("position", "<u8")])  # fmt: skip
MAGIC = b"spool-3\n"


class SpoolWriter:
    """Writes a spool file under a temporary name; `finish` commits it. Left without that, nothing remains."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
        self.index: list[np.ndarray] = []

    def __enter__(self) -> SpoolWriter:
        self.file = open(self.temporary, "wb")
        return self

    def append(self, signed: np.ndarray, index: np.ndarray) -> None:
        """Append sequences. signed: (tokens,) int32 as in the file; index: (sequences,) of INDEX, whose start is
        filled in here."""
        length = index["length"].astype(np.int64)
        index["start"] = self.file.tell() + (np.cumsum(length) - length) * signed.itemsize
        self.file.write(signed.data)
        self.index.append(index)

    def finish(self, stats: dict) -> None:
        """Write the rest, sync, and give the file its name."""
        tokens = self.file.tell()
        index = np.concatenate([np.empty(0, INDEX), *self.index]).tobytes()
        text = json.dumps(stats).encode()
        footer = np.array([tokens, len(index), len(text)], "<i8").tobytes() + MAGIC
        self.file.write(index + text + footer)
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)

    def __exit__(self, *_: object) -> None:
        self.temporary.unlink(missing_ok=True)
        self.file.close()


class Spool:
    """A committed spool file. stats: the statistics of its unit.

    What is decided when units are merged is laid over the index: left_out, (sequences,) bool, those that are to have
    no copies; cut, the sequences (their numbers) that are shorter than in the file, with their length and how many of
    their tokens are trained. None for nothing.

    Tokens are read with `pread`, not mapped: the kernel maps many pages around each one touched, and read in
    the random order of packs they would pile up in the process until memory grew with the data.
    """

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)
        size = os.fstat(self.fd).st_size
        footer = os.pread(self.fd, 32, max(0, size - 32))
        self._tokens, self._index, text = np.frombuffer(footer[:24].ljust(24, b"\0"), "<i8").tolist()
        if footer[24:] != MAGIC or self._tokens + self._index + text + 32 != size:
            os.close(self.fd)
            raise UserError(f"{path} is damaged: delete it and rerun")
        self.left_out: np.ndarray | None = None
        self.cut: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.stats: dict = json.loads(os.pread(self.fd, text, self._tokens + self._index))

    def index(self) -> np.ndarray:
        """(sequences,) of INDEX, read from the file, with what was decided since."""
        index = np.frombuffer(bytearray(os.pread(self.fd, self._index, self._tokens)), INDEX)
        if self.left_out is not None:
            index["copies"][self.left_out] = 0
        if self.cut is not None:
            which, length, trained = self.cut
            index["length"][which], index["trained"][which] = length, trained
        return index

    def leave_out(self, which: np.ndarray) -> None:
        """Give no copies of these sequences, (sequences,) bool, either."""
        self.left_out = which if self.left_out is None else self.left_out | which

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill `target`, a memoryview of bytes, with the tokens from byte `start` of the file on."""
        while target:
            got = os.preadv(self.fd, [target], start)
            if not got:
                raise EOFError(f"spool file ends at byte {start}")
            start, target = start + got, target[got:]

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
