"""Records from wherever they are: local files, fsspec URLs and Hugging Face hub data sets.

    find(dataset)     the files of a data set, downloaded if they are on the hub
    pieces(file, ...) a file as pieces that can be read independently
    read(piece)       the piece's records with their positions
    locate(file, position)  "file:line" for a person

JSONL (.jsonl .ndjson, or .json with one object a line), JSON (.json holding one array) and Parquet, the first
two also compressed (.gz .zst). Plain JSONL is split by bytes and Parquet by row groups; compressed files and
JSON arrays cannot be entered in the middle and are one piece each.

A position identifies a record inside its file: the byte offset of its line in plain JSONL, otherwise the
number of the line, array element or row, counted from 0.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nemotron_sft.blend import ROOT, Dataset
from nemotron_sft.errors import UserError

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED = (".gz", ".zst")
HUB_ID = re.compile(r"(hf://(datasets/)?)?[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class File:
    """One data file.

    path: local path or fsspec URL; for a file on the hub its name inside the data set.
    label: how messages and the lineage name it. stamp: changes when the content does (size and time, ETag, or
    the commit of a hub data set). hub: (repository, commit) of a file on the hub.
    """

    path: str
    label: str
    bytes: int
    stamp: str
    hub: tuple[str, str] | None = None

    @property
    def format(self) -> str:
        """ ".jsonl", ".parquet" and so on; the compression does not count."""
        suffixes = [s for s in Path(self.path).suffixes if s not in PACKED]
        return suffixes[-1] if suffixes else ""

    @property
    def packed(self) -> str:
        """ ".gz", ".zst" or ""."""
        return next((p for p in PACKED if self.path.endswith(p)), "")


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop) of plain JSONL, row groups of Parquet, else all of it."""

    file: File
    start: int
    stop: int
    bytes: int


# --- finding files -----------------------------------------------------------------------------------------


def find(dataset: Dataset, *, download: bool = True) -> list[File]:
    """The files of a data set in a fixed order. Hub files are downloaded first, unless `download` is false:
    then each is fetched when it is first read.

    A relative path counts from the working directory or, if nothing is there, from the repository.
    Raises UserError when nothing is found, naming what there is.
    """
    path = dataset.path
    if "://" in path and not path.startswith("hf://"):
        return _remote(dataset)
    local = Path(path).expanduser()
    if not path.startswith("hf://"):
        local = next((p for p in (local, ROOT / local) if p.exists() or (_is_glob(path) and _glob(p))), local)
        if local.is_file():
            return [_local(local)]
        if local.is_dir():
            names = sorted(p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file())
            card = local / "README.md"
            chosen = select(names, _card(card.read_text()) if card.is_file() else {}, dataset, hub=False)
            return [_local(local / name) for name in chosen]
        if _is_glob(path):
            if files := [p for p in _glob(local) if p.is_file()]:
                return [_local(p) for p in files]
            raise UserError(f"data set {dataset.name}: no file matches {path}")
    if HUB_ID.fullmatch(path) and not path.endswith((*FORMATS, *PACKED)):
        return _hub(dataset, download)
    raise UserError(f"data set {dataset.name}: no such file or directory: {path}")


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _glob(path: Path) -> list[Path]:
    import glob

    return [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]


def _local(path: Path) -> File:
    if not _is_data(path.name):
        raise UserError(f"{path}: not a data file; known are {' '.join(FORMATS)}, also with {' '.join(PACKED)}")
    stat = path.stat()
    return File(str(path), str(path), stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _is_data(name: str) -> bool:
    if name.rpartition("/")[2].startswith((".", "_")):
        return False
    if name.endswith(".parquet"):
        return True
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name.endswith((".jsonl", ".ndjson", ".json"))


def _remote(dataset: Dataset) -> list[File]:
    """Files behind an fsspec URL (s3://, gs://, https://, ...): a file, a glob, or a folder."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(dataset.path)
        if _is_glob(path):
            found = fs.glob(path, detail=True).values()
            infos = [info for info in found if info["type"] == "file" and _is_data(info["name"])]
        elif fs.isfile(path):
            infos = [fs.info(path)]
        else:
            infos = list(fs.find(path, detail=True).values())
            base = str(path).rstrip("/") + "/"
            names = {info["name"].removeprefix(base): info for info in infos}
            infos = [names[name] for name in select(sorted(names), {}, dataset, hub=False)]
    except ImportError as error:
        raise UserError(f"data set {dataset.name}: {dataset.path} needs a package: {error}") from None
    except Exception as error:  # every backend has its own exceptions
        raise UserError(f"data set {dataset.name}: cannot list {dataset.path}: {error!r}") from None
    if not infos:
        raise UserError(f"data set {dataset.name}: nothing at {dataset.path}")
    files = []
    for info in sorted(infos, key=lambda info: info["name"]):
        url = fs.unstrip_protocol(info["name"])
        changes = [info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime")]
        stamp = "-".join(str(value) for value in (info.get("size"), *changes) if value is not None)
        files.append(File(url, url, info.get("size") or 0, stamp))
    return files


# --- the hub -----------------------------------------------------------------------------------------------


def _hub(dataset: Dataset, download: bool) -> list[File]:
    """Files of a Hugging Face data set at one commit. Interrupted downloads are resumed by
    huggingface_hub."""
    import httpx
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = dataset.path.removeprefix("hf://").removeprefix("datasets/")
    where = f"data set {dataset.name}: {repo}"
    try:
        info = hub.HfApi().dataset_info(repo, revision=dataset.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        card = {}
        if "README.md" in sizes:
            card = _card(Path(_fetch(repo, info.sha, "README.md")).read_text())
        chosen = select(sorted(sizes), card, dataset, hub=True)
        if download:
            patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in chosen]
            hub.snapshot_download(repo, repo_type="dataset", revision=info.sha, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise UserError(f"{where}: neither a path here nor a data set on {_endpoint()} (or it needs a login)") from None
    except RevisionNotFoundError:
        raise UserError(f"{where}: no revision {dataset.revision} on {_endpoint()}") from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: cannot be fetched from {_endpoint()}: {reason}; rerun to resume") from None
    stamp = f"hf://datasets/{repo}@{info.sha}"
    return [File(name, f"{stamp}/{name}", sizes[name], stamp, (repo, info.sha)) for name in chosen]


def _fetch(repo: str, commit: str, name: str) -> str:
    """Local path of a hub file, downloading what is missing."""
    import huggingface_hub as hub

    return hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _card(text: str) -> dict[str, Any]:
    """The YAML header of a data set card."""
    import yaml

    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        card = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def select(names: list[str], card: dict, dataset: Dataset, *, hub: bool) -> list[str]:
    """Which of a repository's or directory's files belong to `dataset.subset` and `dataset.split`.

    The card's `configs` decide where they exist: each of the two words names a config or a split (data sets
    differ in which they use). Otherwise a word must be part of the file's path:
    data/train-00000-of-00002.parquet belongs to train. With neither word a directory is taken whole, a hub
    data set must have one split or `train`.
    """
    data = [name for name in names if _is_data(name) and not name.startswith(".")]
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
    if hub and not words and len(files) > 1:
        files = [n for n in files if re.search(r"(^|[/._-])train($|[/._-])", n)] or files
    if not files:
        there = sorted({split for _, split, _ in parts} | {config for config, _, _ in parts}) or data[:10]
        wanted, there = " ".join(words) or "data files", ", ".join(there) or "no data file"
        raise UserError(f"data set {dataset.name}: no {wanted} in {dataset.path}; there is {there}")
    return files


def _parts(card: dict) -> Iterator[tuple[str, str, list[str]]]:
    """(config, split, globs) for each entry of a card's `configs`, in every notation the hub accepts."""
    for entry in card.get("configs") or []:
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
    return next((c["config_name"] for c in card["configs"] if c.get("default")), "default")


def _ambiguous(dataset: Dataset, what: str, choices: set[str]):
    raise UserError(f"data set {dataset.name}: say which {what} of {dataset.path}: {', '.join(sorted(choices))}")


# --- reading -----------------------------------------------------------------------------------------------


def pieces(file: File, piece_bytes: int) -> list[Piece]:
    """A file as pieces of about `piece_bytes`, in order. They depend on the file and on piece_bytes only."""
    if file.format == ".parquet":
        with opened(file) as handle:
            meta = _parquet(handle, file).metadata
            sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        return [Piece(file, i, i + 1, size) for i, size in enumerate(sizes)]
    if file.packed or (file.format == ".json" and _is_array(file)):
        return [Piece(file, 0, -1, file.bytes)]
    starts = range(0, file.bytes, piece_bytes)
    return [Piece(file, s, min(s + piece_bytes, file.bytes), min(piece_bytes, file.bytes - s)) for s in starts]


def whole(file: File) -> Piece:
    """The file as one piece, read from its beginning."""
    return Piece(file, 0, -1, file.bytes)


@contextmanager
def opened(file: File) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, decompressed. Raises UserError when it cannot be opened or is damaged."""
    import gzip
    import zlib

    import zstandard

    path = file.path
    try:
        if file.hub:
            path = _fetch(*file.hub, file.path)
        if "://" in path:
            import fsspec

            raw = fsspec.open(path, "rb").open()
        else:
            raw = open(path, "rb")  # noqa: SIM115
        with raw:
            if file.packed == ".gz":
                yield gzip.open(raw)  # noqa: SIM115
            elif file.packed == ".zst":
                yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw), 1 << 20)
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{file.label}: damaged {file.packed} file: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{file.label}: no such file any more") from None


def _is_array(file: File) -> bool:
    """Whether a .json file holds one array rather than one object a line."""
    with opened(file) as handle:
        return handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def read(piece: Piece, columns: list[str]) -> Iterator[tuple[int, dict]]:
    """(position, record) of every record of a piece; `columns` limits what is decoded from Parquet.

    Raises UserError, naming file and line, for a record that is not a JSON object.
    """
    file = piece.file
    if file.format == ".parquet":
        yield from _rows(piece, columns)
    elif file.format == ".json" and _is_array(file):
        yield from _elements(file)
    else:
        yield from _lines(piece)


def _lines(piece: Piece) -> Iterator[tuple[int, dict]]:
    """JSONL. A line belongs to the piece in which its first byte lies."""
    import orjson

    by_bytes = not piece.file.packed
    with opened(piece.file) as handle:
        position = 0
        if piece.start:  # step to the first line that begins at or after `start`
            handle.seek(piece.start - 1)
            position = piece.start - 1 + len(handle.readline())
        for line in handle:
            if position >= piece.stop >= 0:
                break
            if not line.isspace():
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    record = _after_mark(line, position) or _malformed(piece.file, position, line, error)
                if type(record) is not dict:
                    raise UserError(f"{locate(piece.file, position)}: {type(record).__name__} instead of a JSON object")
                yield position, record
            position += len(line) if by_bytes else 1


def _after_mark(line: bytes, position: int) -> Any:
    """The record behind the byte order mark that some editors put at the beginning of a file."""
    import orjson

    if position or not line.startswith(b"\xef\xbb\xbf"):
        return None
    try:
        return orjson.loads(line[3:])
    except orjson.JSONDecodeError:
        return None


def _malformed(file: File, position: int, line: bytes, error: ValueError):
    start = line[:60].decode(errors="replace").rstrip()
    hint = "the file may be cut off; " if not line.endswith(b"\n") else ""
    reason = str(error).partition(": line 1")[0]
    raise UserError(f"{locate(file, position)}: not JSON ({reason}): {hint}the line begins {start!r}")


def _elements(file: File) -> Iterator[tuple[int, dict]]:
    """One JSON array. It has to be parsed as a whole, so large data should come as JSONL."""
    import orjson

    with opened(file) as handle:
        try:
            records = orjson.loads(handle.read().removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError as error:
            raise UserError(f"{file.label}:{error.lineno}: not JSON ({error.msg})") from None
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{locate(file, position)}: {type(record).__name__} instead of a JSON object")
        yield position, record


def _parquet(handle, file: File):
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        return pq.ParquetFile(handle)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file.label}: not a Parquet file: {' '.join(str(error).split())}") from None


def _rows(piece: Piece, columns: list[str]) -> Iterator[tuple[int, dict]]:
    with opened(piece.file) as handle:
        table = _parquet(handle, piece.file)
        stop = piece.stop if piece.stop >= 0 else table.num_row_groups
        there = [column for column in columns if column in table.schema_arrow.names]
        position = sum(table.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=there):
            for row in batch.to_pylist():
                yield position, without_nulls(row)
                position += 1


def without_nulls(value: Any) -> Any:
    """Parquet gives every struct every key, null where the record had none: take those out again."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def locate(file: File, position: int) -> str:
    """ "file:line" of a record, counted from 1 (the row or element for Parquet and JSON arrays)."""
    if file.packed or file.format == ".parquet" or (file.format == ".json" and _is_array(file)):
        return f"{file.label}:{position + 1}"
    line, left = 1, position
    with opened(file) as handle:
        while left > 0 and (block := handle.read(min(left, 1 << 22))):
            line += block.count(b"\n")
            left -= len(block)
    return f"{file.label}:{line}"
