"""Digests of files and of plain data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemotron_sft.errors import UserError


def sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file."""
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
