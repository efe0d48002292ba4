"""Where an output comes from: lineage.json, written beside prepared data, training runs and their checkpoints.

    {
      "format": "nemotron-sft-lineage", "version": 1,
      "stage": "prep" or "train", "made": UTC time, "command": what was typed,
      "config": {"digest", "values"}, "code": {"version", "commit", "modified"}, "packages": {name: version},
      "tracking": {"mode", "run", "directory"},            of the W&B run, if there is one
      "inputs": [ARTIFACT ...], "outputs": [ARTIFACT ...]
    }

    ARTIFACT = {"artifact": name, "path", "digest", "files": [{"name", "bytes", "sha256"}], "metadata",
                "aliases" of an output, "lineage" of an input: the record of whatever made it, or null}

A record holds the records of its inputs, so the chain back to the source files survives when those are deleted. A
digest is the SHA-256 of the sorted lines "SHA256  NAME" of an artifact's files: the same bytes have the same digest
wherever they are. docs/tracking.md says what is hashed when, and what that costs.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_sft.files import write_json
from nemotron_sft.paths import TYPED
from nemotron_sft.record import code_version, digests

FORMAT, VERSION = "nemotron-sft-lineage", 1
FILE = "lineage.json"
DATA, PRETRAIN, MODEL = "DataBlendsArtifact-sft", "ModelArtifact-pretrain", "ModelArtifact-sft"
PACKAGES = ("torch", "megatron-bridge", "megatron-core", "transformer-engine", "transformers", "tokenizers",
            "fastokens", "numpy", "pyarrow", "hydra-core", "wandb")  # fmt: skip
HASHED_IF_SAMPLED = 100 << 20  # bytes: of a larger source file a sample reads too little to be worth hashing it all


def data_files(metadata: dict) -> list[dict]:
    """The files of a prep output as metadata.json records them."""
    parts = [part for part in metadata["splits"].values() if part["file"]]
    return [{"name": part["file"], "bytes": part["bytes"], "sha256": part["sha256"]} for part in parts]


def record(stage: str, config: Any, inputs: list[dict], outputs: list[dict]) -> dict:
    """The record of one command. config: the composed config, resolved."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *TYPED]),
        "config": {"digest": digests.plain_digest(config), "values": config},
        "code": code_version.code(),
        "packages": packages(),
        "tracking": None,
        "inputs": inputs,
        "outputs": outputs,
    }


def artifact(name: str, path: str | Path, files: list[dict], metadata: dict, **more: Any) -> dict:
    """One artifact of a record; its digest is null if a file has none. more: aliases of an output, lineage of an
    input."""
    known = all(file["sha256"] or file.get("stamp") for file in files)
    about = {"artifact": name, "path": str(path), "digest": digests.content_digest(files) if known else None}
    return {**about, "files": files, "metadata": metadata, **more}


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, where they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(directory: str | Path, record: dict) -> None:
    """Write lineage.json, atomically."""
    write_json(Path(directory) / FILE, record)


def read(directory: str | Path) -> dict | None:
    """The record beside an output; None if there is none, or none that this version can read."""
    try:
        found = json.loads((Path(directory) / FILE).read_text())
    except (OSError, ValueError):
        return None
    return (
        found if isinstance(found, dict) and (found.get("format"), found.get("version")) == (FORMAT, VERSION) else None
    )


def find(path: str | Path) -> dict | None:
    """The record of an output, of a run, or of what lies up to two directories inside a run."""
    path = Path(path).resolve()
    return next(filter(None, (read(place) for place in (path, *path.parents[:2]))), None)


def of_data(directory: str | Path, metadata: dict) -> dict:
    """A prep output as the input of a run. What its files hold is taken from metadata.json, not read."""
    made = artifact(DATA, directory, data_files(metadata), data_summary(metadata))
    maker = read(directory)
    if maker and maker["outputs"][0]["digest"] != made["digest"]:
        maker = None  # left from an earlier output
    return {**made, "lineage": maker}


def of_model(init_from: str, path: Path, model: Any, seed: int, hashed: bool = True) -> dict:
    """What training starts from, as an input: a checkpoint, a Hugging Face directory or hub id, or "random".

    path: the checkpoint that is loaded, if `init_from` is a directory of them, or else `init_from` itself.
    Hashes the files of a directory, which takes a while if it is large (docs/tracking.md), unless `hashed` is false.
    """
    if init_from == "random":
        metadata = {"init_from": "random", "seed": seed, "model": model}
        return {**artifact(PRETRAIN, init_from, [], metadata, lineage=None), "digest": digests.plain_digest(metadata)}
    if not path.exists():
        return {**artifact(PRETRAIN, init_from, [], metadata := hub_revision(init_from), lineage=None),
                "digest": digests.plain_digest(metadata)}  # fmt: skip
    maker = find(path)
    made = next((o for o in maker["outputs"] if Path(o["path"]).resolve() == path.resolve()), None) if maker else None
    if (
        made
        and made["digest"]
        and [f["name"] for f in made["files"]] == [p.relative_to(path).as_posix() for p in inside(path)]
    ):
        return {key: made[key] for key in ("artifact", "path", "digest", "files", "metadata")} | {"lineage": maker}
    return artifact(
        PRETRAIN, path, digests.describe(path, inside(path), hashed), {"init_from": init_from}, lineage=maker
    )


def hub_revision(model: str) -> dict:
    """A hub model: its id and the commit that is in the hub cache, null if none is."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not a hub id
        cached = None
    return {"init_from": model, "revision": Path(cached).parent.name if isinstance(cached, str) else None}


def inside(directory: Path) -> list[Path]:
    """Every file of a directory except its lineage, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != FILE)


def data_summary(metadata: dict) -> dict:
    """The numbers of metadata.json, without what has a place of its own in the record."""
    left_out = ("inputs", "lengths", "directory", "unchanged", "format", "version")
    return {key: value for key, value in metadata.items() if key not in left_out}


def of_sources(metadata: dict) -> list[dict]:
    """The datasets of a prep output as inputs, one artifact each. Hashes the local files.

    A file that changed after it was read, is not local, or was only sampled, is on record by its stamp (size and
    time, ETag, or the commit of a hub dataset).
    """
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        digests = list(pool.map(lambda file: _source_digest(file, metadata["sample"]), metadata["inputs"]))
    found = []
    for dataset in metadata["blend"]["datasets"]:
        files = [
            {"name": file["path"], "bytes": file["bytes"], "sha256": digest, "stamp": file["stamp"]}
            for file, digest in zip(metadata["inputs"], digests, strict=True)
            if file.get("dataset", dataset["name"]) == dataset["name"]
        ]
        found.append(artifact(f"Dataset-{dataset['name']}", dataset["path"], files, dataset, lineage=None))
    return found


def _source_digest(file: dict, sample: int | None) -> str | None:
    path = Path(file["path"])
    if sample is not None and file["bytes"] > HASHED_IF_SAMPLED:
        return None
    try:
        stat = path.stat()
        return digests.sha256(path) if file["stamp"] == f"{stat.st_size}-{stat.st_mtime_ns}" else None
    except OSError:
        return None


def plain(composed: Any) -> dict:
    """The composed config as plain data, without Hydra's own part."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    values.pop("hydra", None)
    return dict(values)
