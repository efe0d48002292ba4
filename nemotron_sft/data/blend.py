"""A blend: which datasets make up the training data, and how often each is passed over.

    {"datasets": [{"name": "chat", "path": "org/name", "split": "train", "weight": 1.0}, ...]}

written in conf/blend/NAME.yaml, or in any JSON or YAML file given as `blend=FILE`. Beside datasets a blend can have
`mix`, one of MIXES: what weights mean.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from nemotron_sft import config
from nemotron_sft.data.jsontext import NotJSON, loads
from nemotron_sft.errors import UserError

MIXES = ("passes", "proportions")
FORMS = ("openai", "sharegpt", "alpaca", "pairs")  # see forms.py


NUMBERS = {"weight": "the number of passes or, with mix: proportions, the share", "loss_weight": "a factor"}


@dataclass(frozen=True)
class Dataset:
    """One entry of a blend.

    path: a file, a glob, a directory, an fsspec URL, or a hub id `org/name` (also `hf://org/name`).
    subset, split: which part of a hub dataset or directory, by the names its card or its files give.
    weight: passes over the data; 0.25 takes a seeded quarter, 1.5 takes all once and a seeded half again, 0
        leaves the dataset out. With mix "proportions" it is the share of the records, in any unit.
    loss_weight: what a token counts in the loss. weight_field: where a record says it too; the two are multiplied.
    filter: {field: value}: keep records whose field equals the value, or contains it if the field is a list.
    form: one of FORMS, None to find it from the first records. fields: {part: field} where the form's parts are, if
        not under their usual names, null for nowhere. messages_field, tools_field: short for two of these.
    """

    name: str
    path: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    loss_weight: float = 1.0
    weight_field: str = "weight"
    filter: dict[str, Any] = field(default_factory=dict)
    form: str | None = None
    fields: dict[str, str | None] = field(default_factory=dict)
    messages_field: str | None = None
    tools_field: str | None = None

    def keeps(self, record: dict) -> bool:
        """Whether a record passes the filter."""
        for key, wanted in self.filter.items():
            value = record.get(key)
            if wanted not in value if isinstance(value, list) else value != wanted:
                return False
        return True


def load_blend(blend: config.Blend) -> tuple[str, list[Dataset], str]:
    """The blend's name, its datasets and its mix, from the composed config or the file that `blend.path` names.

    Raises UserError for a missing or unreadable file, an unknown or missing field, a bad weight, or a
    repeated name.
    """
    entries: Any
    name, entries, mix, where = blend.name, blend.datasets, blend.mix, f"blend {blend.name}"
    if not blend.path and not blend.datasets:
        raise UserError("no blend: say blend=FILE, or blend=NAME for one in conf/blend")
    if blend.path:
        path = Path(blend.path).expanduser()
        content = _read(path)
        name, entries, where = (name or path.stem), content.get("datasets"), str(path)
        mix = content.get("mix") or mix
    if mix not in MIXES:
        raise UserError(f"{where}: mix is {mix!r}: choose from {', '.join(MIXES)}")
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{where}: no datasets; expected {{"datasets": [{{"name": ..., "path": ...}}]}}')
    datasets = [_dataset(entry, f"{where}, datasets[{i}]") for i, entry in enumerate(entries)]
    names = [dataset.name for dataset in datasets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: two datasets are named {repeated[0]}; give each its own name")
    return name or "blend", [dataset for dataset in datasets if dataset.weight > 0], mix


def _read(path: Path) -> dict:
    import yaml

    if not path.is_file():
        raise UserError(f"no blend file {path}: give an existing JSON or YAML file as blend=FILE")
    text = path.read_bytes()
    try:  # not all JSON is YAML: tabs, exponents and escaped emoji are not
        content = loads(text)
    except NotJSON as not_json:
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if path.suffix == ".json":
                raise UserError(f"{path}:{not_json.line}: not JSON ({not_json})") from None
            raise UserError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def _dataset(entry: Any, where: str) -> Dataset:
    """Check one entry. Keys that start with an underscore are comments."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected name, path and so on, not {entry!r}")
    entry = {key: value for key, value in entry.items() if not str(key).startswith("_") and value is not None}
    known = [f.name for f in fields(Dataset)]
    if "used_in" in entry:  # short for the filter that the Nemotron datasets need
        entry["filter"] = {**entry.get("filter", {}), "used_in": entry.pop("used_in")}
    for key in entry:
        if key not in known:
            best = config.nearest(str(key), known)
            raise UserError(
                f"{where}: unknown key {key}: did you mean {best}?"
                if best
                else f"{where}: unknown key {key}: known keys: {', '.join(known)}"
            )
    _check_types(entry, where)
    dataset = Dataset(**entry)
    for key, meaning in NUMBERS.items():
        if not (math.isfinite(getattr(dataset, key)) and 0 <= getattr(dataset, key) <= 1000):
            raise UserError(f"{where}: {key} is {meaning}, 0 to 1000, not {getattr(dataset, key)}")
    if dataset.form not in (None, *FORMS):
        raise UserError(f"{where}: form {dataset.form}: choose from {', '.join(FORMS)}")
    if wrong := [part for part, name in dataset.fields.items() if not isinstance(name, (str, type(None)))]:
        raise UserError(f"{where}: fields.{wrong[0]} must be the name of a field, or null for none")
    return dataset


def _check_types(entry: dict, where: str) -> None:
    """Refuse a field that is missing or of the wrong type; numbers that are text become numbers."""
    for f in fields(Dataset):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in entry:
            raise UserError(f"{where}: {f.name} is missing")
        wanted: Any = dict if f.name in ("filter", "fields") else (int, float) if f.name in NUMBERS else str
        if f.name in NUMBERS and isinstance(entry.get(f.name), str):
            entry[f.name] = _number(entry[f.name])
        if f.name in entry and (not isinstance(entry[f.name], wanted) or isinstance(entry[f.name], bool)):
            raise UserError(f"{where}: {f.name} must be a {'number' if f.name in NUMBERS else wanted.__name__}")


def _number(text: str) -> float | str:
    """YAML takes a number like 1e-1 for text."""
    return float(text) if re.fullmatch(r"\d+(\.\d*)?[eE][-+]?\d+", text) else text
