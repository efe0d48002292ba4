"""One process per case: it imports, waits for its turn, runs, and leaves NAME.json in the output directory.

A contestant is a generator: what comes before its first `yield` is done before its turn (imports), the second yields
the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT


def run_case(contestant: Iterator[dict], name: str, out: Path) -> None:
    """In the case's own process: import, say so, wait for the turn, run, write the result."""
    next(contestant)
    print("READY", flush=True)
    sys.stdin.readline()
    result = next(contestant)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    sys.stdout.flush()
    os._exit(0)  # without waiting for the loader's workers


def start(script: str, name: str, out: Path, options: list[str], packages: Path | None = None) -> subprocess.Popen:
    """A process for the case `name` of a benchmark; its log is NAME.log. packages: where it looks for modules first."""
    log = (out / f"{name}.log").open("w")
    with socket.socket() as free:  # a port of its own, whatever else runs here
        free.bind(("127.0.0.1", 0))
        environment = os.environ | {"MASTER_PORT": str(free.getsockname()[1])}
    if packages:
        environment = environment | {"PYTHONPATH": str(packages)}
    command = [sys.executable, script, "--name", name, "--out", str(out), *options]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
    )


def take_turn(name: str, process: subprocess.Popen, out: Path) -> None:
    """Let a started case run to its end; print how long it took, and its log if it failed."""
    began = time.perf_counter()
    for line in process.stdout:
        if line.strip() == "READY":
            break
    waited = time.perf_counter() - began
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("go\n")
        process.stdin.flush()
    for _ in process.stdout:
        pass
    process.wait()
    took = time.perf_counter() - began
    print(f"{name}: {took:.0f} s ({waited:.0f} s of imports), exit {process.returncode}", flush=True)
    if process.returncode:
        print((out / f"{name}.log").read_text()[-3000:], flush=True)


def results(out: Path) -> Iterator[tuple[str, dict]]:
    """(name, result) of every finished case; one that measured several row lengths gives a result for each."""
    for path in sorted(out.glob("*.json")):
        if path.stem == "results":
            continue
        result = json.loads(path.read_text())
        for row, part in result.get("rows", {"": result}).items():
            yield f"{path.stem} {row}".strip(), part
