"""Records from wherever they are: local files, fsspec URLs and Hugging Face hub datasets.

    find(dataset)     the files of a dataset, downloaded if they are on the hub
    pieces(file, ...) a file as pieces that can be read independently
    read(piece)       the piece's records with their positions
    locate(file, position)  "file:line" for a person

JSON lines (.jsonl .jsonlines .ndjson, or .json with one object a line), JSON (one array), Parquet and Arrow (.arrow,
as save_to_disk writes it), the first two also compressed (.gz .zst). Plain JSON lines are split by bytes, Parquet by
row groups and Arrow by record batches; compressed files and JSON arrays cannot be entered in the middle and are one
piece each.

A position identifies a record inside its file: the byte offset of its line in plain JSONL, otherwise the
number of the line, array element or row, counted from 0.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from nemotron_sft.console import say
from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.hub import endpoint, fetch
from nemotron_sft.data.reading import COLUMNAR, COMPRESSED, FORMATS, File
from nemotron_sft.errors import UserError
from nemotron_sft.files import JSON_LINES
from nemotron_sft.paths import ROOT

HUB_ID = re.compile(r"(hf://(datasets/)?)?[\w-][\w.-]*/[\w.-]+")
_TRAIN = re.compile(r"(^|[/._-])train($|[/._-])")
_HELD_OUT = re.compile(r"(^|[/._-])(test|valid|validation|val|dev|eval)($|[/._-])")
# What Hugging Face datasets writes beside the data; a directory with one of them is taken as a hub dataset is.
INFO_FILES = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


def find(dataset: Dataset, *, download: bool = True, base: Path | None = None) -> list[File]:
    """The files of a dataset in a fixed order. Hub files are downloaded first, unless `download` is false:
    then each is fetched when it is first read.

    A relative path counts from `base`, the blend file's folder, or, if nothing is there, from the working directory,
    or else from the repository. Raises UserError when nothing is found, naming what there is.
    """
    path = dataset.path
    if "://" in path and not path.startswith("hf://"):
        return _remote(dataset)
    if not path.startswith("hf://"):
        given = Path(path).expanduser()
        places = [given] if base in (None, Path()) else [base / given, given]
        for local in (*places, ROOT / given):
            if local.is_file():
                return [_local(local, local.name)]
            if local.is_dir():
                return _directory(local, dataset)
            if _is_glob(path) and (matches := _glob(local)):
                return _matching(local, matches, dataset)
    if _is_glob(path):
        raise UserError(f"dataset {dataset.name}: no file matches {path}")
    if HUB_ID.fullmatch(path) and not path.endswith((*FORMATS, *COMPRESSED)):
        return _hub(dataset, download)
    raise UserError(f"dataset {dataset.name}: no such file or directory: {path}")


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _glob(path: Path) -> list[Path]:
    return [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]


def _directory(folder: Path, dataset: Dataset) -> list[File]:
    """The files of a directory, cloned from the hub, written by save_to_disk, cached, or of the user's own making."""
    names = []
    been: set[Path] = set()  # links to folders are followed, in no circle
    for where, folders, files in os.walk(folder, followlinks=True):
        # .git and .cache hold copies of the data
        folders[:] = [name for name in folders if not _is_hidden(name) and _is_new(Path(where, name), been)]
        names += [Path(where, name).relative_to(folder).as_posix() for name in files]
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    like_hub = any(name.rpartition("/")[2] in INFO_FILES for name in names) or (folder / ".gitattributes").is_file()
    return [_local(folder / name, name) for name in select(sorted(names), _card(text), dataset, hub=like_hub)]


def _is_new(folder: Path, been: set[Path]) -> bool:
    """Whether a folder, wherever it really lies, has not been entered yet."""
    real = folder.resolve()
    new = real not in been and not folder.parent.resolve().is_relative_to(real)
    been.add(real)
    return new


def _matching(pattern: Path, matches: list[Path], dataset: Dataset) -> list[File]:
    """The data files among what a glob matches."""
    fixed = Path(*takewhile(lambda part: not _is_glob(part), pattern.parts))
    files = [p for p in matches if p.is_file() and _is_data(p.relative_to(fixed).as_posix())]
    if not files:
        raise UserError(f"dataset {dataset.name}: no data file matches {dataset.path}")
    return [_local(p, p.relative_to(fixed).as_posix()) for p in files]


def _local(path: Path, name: str) -> File:
    if not _has_format(path.name) or path.name in INFO_FILES:
        raise UserError(f"{path}: not a data file; known are {' '.join(FORMATS)}, also with {' '.join(COMPRESSED)}")
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; a broken link?") from None
    return File(str(path), str(path), stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}", name=name)


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "_"))


def _is_data(name: str) -> bool:
    """Whether a file of a dataset, by its name in it, holds records."""
    *folders, file = name.split("/")
    if any(map(_is_hidden, (*folders, file))) or file in INFO_FILES:
        return False
    return _has_format(file) and not (file.endswith(".arrow") and file.startswith(("cache-", "tmp")))


def _has_format(name: str) -> bool:
    if name.endswith(COLUMNAR):
        return True
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith((*JSON_LINES, ".json"))


def _remote(dataset: Dataset) -> list[File]:
    """Files behind an fsspec URL (s3://, gs://, https://, ...): a file, a glob, or a folder."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(dataset.path)
        if _is_glob(path):
            found = fs.glob(path, detail=True).values()
            infos = [i for i in found if i["type"] == "file" and _is_data(str(i["name"]).rpartition("/")[2])]
        elif fs.isfile(path):
            infos = [fs.info(path)]
        else:
            infos = list(fs.find(path, detail=True).values())
            base = str(path).rstrip("/") + "/"
            names = {info["name"].removeprefix(base): info for info in infos}
            infos = [names[name] for name in select(sorted(names), {}, dataset, hub=False)]
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"dataset {dataset.name}: {dataset.path} needs a package: {error}") from None
    except Exception as error:  # every backend has its own exceptions
        raise UserError(f"dataset {dataset.name}: cannot list {dataset.path}: {error!r}") from None
    if not infos:
        raise UserError(f"dataset {dataset.name}: nothing at {dataset.path}")
    files, base = [], os.path.commonpath([fs.unstrip_protocol(info["name"]) for info in infos])
    for info in sorted(infos, key=lambda info: info["name"]):
        url = fs.unstrip_protocol(info["name"])
        changes = [info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime")]
        stamp = "-".join(str(value) for value in (info.get("size"), *changes) if value is not None)
        files.append(File(url, url, info.get("size") or 0, stamp, name=url.removeprefix(base)))
    return files


def _hub(dataset: Dataset, download: bool) -> list[File]:
    """Files of a Hugging Face dataset at one commit. Interrupted downloads are resumed by
    huggingface_hub."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = dataset.path.removeprefix("hf://").removeprefix("datasets/")
    where = f"dataset {dataset.name}: {repo}"
    try:
        info = huggingface_hub.HfApi().dataset_info(repo, revision=dataset.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        card = {}
        if "README.md" in sizes:
            text = Path(fetch(repo, info.sha, "README.md")).read_text(encoding="utf-8", errors="replace")
            card = _card(text)
        chosen = select(sorted(sizes), card, dataset, hub=True)
        if download:
            patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in chosen]
            huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=info.sha, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise UserError(f"{where}: neither a path here nor a dataset on {endpoint()} (or it needs a login)") from None
    except RevisionNotFoundError:
        raise UserError(f"{where}: no revision {dataset.revision} on {endpoint()}") from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: cannot be fetched from {endpoint()}: {reason}; rerun to resume") from None
    stamp = f"hf://datasets/{repo}@{info.sha}"
    return [File(name, f"{stamp}/{name}", sizes[name], stamp, (repo, info.sha), name) for name in chosen]


def _card(text: str) -> dict[str, Any]:
    """The YAML header of a dataset card."""
    import yaml

    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        card = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def select(names: list[str], card: dict, dataset: Dataset, *, hub: bool) -> list[str]:
    """Which of a repository's or directory's files belong to `dataset.subset` and `dataset.split`.

    The card's `configs` decide where they exist: each of the two words names a config or a split (datasets
    differ in which they use). Otherwise a word must be part of the file's path:
    data/train-00000-of-00002.parquet belongs to train. With neither word a directory is taken whole, a hub
    dataset must have one split or `train`.
    """
    data = [name for name in names if _is_data(name)]
    words = [word for word in (dataset.subset, dataset.split) if word]
    parts = [
        (config, split, [n for n in data if any(fnmatch(n, g) for g in globs)]) for config, split, globs in _parts(card)
    ]
    parts = [(config, split, files) for config, split, files in parts if files]
    chosen = [part for part in parts if all(word in part[:2] for word in words)]
    if chosen and not dataset.subset and len({config for config, _, _ in chosen}) > 1:
        default = [part for part in chosen if part[0] == _default(card)]
        chosen = default or _ambiguous(dataset, "subset", {config for config, _, _ in chosen})
    if chosen and not words:
        splits = {split for _, split, _ in chosen}
        if len(splits) > 1:
            chosen = [p for p in chosen if p[1] == "train"] or _ambiguous(dataset, "split", splits)
    if chosen:
        return sorted({name for _, _, files in chosen for name in files})

    files = [n for n in data if all(re.search(rf"(^|[/._-]){re.escape(w)}($|[/._-])", n) for w in words)]
    if not files and words == ["train"] and not parts:
        files = data  # nothing is named after a split, so everything is training data
    if not words and len(files) > 1:
        files = _training_of(files, dataset, hub)
    if not files:
        there = sorted({split for _, split, _ in parts} | {config for config, _, _ in parts}) or data[:10]
        wanted, listed = " ".join(words) or "data files", ", ".join(there) or "no data file"
        raise UserError(f"dataset {dataset.name}: no {wanted} in {dataset.path}; there is {listed}")
    return files


def _training_of(files: list[str], dataset: Dataset, hub: bool) -> list[str]:
    """The files of the training split, if some are named after it and (but on the hub) others after another split."""
    train = [name for name in files if _TRAIN.search(name)]
    held_out = [name for name in files if name not in train and (hub or _HELD_OUT.search(name))]
    if not train or not held_out:
        return files
    chosen = [name for name in files if name not in held_out]
    say(f"dataset {dataset.name}: {len(chosen)} of {len(files)} files; without split, {held_out[0]} is left out")
    return chosen


def _parts(card: dict) -> Iterator[tuple[str, str, list[str]]]:
    """(config, split, globs) for each entry of a card's `configs`, in every notation the hub accepts."""
    for entry in card.get("configs") or []:
        if not isinstance(entry, dict):
            continue
        name, files = entry.get("config_name", "default"), entry.get("data_files")
        if isinstance(files, str):
            files = [files]
        if isinstance(files, dict):
            files = [{"split": split, "path": path} for split, path in files.items()]
        for item in files or []:
            split, globs = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
            globs = [globs] if isinstance(globs, str) else globs
            yield (
                name,
                str(split),
                [f"{entry['data_dir']}/{g}" if entry.get("data_dir") else g for g in globs],
            )


def _default(card: dict) -> str:
    entries = [entry for entry in card["configs"] if isinstance(entry, dict)]
    return next((entry.get("config_name") for entry in entries if entry.get("default")), None) or "default"


def _ambiguous(dataset: Dataset, what: str, choices: set[str]) -> NoReturn:
    raise UserError(f"dataset {dataset.name}: say which {what} of {dataset.path}: {', '.join(sorted(choices))}")
