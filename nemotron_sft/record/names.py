"""Artifacts by name: wandb:[ENTITY/[PROJECT/]]NAME[:ALIAS] -> a directory on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from nemotron_sft.config import Tracking
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.record import digests, lineage
from nemotron_sft.record.wandb import check


def resolve(spec: str, cfg: Tracking, output_dir: str) -> str:
    """Where the artifact wandb:[ENTITY/[PROJECT/]]NAME[:ALIAS] is, its files compared with their SHA-256.

    With tracking=wandb W&B is asked, and what was uploaded is downloaded if the original is not here. Otherwise the
    records below `output_dir` are searched; they know `latest`, `best` and `iter-N`, but not W&B's version numbers.
    Any other `spec` is returned as it is. Raises UserError.
    """
    if not spec.startswith("wandb:"):
        return spec
    name, _, alias = spec.removeprefix("wandb:").rpartition(":")
    if not name:
        name, alias = alias, "latest"
    if cfg.mode != "wandb":
        return _find_here(spec, name, alias, Path(output_dir))
    return _find_online(spec, name, alias, cfg, Path(output_dir))


def _find_here(spec: str, name: str, alias: str, root: Path) -> str:
    found = []
    for path in root.glob("*/*/" + lineage.FILE):
        record = lineage.read(path.parent) or {"outputs": []}
        for output in record["outputs"]:
            if output["artifact"] == name and alias in output["aliases"]:
                found.append((record["made"], output["path"], output))
    if not found:
        raise UserError(
            f"{spec}: no {name} with alias {alias} in the records below {root}; W&B's own versions (v0, v1, ...) need "
            "tracking=wandb"
        )
    output = max(found, key=lambda entry: entry[:2])[2]
    digests.verify(Path(output["path"]), output["files"])
    return str(output["path"])


def _find_online(spec: str, name: str, alias: str, cfg: Tracking, output_dir: Path) -> str:
    import wandb

    check(cfg)
    entity = f"{cfg.entity}/" if cfg.entity else ""
    qualified = {0: f"{entity}{cfg.project}/{name}", 1: f"{entity}{name}"}.get(name.count("/"), name)
    try:
        api = wandb.Api({"base_url": cfg.base_url} if cfg.base_url else None, timeout=cfg.timeout)
        found = api.artifact(f"{qualified}:{alias}")
        target = output_dir / "artifacts" / f"{found.name.replace(':', '-')}"
        about = json.loads(Path(found.get_entry("artifact.json").download(str(target))).read_text())
    except Exception as error:
        raise UserError(f"{spec}: W&B has no such artifact, or cannot be reached: {first_line(error)}") from None
    original = Path(found.metadata["path"])
    try:
        digests.verify(original, about["files"])
        return str(original)
    except UserError as error:
        if any(entry.ref for entry in found.manifest.entries.values()):
            raise UserError(f"{spec} was logged by reference, and {error}") from None
    found.download(str(target))
    digests.verify(target, about["files"])
    return str(target)
