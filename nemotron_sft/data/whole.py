"""Whether a prep output is whole, and all of one piece: looked at before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_sft.data.packed import SPLITS, open_packs, read_metadata
from nemotron_sft.errors import UserError
from nemotron_sft.record import digests, lineage

# What training reads of metadata.json, and of a split that has packs.
_COUNTS = dict.fromkeys(("packs", "sequences", "tokens", "trained_tokens"), int)
NEEDED = {
    "pack_size": int, "format_on_disk": str, "blend": {"datasets": list}, "inputs": list,
    "tokenizer": {"model": str, "digest": str, "vocab_size": int, "eos_id": int, "pad_id": int},
    "template": {"name": str, "digest": str}, "splits": {split: _COUNTS for split in SPLITS},
}  # fmt: skip
_FILE = {"file": str, "bytes": int}
_WEIGHTS = {"weights": dict.fromkeys(("least", "most", "sequences", "tokens"), float)}  # from version 2 on


def check_data(data_dir: Path, verify: str = "sizes") -> dict:
    """The metadata of a prep output whose files are all there and whole; verify="full" reads every byte."""
    if verify not in ("sizes", "full"):
        raise UserError(f"data.verify={verify}: choose sizes or full")
    metadata = read_metadata(data_dir)
    _check_keys(data_dir, metadata, NEEDED)
    for dataset in metadata["blend"]["datasets"]:
        _check_keys(data_dir, dataset, {"name": str}, "blend.datasets")
    if metadata["format_on_disk"] != "npy":
        raise UserError(
            f"{data_dir} is in {metadata['format_on_disk']} format for stock Bridge: prepare it with format=npy"
        )
    for split in SPLITS:
        facts = metadata["splits"][split]
        if facts["packs"]:
            _check_keys(data_dir, facts, _FILE | (_WEIGHTS if metadata["version"] > 1 else {}), f"splits.{split}")
            _check_file(data_dir / facts["file"], facts, metadata["pack_size"])
    if verify == "full":
        digests.verify(data_dir, lineage.data_files(metadata))
    return metadata


def _check_keys(data_dir: Path, found: Any, needed: dict, name: str = "") -> None:
    if lacking := _lacking(found, needed, name):
        raise UserError(f"{data_dir / 'metadata.json'} has no {lacking} that could be read: prepare the data again")


def _lacking(found: Any, needed: Any, name: str) -> str | None:
    """The first key of `needed`, a type or a dict of them, that `found` lacks or has with another type."""
    if not isinstance(needed, dict):
        return None if type(found) is needed else name
    if not isinstance(found, dict):
        return name
    inside = (_lacking(found.get(key), kind, f"{name}.{key}".lstrip(".")) for key, kind in needed.items())
    return next(filter(None, inside), None)


def _check_file(path: Path, facts: dict, pack_size: int) -> None:
    """Raise UserError for a split's file that is not the one that metadata.json describes, by its sizes."""
    packs, size = open_packs(path), path.stat().st_size
    length = packs["input_ids"].shape[1]
    if (len(packs), length, size) != (facts["packs"], pack_size, facts["bytes"]):
        raise UserError(
            f"{path} has {len(packs):,} packs of {length:,} tokens in {size:,} bytes, metadata.json beside it says "
            f"{facts['packs']:,} of {pack_size:,} in {facts['bytes']:,}: they are of two outputs; copy one again"
        )
