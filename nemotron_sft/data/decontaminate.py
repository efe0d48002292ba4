"""Training records that share a passage with an evaluation set: found by runs of 13 words.

Every run of the evaluation set is a 64-bit hash in a table (ngrams.py says what a word is); a record whose words give
one of these hashes shares the run. The table takes 24 to 48 bytes for every word of the evaluation set, in every
process, however large the data is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nemotron_sft.data import ngrams, reading, sources
from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.reading import File
from nemotron_sft.errors import UserError


@dataclass(frozen=True)
class Table:
    """The runs of words of an evaluation set.

    keys: (slots,) uint64, hashes of the runs, 0 in a free slot; items: (slots,) int32, the record a run is from.
    origins: where each record is, (index of its file, position). short: how many have no run, being too short.
    """

    keys: np.ndarray
    items: np.ndarray
    origins: list[tuple[int, int]]
    short: int


@dataclass(frozen=True)
class Evaluation:
    """The files of an evaluation set. Plain data that pickles; every process makes its own table."""

    files: tuple[File, ...]

    @property
    def table(self) -> Table:
        """The runs of words of the files, read once per process."""
        return _table(self.files)

    @property
    def stamps(self) -> list[tuple[str, str]]:
        """What changes when the evaluation set does."""
        return [(file.label, file.stamp) for file in self.files]

    def describe(self) -> dict:
        """The files, and how many records and runs of words there are in them; plain data."""
        table = self.table
        return {"files": [file.label for file in self.files], "records": len(table.origins),
                "runs": int(np.count_nonzero(table.keys)), "too_short": table.short}  # fmt: skip

    def shared(self, messages: list) -> str | None:
        """The first 13 words that a conversation shares with the evaluation set, and with which text of it."""
        table = self.table
        shared = ngrams.first_shared(ngrams.joined(ngrams.texts(messages)), table.keys, table.items)
        if shared is None:
            return None
        item, words = shared
        file, position = table.origins[item]
        return f"shares {words!r} with {reading.locate(self.files[file], position)}"


def load_evaluation(paths: list[str]) -> Evaluation | None:
    """The evaluation set in files, directories or hub datasets, whose records hold prompts, messages or any other
    texts; None for no paths. Raises UserError, also when no text is long enough to be found again."""
    if not paths:
        return None
    files = [file for path in paths for file in sources.find(Dataset(name="decontaminate", path=path))]
    evaluation = Evaluation(tuple(files))
    if not evaluation.table.keys.any():
        raise UserError(f"decontaminate: no text of {ngrams.WORDS} words in {', '.join(paths)}")
    return evaluation


@lru_cache(maxsize=1)
def _table(files: tuple[File, ...]) -> Table:
    runs = [np.empty(0, np.uint64)]
    items = [np.empty(0, np.int32)]
    origins: list[tuple[int, int]] = []
    short = 0
    for number, file in enumerate(files):
        for position, record in reading.read(reading.whole(file), None):
            found = np.unique(ngrams.hashes(ngrams.joined(ngrams.texts(record, with_system=False))))
            short += not len(found)
            runs.append(found)
            items.append(np.full(len(found), len(origins), np.int32))
            origins.append((number, position))
    return Table(*ngrams.table(np.concatenate(runs), np.concatenate(items)), origins, short)
