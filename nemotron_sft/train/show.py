"""A run directory for people, from the files in it: what was trained on what, and how well it went."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from nemotron_sft.console import table
from nemotron_sft.errors import UserError
from nemotron_sft.record import lineage
from nemotron_sft.train import evaluation


def find_run(path: Path) -> Path | None:
    """The run directory that `path` is, or lies up to two levels inside; None if there is none."""
    places = (path.resolve(), *path.resolve().parents[:2])
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def print_run(run_dir: Path) -> None:
    """Print the summary of a run. Raises UserError for files that cannot be read."""
    table(f"Run {run_dir}", ["", ""], summary(run_dir), header=False)


def summary(run_dir: Path) -> list[tuple[str, str]]:
    """(name, text) pairs from config.yaml, metrics.jsonl, heldout.json, lineage.json and checkpoints/ of a run.

    Losses are in nats per trained token. Raises UserError for files that cannot be read.
    """
    config = OmegaConf.load(run_dir / "config.yaml")
    lines = _read(run_dir / "metrics.jsonl")
    rows = [
        ("model", str(config.model.name)),
        ("starts from", str(config.init_from)),
        ("data", str(config.data.path)),
        ("steps", f"{max((line['step'] for line in lines), default=0):,}"),
    ]
    for key, name in (("loss", "training loss"), ("validation_loss", "validation loss"), ("test_loss", "test loss")):
        if found := [line[key] for line in lines if key in line]:
            change = f"{found[0]:.4f} -> {found[-1]:.4f}" if len(found) > 1 else f"{found[0]:.4f}"
            rows.append((name, change))
    saved = evaluation.read(run_dir / "heldout.json")
    for name, shares in evaluation.first_and_last(saved["asked"] if saved else []):
        rows.append((f"right answers, {name}", " -> ".join(f"{share:.1%}" for share in shares)))
    for entry in (lineage.read(run_dir) or {}).get("evaluations", []):
        rows += [(f"evaluation, {name}", f"{score:.4f}") for name, score in entry["scores"].items()]
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*"))
    newest = f", the newest {saved[-1]}" if saved else ""
    rows.append(("checkpoints", f"{len(saved)}{newest}"))
    return rows


def _read(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; none where the run has not logged yet."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} holds a line that is no JSON ({error}): remove it") from None
