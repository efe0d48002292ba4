"""What a preparation will do: its inputs, cut into units of work. Nothing is written here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nemotron_sft.config import Prep
from nemotron_sft.data import reading, sources
from nemotron_sft.data.blend import Dataset, load_blend
from nemotron_sft.data.chat import BUILT_IN, Template, load_template
from nemotron_sft.data.decontaminate import Evaluation, load_evaluation
from nemotron_sft.data.forms import Form, detect
from nemotron_sft.data.reading import File, Piece
from nemotron_sft.data.tokens import Tokenizer, load_tokenizer
from nemotron_sft.errors import UserError
from nemotron_sft.paths import ROOT

UNIT_BYTES = 8 << 20  # of input: seconds of work, so that little is lost and processes stay evenly busy
FIRST_RECORDS = 100  # of a dataset, which tell its form
MAX_UNITS = 2048  # ... but huge inputs get larger units, because merging holds every spool file open


@dataclass(frozen=True)
class Unit:
    """A piece of work: consecutive pieces of one dataset's files. `dataset` indexes Plan.datasets."""

    key: str
    dataset: int
    pieces: tuple[Piece, ...]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs. Plain data that pickles."""

    name: str
    directory: Path  # of the output
    datasets: tuple[Dataset, ...]
    files: tuple[File, ...]
    units: tuple[Unit, ...]
    template: Template
    tokenizer: Tokenizer
    pack_size: int
    truncate: bool
    forms: tuple[Form, ...]  # of the datasets
    evaluation: Evaluation | None  # whose texts no record may share
    sample: int | None
    seed: int
    proportions: bool  # whether weights are proportions of the datasets, and not passes over them
    drops_allowed: bool
    fingerprint: str  # of everything that shapes the output

    def spool(self, unit: Unit) -> Path:
        """Where a unit's tokens are kept."""
        return self.directory / "spool" / f"{unit.key}.spool"


@dataclass(frozen=True)
class Inputs:
    """The blend's name, its datasets, the files of each, and what the weights mean (a word of MIXES)."""

    name: str
    datasets: list[Dataset]
    files: list[list[File]]
    mix: str = "passes"

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for files in self.files for file in files)


def find_inputs(cfg: Prep) -> Inputs:
    """Find the inputs, and download what is on the hub. Raises UserError, also for settings that cannot work."""
    validate(cfg)
    name, datasets, mix = load_blend(cfg.blend)
    base = Path(cfg.blend.path).expanduser().parent if cfg.blend.path else None
    found = [sources.find(dataset, download=cfg.sample is None, base=base) for dataset in datasets]
    return Inputs(name, datasets, found, mix)


def output_directory(cfg: Prep, name: str) -> Path:
    """Where the output goes."""
    suffix = f"-sample{cfg.sample}" if cfg.sample is not None else ""
    return Path(cfg.output_dir or f"output/data/{name}{suffix}")


def tokenizer_path(cfg: Prep) -> str:
    """A relative path counts from the working directory or, if nothing is there, from the repository."""
    model = cfg.tokenizer.model
    return str(ROOT / model) if (ROOT / model).exists() and not Path(model).exists() else model


def plan(cfg: Prep, inputs: Inputs | None = None) -> Plan:
    """Cut the inputs into units. The tokenizer is one that opens fast: there may be nothing to encode. Raises
    UserError."""
    inputs = inputs or find_inputs(cfg)
    name, datasets, found = inputs.name, inputs.datasets, inputs.files
    tokenizer = load_tokenizer(tokenizer_path(cfg), backend="tokenizers")
    template = load_template(**template_options(cfg, tokenizer))
    _belong_together(template, tokenizer)
    unit_bytes = max(UNIT_BYTES, inputs.bytes // MAX_UNITS)
    evaluation = load_evaluation(cfg.decontaminate)
    proportions = inputs.mix == "proportions"
    # Not among these: pack_size, over_long, and proportions. Merging sees to them, so changing one needs no tokenizing.
    shaping = [6, tokenizer.digest, template.digest, cfg.sample, cfg.seed, cfg.max_drop_ratio > 0,
               evaluation.stamps if evaluation else []]  # fmt: skip
    forms = [_form(cfg, dataset, files) for dataset, files in zip(datasets, found, strict=True)]
    units = []
    for index, (dataset, files) in enumerate(zip(datasets, found, strict=True)):
        if cfg.sample is not None:  # the first records in file order: one unit that stops early
            groups: Iterable[list[Piece]] = [[reading.whole(file) for file in files]]
        else:
            groups = _grouped([p for file in files for p in reading.pieces(file, unit_bytes)], unit_bytes)
        weights = [None if proportions else dataset.weight, dataset.loss_weight, dataset.weight_field]
        about = [*shaping, dataset.name, *weights, dataset.filter, asdict(forms[index])]
        for group in groups:
            key = _digest(about, [[p.file.label, p.file.stamp, p.start, p.stop] for p in group])
            units.append(Unit(key, index, tuple(group), sum(piece.bytes for piece in group)))
    keys = [unit.key for unit in units]
    return Plan(
        name=name,
        directory=output_directory(cfg, name),
        datasets=tuple(datasets),
        files=tuple(file for files in found for file in files),
        units=tuple(units),
        template=template,
        tokenizer=tokenizer,
        pack_size=cfg.pack_size,
        truncate=cfg.over_long == "truncate",
        forms=tuple(forms),
        evaluation=evaluation,
        sample=cfg.sample,
        seed=cfg.seed,
        proportions=proportions,
        drops_allowed=cfg.max_drop_ratio > 0,
        fingerprint=_digest(
            keys,
            asdict(cfg.split),
            cfg.max_drop_ratio,
            cfg.dedup,
            cfg.format,
            tokenizer.pad_id,
            cfg.pack_size,
            cfg.over_long,
            inputs.mix,
            [dataset.weight for dataset in datasets],
        ),
    )


def _form(cfg: Prep, dataset: Dataset, files: list[File]) -> Form:
    """The form of a dataset, from the first records of its first file that has any."""
    firsts = (islice(_records(file), FIRST_RECORDS) for file in files)
    return detect(dataset, next(filter(None, map(list, firsts)), []), cfg.messages_field, cfg.tools_field)


def _records(file: File) -> Iterator[dict]:
    return (record for _, record in reading.read(reading.whole(file), None, bad=lambda *about: None))


def validate(cfg: Prep) -> None:
    """Refuse settings that cannot work, before anything is read. Raises UserError."""
    ratios = asdict(cfg.split)
    total = sum(ratios.values())
    if any(not 0 <= ratio <= 1 for ratio in ratios.values()) or not math.isclose(total, 1, abs_tol=1e-6):
        given = " + ".join(f"{ratio:g}" for ratio in ratios.values())
        raise UserError(f"split: the ratios must be 0..1 and sum to 1, not {given} = {total:g}")
    if cfg.split.training == 0:
        raise UserError("split.training is 0: there would be nothing to train on")
    for key, least in (("pack_size", 2), ("sample", 1), ("workers", 1), ("shards", 1)):
        if (value := getattr(cfg, key)) is not None and value < least:
            raise UserError(f"{key} must be at least {least}, not {value}")
    for key, choices in (("over_long", ("truncate", "drop")), ("format", ("npy", "parquet"))):
        if getattr(cfg, key) not in choices:
            raise UserError(f"{key} must be {' or '.join(choices)}, not {getattr(cfg, key)}")
    if not 0 <= cfg.max_drop_ratio <= 1:
        raise UserError(f"max_drop_ratio must be 0..1, not {cfg.max_drop_ratio:g}")


def template_options(cfg: Prep, tokenizer: Tokenizer) -> dict[str, Any]:
    """The arguments of load_template. A Jinja template may print the tokenizer's own tokens (bos_token, ...).

    Raises UserError if the tokenizer's own template is wanted and it has none.
    """
    options = asdict(cfg.template)
    if options["name"] in BUILT_IN:
        return options
    if options["name"] == "tokenizer":
        if tokenizer.chat_template is None:
            raise UserError(f"template=tokenizer: {tokenizer.name} has no chat template: name one with template=")
        options["source"] = tokenizer.chat_template
    if options["special_tokens"] is None:
        options["special_tokens"] = tokenizer.special_tokens
    return options


def _belong_together(template: Template, tokenizer: Tokenizer) -> None:
    """Raises UserError if the template writes special tokens that the tokenizer does not have."""
    if missing := tokenizer.missing(template.written_tokens()):
        raise UserError(
            f"template {template.name} writes {', '.join(missing)}, which {tokenizer.name} does not have as one token, "
            "so that a model could not learn where a turn ends: take a tokenizer that has them, or another template "
            "(template=tokenizer takes the tokenizer's own)"
        )


def _grouped(pieces: list[Piece], unit_bytes: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces together until a unit is full: many small files cost no more than a large one."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.bytes > unit_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.bytes
    if group:
        yield group


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
