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
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemotron_sft import __version__
from nemotron_sft.errors import UserError

FORMAT, VERSION = "nemotron-sft-lineage", 1
FILE = "lineage.json"
DATA, PRETRAIN, MODEL = "DataBlendsArtifact-sft", "ModelArtifact-pretrain", "ModelArtifact-sft"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "megatron-bridge", "megatron-core", "transformer-engine", "transformers", "tokenizers",
            "fastokens", "numpy", "pyarrow", "hydra-core", "wandb")  # fmt: skip
HASHED_IF_SAMPLED = 100 << 20  # bytes: of a larger source file a sample reads too little to be worth hashing it all


# --- digests -----------------------------------------------------------------------------------------------


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(root: Path, paths: Iterable[Path], hashed: bool = True) -> list[dict]:
    """name (relative to `root`), bytes and SHA-256 (null unless `hashed`) of files, hashed by several threads."""
    paths = list(paths)
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        digests = pool.map(sha256, paths) if hashed else [None] * len(paths)
        return [
            {"name": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        ]


def content_digest(files: Iterable[dict]) -> str:
    """SHA-256 of the sorted lines "SHA256  NAME". A source file that was not hashed counts with its stamp."""
    lines = [f"{file['sha256'] or file['stamp']}  {Path(file['name']).name}\n" for file in files]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def plain_digest(value: Any) -> str:
    """SHA-256 of plain data, as compact JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def verify(directory: Path, files: Iterable[dict]) -> None:
    """Compare size and SHA-256 of every file with what is on record. Raises UserError for the first that differs."""
    for file in files:
        path = directory / file["name"]
        if not path.is_file():
            raise UserError(f"{path} is missing: copy it again, or prepare the data again with recipes/prep.py")
        if path.stat().st_size != file["bytes"]:
            found, right = path.stat().st_size, file["bytes"]
        else:
            found, right = sha256(path) if file["sha256"] else None, file["sha256"]
        if found != right:
            kind = "bytes" if isinstance(found, int) else "SHA-256"
            raise UserError(
                f"{path} is not what was recorded when it was written ({kind} {found}, not {right}): "
                "copy it again, or make it again"
            )


def data_files(metadata: dict) -> list[dict]:
    """The files of a prep output as metadata.json records them."""
    parts = [part for part in metadata["splits"].values() if part["file"]]
    return [{"name": part["file"], "bytes": part["bytes"], "sha256": part["sha256"]} for part in parts]


# --- records -----------------------------------------------------------------------------------------------


def record(stage: str, config: Any, inputs: list[dict], outputs: list[dict]) -> dict:
    """The record of one command. config: the composed config, resolved."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "config": {"digest": plain_digest(config), "values": config},
        "code": code(),
        "packages": packages(),
        "tracking": None,
        "inputs": inputs,
        "outputs": outputs,
    }


def artifact(name: str, path: str | Path, files: list[dict], metadata: dict, **more: Any) -> dict:
    """One artifact of a record; its digest is null if a file has none. more: aliases of an output, lineage of an
    input."""
    known = all(file["sha256"] or file.get("stamp") for file in files)
    about = {"artifact": name, "path": str(path), "digest": content_digest(files) if known else None}
    return {**about, "files": files, "metadata": metadata, **more}


def code() -> dict:
    """Version, commit, and the files that differ from the commit. A job knows these from its submission."""
    from nemotron_sft.cluster import version

    frozen = ROOT.parent / "version.txt"
    lines = (frozen.read_text() if ROOT.name == "code" and frozen.exists() else version()).splitlines()
    known = bool(lines) and len(lines[0]) == 40
    return {
        "version": __version__,
        "commit": lines[0] if known else None,
        "modified": [line.split()[-1] for line in lines[1:]] if known else [],
    }


def packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(directory: str | Path, record: dict) -> None:
    """Write lineage.json, atomically."""
    import orjson

    from nemotron_sft.packed import AtomicFile

    with AtomicFile(Path(directory) / FILE) as file:
        file.write(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE, default=str))


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


def of_model(init_from: str, model: Any, seed: int, hashed: bool = True) -> dict:
    """What training starts from, as an input: a checkpoint, a Hugging Face directory or hub id, or "random".

    Hashes the files of a directory, which takes a while if it is large (docs/tracking.md), unless `hashed` is false.
    """
    path = Path(init_from)
    if init_from == "random":
        metadata = {"init_from": "random", "seed": seed, "model": model}
        return {**artifact(PRETRAIN, init_from, [], metadata, lineage=None), "digest": plain_digest(metadata)}
    if not path.exists():
        return {**artifact(PRETRAIN, init_from, [], metadata := hub_revision(init_from), lineage=None),
                "digest": plain_digest(metadata)}  # fmt: skip
    path = newest_checkpoint(path)
    maker = find(path)
    made = next((o for o in maker["outputs"] if Path(o["path"]).resolve() == path.resolve()), None) if maker else None
    if (
        made
        and made["digest"]
        and [f["name"] for f in made["files"]] == [p.relative_to(path).as_posix() for p in inside(path)]
    ):
        return {key: made[key] for key in ("artifact", "path", "digest", "files", "metadata")} | {"lineage": maker}
    return artifact(PRETRAIN, path, describe(path, inside(path), hashed), {"init_from": init_from}, lineage=maker)


def hub_revision(model: str) -> dict:
    """A hub model: its id and the commit that is in the hub cache, null if none is."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not a hub id
        cached = None
    return {"init_from": model, "revision": Path(cached).parent.name if isinstance(cached, str) else None}


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that would be loaded from `path`: the newest whole one in it, or itself."""
    return newest_iteration(path) or path


def newest_iteration(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint in a directory of them.

    Megatron-Bridge names a checkpoint in `latest_*` files and then still writes its run_config.yaml, whose sections
    are sorted, validation last; a process killed in between leaves a name without a checkpoint. So the directories
    themselves are looked at. One of Megatron-LM, which has neither file, is whole if it is named.
    """
    for path in sorted(checkpoints.glob("iter_*"), reverse=True):
        config = path / "run_config.yaml"
        if config.exists() and "\nvalidation:\n" in config.read_text():
            return path
    try:
        name = (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip()
        named = checkpoints / (name if name == "release" else f"iter_{int(name):07d}")
    except (OSError, ValueError):
        return None
    return named if named.is_dir() and not (named / "train_state.pt").exists() else None


def inside(directory: Path) -> list[Path]:
    """Every file of a directory except its lineage, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != FILE)


def data_summary(metadata: dict) -> dict:
    """The numbers of metadata.json, without what has a place of its own in the record."""
    left_out = ("inputs", "lengths", "directory", "unchanged", "format", "version")
    return {key: value for key, value in metadata.items() if key not in left_out}


def of_sources(metadata: dict) -> list[dict]:
    """The data sets of a prep output as inputs, one artifact each. Hashes the local files.

    A file that changed after it was read, is not local, or was only sampled, is on record by its stamp (size and
    time, ETag, or the commit of a hub data set).
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
        return sha256(path) if file["stamp"] == f"{stat.st_size}-{stat.st_mtime_ns}" else None
    except OSError:
        return None


# --- for people --------------------------------------------------------------------------------------------


def show(path: str) -> None:
    """Print the chain from an output back to the source files. Raises UserError if there is no record of it."""
    from nemotron_sft.console import console

    found = find(path)
    if not found:
        raise UserError(f"no {FILE} in {path}: give a run directory, a checkpoint of one, or prepared data")
    out = console()
    if not out.is_terminal:
        out.width = 1000  # a tree is cut to the width, whatever soft_wrap says
    out.print(tree(found, Path(path)), soft_wrap=True)


def tree(record: dict, path: Path):
    """The rich Tree of a record."""
    from rich.tree import Tree

    shown = [o for o in record["outputs"] if Path(o["path"]).resolve() == path.resolve()] or record["outputs"]
    root = Tree(f"[bold]{path}[/]")
    for output in shown:
        root.add(_title(output))
    _branches(root.add(_maker(record)), record)
    return root


def _branches(node: Any, record: dict) -> None:
    for entry in record["inputs"]:
        branch = node.add(_title(entry))
        if entry.get("lineage"):
            _branches(branch.add(_maker(entry["lineage"])), entry["lineage"])
        elif "stamp" in (entry["files"] or [{}])[0]:
            for file in entry["files"][:10]:
                known = f"sha256 {file['sha256'][:12]}" if file["sha256"] else f"stamp {file['stamp']}"
                branch.add(f"{_safe(file['name'])}  {file['bytes']:,} bytes  {known}{_state(file)}")
            if len(entry["files"]) > 10:
                branch.add(f"... and {len(entry['files']) - 10:,} more files")


def _title(entry: dict) -> str:
    aliases = f" ({', '.join(entry['aliases'])})" if entry.get("aliases") else ""
    digest = f"digest {entry['digest'][:12]}" if entry["digest"] else "digest not computed"
    about, facts = entry["metadata"], []
    if splits := about.get("splits"):
        facts.append(f"{sum(s['packs'] for s in splits.values()):,} packs of {about['pack_size']:,}")
        facts.append(f"{sum(s['tokens'] for s in splits.values()):,} tokens")
        facts.append(f"tokenizer {about['tokenizer']['model']}, template {about['template']['name']}")
    if "records_kept" in about:
        facts.append(f"{about['records_kept']:,} records, weight {about['weight']:g}")
    if about.get("validation_loss") is not None:
        facts.append(f"validation loss {about['validation_loss']:.4f}")
    if "seed" in about and "init_from" in about:
        facts.append(f"seed {about['seed']}")
    if about.get("revision"):
        facts.append(f"revision {about['revision']}")
    title = _safe("  ".join([f"{entry['artifact']}{aliases}", entry["path"], digest]))
    return f"{title}\n[dim]{_safe('; '.join(facts))}[/]" if facts else title


def _maker(record: dict) -> str:
    commit = (record["code"]["commit"] or "unknown commit")[:12] + (
        " with changes" if record["code"]["modified"] else ""
    )
    return _safe(
        f"made by {record['stage']}  {record['made']}  commit {commit}  config {record['config']['digest'][:12]}"
    )


def _state(file: dict) -> str:
    """What has become of a local source file, as far as a look at its size tells."""
    path = Path(file["name"])
    if "://" in file["name"] or (not path.is_absolute() and not path.exists()):
        return ""
    if not path.exists():
        return "  [red]gone[/]"
    return "" if path.stat().st_size == file["bytes"] else "  [red]has another size now[/]"


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)
