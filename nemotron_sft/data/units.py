"""Work units: the inputs cut into pieces that any process can tokenize, in any order, on any machine.

    todo = plan(cfg)            which units there are; depends on the inputs and settings alone
    run_unit(todo, unit)        records -> template -> tokens, into one spool file

A unit's key is a fingerprint of its input and of every setting that shapes its tokens, and a spool file
appears under that name only when it is whole. So work that is done is never redone, and a changed setting
never picks up stale tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from nemotron_sft.data import reading
from nemotron_sft.data.chat import RECORD_KEYS, ChatError, per_record, record_weight
from nemotron_sft.data.identity import conversation_digest
from nemotron_sft.data.plan import Plan, Unit
from nemotron_sft.data.spool import INDEX, Spool, SpoolWriter
from nemotron_sft.data.tokens import fastest, tokenize
from nemotron_sft.errors import UserError

LENGTH_EDGES = [0, *(2**k for k in range(4, 21))]  # of the length histogram, in tokens
BATCH_CHARACTERS = 2 << 20  # of text tokenized in one call
CONTAMINATED = "in an evaluation set"
LABEL = "label"  # of a record of KTO's data: whether its answer is a good one
SUMS = ("records_read", "records_matched", "records_kept", "passes")


def run_unit(todo: Plan, unit: Unit) -> dict:
    """Tokenize one unit into its spool file, unless that exists, and return the unit's statistics.

    Raises UserError, naming file and line, for an unusable record if the plan allows no drops.
    """
    path = todo.spool(unit)
    if path.exists():
        with Spool(path) as spool:
            return spool.stats
    work = _Work(todo, unit)
    with SpoolWriter(path) as spool:
        for batch in work.batches():
            work.write(batch, *tokenize(todo.tokenizer, batch.sequences), spool)
        spool.finish(work.stats)
    return work.stats


@dataclass
class _Batch:
    """Sequences waiting to be tokenized, with what is known of each."""

    sequences: list = field(default_factory=list)
    conversations: list[int] = field(default_factory=list)  # hash of the conversation it came from
    copies: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # in the loss
    origins: list[tuple[int, int]] = field(default_factory=list)  # (index of the piece, position)
    characters: int = 0


class _Work:
    """One unit in the making: counts, drops, and the batches to tokenize."""

    def __init__(self, todo: Plan, unit: Unit):
        self.todo, self.unit, self.dataset = todo, unit, todo.datasets[unit.dataset]
        self.form = todo.forms[unit.dataset]
        self.flags: Counter[str] = Counter()
        self.stats: dict[str, Any] = {
            **dict.fromkeys((*SUMS, "tokens"), 0), "dropped": {}, "flags": self.flags,
            "lengths": [0] * (len(LENGTH_EDGES) - 1), "backend": todo.tokenizer.backend,
        }  # fmt: skip

    def batches(self) -> Iterator[_Batch]:
        """Render the unit's records, a bounded amount of text at a time."""
        todo, stats, batch = self.todo, self.stats, _Batch()
        for origin, record in self.records():
            stats["records_matched"] += 1
            copies = self.copies(origin)
            stats["passes"] += copies
            if not copies:
                continue
            try:
                conversation, sequences = self.rendered(record)
                weight = self.weight(record)
            except ChatError as error:
                self.drop(error.reason, origin, str(error))
                continue
            except RecursionError:
                self.drop("nested too deep", origin)
                continue
            stats["records_kept"] += 1
            for spans in sequences:
                batch.sequences.append(spans)
                batch.conversations.append(conversation)
                batch.copies.append(copies)
                batch.weights.append(weight)
                batch.origins.append(origin)
                batch.characters += sum([len(text) for _, text in spans])
            if batch.characters >= BATCH_CHARACTERS:
                yield batch
                batch = _Batch()
            if stats["records_kept"] == todo.sample:
                break
        if batch.sequences:
            yield batch

    def rendered(self, record: dict) -> tuple[int, list]:
        """A record's conversation as its hash, and its training sequences. Raises ChatError."""
        if record.get(LABEL) is False and LABEL not in self.dataset.filter:
            hint = 'the answer is a bad one; "filter": {"label": true} in the blend leaves such records out'
            raise ChatError("rejected answer", f"label is false: {hint}")
        messages, tools = self.form.conversation(record, self.flags)
        if self.todo.evaluation and (shared := self.todo.evaluation.shared(messages)):
            raise ChatError(CONTAMINATED, shared)
        if options := per_record(record):
            self.flags.update(options.keys())
            if "train_turns" in options:
                options["train_turns"] = self.form.aligned(options["train_turns"], record, messages)
        if tools and any(map(_calls_in_text, messages)):
            self.flags["calls inside the text"] += 1
        given = messages
        if not self.form.is_plain(messages, record):
            messages, marks = self.todo.template.unmarked(messages)
            self.flags.update(marks)
        sequences = self.todo.template.training_sequences(messages, tools, **options)
        return conversation_digest(given, tools), sequences

    def weight(self, record: dict) -> float:
        """What the record's tokens count in the loss. Raises ChatError."""
        weight = record_weight(record, self.dataset.weight_field)
        if weight != 1:
            self.flags["weight of the record"] += 1
        return weight * self.dataset.loss_weight

    def records(self) -> Iterator[tuple[tuple[int, int], dict]]:
        """((index of the piece, position), record) of every record that passes the filter."""
        columns = [*self.form.columns, *RECORD_KEYS, LABEL, self.dataset.weight_field, *self.dataset.filter]
        for index, piece in enumerate(self.unit.pieces):
            for position, record in reading.read(piece, columns, partial(self.malformed, index)):
                self.stats["records_read"] += 1
                if not self.dataset.filter or self.dataset.keeps(record):
                    yield (index, position), record

    def copies(self, origin: tuple[int, int]) -> int:
        """How often a record enters the data: the whole passes, and one more for a seeded share."""
        if self.todo.proportions:
            return 1  # shares.py takes its part of them
        whole, part = divmod(self.dataset.weight, 1)
        if not part:
            return int(whole)
        file = self.unit.pieces[origin[0]].file
        draw = f"{self.todo.seed} {self.dataset.name} {file.name} {origin[1]}"
        digest = hashlib.blake2b(draw.encode(), digest_size=8).digest()
        return int(whole) + (int.from_bytes(digest, "little") < part * 2**64)

    def malformed(self, piece: int, position: int, reason: str, detail: str) -> None:
        """Count and drop what is no record at all."""
        self.stats["records_read"] += 1
        self.stats["records_matched"] += 1
        self.drop(reason, (piece, position), detail)

    def drop(self, reason: str, origin: tuple[int, int], detail: str = "") -> None:
        """Count a drop and remember the first of its kind. Raises UserError if the plan allows no drops."""
        detail = printable(detail)
        if reason != CONTAMINATED and not self.todo.drops_allowed:
            where = reading.locate(self.unit.pieces[origin[0]].file, origin[1])
            raise UserError(f"{where}: {detail or reason}; fix it, or allow drops with max_drop_ratio=0.01")
        entry = self.stats["dropped"].setdefault(reason, {"count": 0, "first": origin, "detail": detail})
        entry["count"] += 1

    def write(self, batch: _Batch, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray, spool: SpoolWriter) -> None:
        """Drop what has nothing to train on, and append the rest to the spool, whole, however long.

        ids, mask: (tokens,); offsets: (sequences + 1,), as `tokenize` returns them.
        """
        stats = self.stats
        lengths = np.diff(offsets)
        trained = np.zeros(len(lengths), np.int64)
        filled = np.flatnonzero(lengths)  # reduceat has no sum of nothing
        if len(filled):
            trained[filled] = np.add.reduceat(mask, offsets[filled], dtype=np.int64)
        good = trained > 0
        for i in np.flatnonzero(~good):
            self.drop("no trained token", batch.origins[i])
        signed = (ids ^ -mask.view(np.int8)).astype("<i4", copy=False)  # ~ids where mask is 1
        if not good.all():
            signed = signed[np.repeat(good, lengths)]
        index = np.empty(int(good.sum()), INDEX)
        index["conversation"] = np.array(batch.conversations, np.uint64)[good]
        index["copies"] = np.array(batch.copies, np.uint16)[good]
        index["weight"] = np.array(batch.weights, np.float32)[good]
        index["length"], index["trained"] = lengths[good], trained[good]
        index["piece"], index["position"] = np.array(batch.origins, np.uint64).reshape(-1, 2)[good].T
        spool.append(signed, index)
        counted = np.histogram(np.minimum(lengths, LENGTH_EDGES[-1]), LENGTH_EDGES)[0]
        stats["lengths"] = (counted + stats["lengths"]).tolist()
        stats["tokens"] += int(index["length"].sum())


def _calls_in_text(message: Any) -> bool:
    """Whether a message that may be an answer writes its calls itself, as Hermes' data does."""
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, str) and "<tool_call>" in content and message.get("role") == "assistant"


def printable(text: str, limit: int = 300) -> str:
    """Text that data brings, as one line of at most `limit` characters that any terminal and file takes."""
    line = " ".join(text[: limit + 1].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 3] + "..."


def trusted(todo: Plan, pool: Executor | None = None, characters: int = 100_000) -> Plan:
    """The plan, with the fast encoder unless that errs on texts made to find it out, or on the run's own spans: the
    first of every dataset. `pool`: see `fastest`."""
    reference = todo.tokenizer
    todo = replace(todo, tokenizer=fastest(reference, pool))
    if todo.tokenizer.backend == "tokenizers":
        return todo
    for number in range(len(todo.datasets)):
        unit = next((unit for unit in todo.units if unit.dataset == number), None)
        few = replace(todo, sample=min(todo.sample or 200, 200), drops_allowed=True)
        batch = next(_Work(few, unit).batches(), None) if unit else None
        spans = [text for spans in batch.sequences for _, text in spans] if batch else []
        spans = spans[: np.searchsorted(np.cumsum([len(text) for text in spans]), characters) + 1]
        fast = pool.submit(todo.tokenizer.encode_batch, spans) if pool else None
        expected = reference.encode_batch(spans)
        got = fast.result() if fast else todo.tokenizer.encode_batch(spans)
        if not all(map(np.array_equal, got, expected)):
            return replace(todo, tokenizer=reference)
    return todo
