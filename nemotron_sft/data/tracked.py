"""The record of a preparation: lineage.json beside its output, and its W&B run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_sft.config import Tracking
from nemotron_sft.console import say
from nemotron_sft.record import digests, lineage
from nemotron_sft.record.lineage import DATA
from nemotron_sft.record.wandb import Tracker, sample_tag


def record_data(cfg: Tracking, composed: Any, metadata: dict) -> None:
    """Write lineage.json beside a prep output and log the output to W&B. Does nothing if both were done.

    composed: the Hydra config. metadata: what prep.run returned.
    """
    directory = Path(metadata["directory"])
    files = lineage.data_files(metadata)
    earlier = lineage.read(directory)
    if earlier and earlier["outputs"][0]["digest"] == digests.content_digest(files) and metadata["unchanged"]:
        return
    output = lineage.artifact(DATA, directory, files, lineage.data_summary(metadata), aliases=["latest"])
    record = lineage.record("prep", lineage.plain(composed), lineage.of_sources(metadata), [output])
    lineage.write(directory, record)
    tracker = Tracker(cfg, record, directory, sample_tag(metadata), say)
    tracker.start()
    tracker.inputs()
    tracker.output(output, ["latest"])
    if cfg.mode != "disabled":
        splits = metadata["splits"].items()
        tracker.log({f"{split}/{key}": part[key] for split, part in splits for key in ("packs", "tokens", "fill")})
    tracker.close(0)
    lineage.write(directory, record)
