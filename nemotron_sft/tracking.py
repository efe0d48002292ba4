"""Weights & Biases: one run per command, with its artifacts, and lineage.json beside every output.

    datasets ----------------> DataBlendsArtifact-sft --+
                                                        +--> ModelArtifact-sft, one version per checkpoint
    ModelArtifact-pretrain -----------------------------+

W&B is spoken to by a thread of its own, through its public API, on rank 0 alone, so that no step waits for it. If it
cannot be reached the run becomes an offline one. Bridge's own W&B logger stays off: it writes from the last rank,
ends the run before the last artifacts are in it, and logs checkpoints under another name.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from nemotron_sft import lineage
from nemotron_sft.config import Tracking, TrainConfig
from nemotron_sft.errors import UserError
from nemotron_sft.lineage import DATA, MODEL

MODES = ("wandb", "offline", "disabled")
TIMING = ("wall_seconds", "tokens_per_second")  # what differs between the metadata of identical outputs


def check(cfg: Tracking) -> None:
    """Refuse settings that cannot work, before anything is done. Raises UserError."""
    if cfg.mode not in MODES:
        raise UserError(f"tracking.mode={cfg.mode}: choose one of {', '.join(MODES)}")
    if cfg.mode == "wandb" and not has_key(cfg):
        raise UserError(
            "tracking=wandb needs an API key: run `wandb login` or set WANDB_API_KEY; tracking=offline needs none"
        )


def has_key(cfg: Tracking) -> bool:
    """Whether W&B would find credentials without asking for them."""
    import requests

    settings = _quiet_wandb(cfg).settings
    return bool(settings.api_key or settings.identity_token_file or requests.utils.get_netrc_auth(settings.base_url))


def _quiet_wandb(cfg: Tracking):
    """W&B's process-wide set-up, without messages: they would tell a user without an account to log in."""
    import wandb

    address = {"base_url": cfg.base_url} if cfg.base_url else {}
    return wandb.setup(settings=wandb.Settings(silent=True, **address))


# --- one W&B run -------------------------------------------------------------------------------------------


class Tracker:
    """A W&B run that belongs to a lineage record. Its methods return at once; a thread does what they ask for, from
    `start` on.

    record: as nemotron_sft.lineage describes it; its "tracking" entry is filled in once the run exists.
    directory: W&B's files go to <directory>/wandb. say: prints a line for people.
    """

    def __init__(self, cfg: Tracking, record: dict, directory: Path, tags: list[str], say: Callable[[str], None]):
        self.cfg, self.record, self.directory, self.tags, self.say = cfg, record, directory, tags, say
        self.run = None
        self.warned = False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = None

    def start(self) -> None:
        if self.cfg.mode != "disabled" and not self._thread:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()

    def log(self, values: dict, step: int | None = None) -> None:
        self._do(lambda: self.run.log(values, step=step))

    def inputs(self) -> None:
        """Declare the inputs that the record names."""
        known = [{key: entry[key] for key in ("artifact", "path", "digest")} for entry in self.record["inputs"]]
        self._do(lambda: self.run.config.update({"inputs": known}, allow_val_change=True))
        self._do(self._use_inputs)

    def output(self, entry: dict, aliases: list[str]) -> None:
        """Log an artifact."""
        self._do(lambda: self.run.log_artifact(self._artifact(entry), aliases=aliases))

    def close(self, status: int) -> None:
        """End the run. Takes little longer than the timeout, whatever W&B does."""
        self.start()  # a training run that failed before its first step is recorded too
        if not self._thread:
            return
        self.status = status
        self._tasks.put(None)
        self._thread.join(self.cfg.timeout + 10)
        if self._thread.is_alive():
            self._warn(f"no answer within {self.cfg.timeout + 10} s")

    def _do(self, task: Callable[[], Any]) -> None:
        if self.cfg.mode != "disabled":  # nobody would ever take it
            self._tasks.put(task)

    def _work(self) -> None:
        try:
            self.run = self._open()
        except Exception as error:
            self._warn(_first_line(error))
            return
        while task := self._tasks.get():
            try:
                task()
            except Exception as error:
                self._warn(_first_line(error))
        try:
            lineage.write(self.run.dir, self.record)
            self.run.save(str(Path(self.run.dir, lineage.FILE)), base_path=self.run.dir, policy="now")
            self.run.finish(self.status)
        except Exception as error:
            self._warn(_first_line(error))

    def _open(self):
        _quiet_wandb(self.cfg)
        if self.cfg.mode == "wandb":
            try:
                return self._init("online")
            except Exception as error:
                reason = _first_line(error)
            run = self._init("offline")
            self._warn(reason)
            return run
        return self._init("offline")

    def _init(self, mode: str):
        import wandb

        earlier = (self.record["tracking"] or {}).get("id") if mode == "online" else None
        limit = self.cfg.timeout
        run = wandb.init(
            project=self.cfg.project,
            entity=self.cfg.entity,
            group=self.cfg.group,
            name=self.cfg.name or self.directory.name,
            tags=["sft", self.record["stage"], *self.tags, *self.cfg.tags],
            job_type=self.record["stage"],
            dir=str(self.directory),
            config=self.record["config"]["values"] | {"config_digest": self.record["config"]["digest"]},
            mode=mode,
            id=earlier,
            resume="allow" if earlier else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=limit, finish_timeout=limit,
                                    finish_timeout_raises=True),
        )  # fmt: skip
        self.record["tracking"] = {"mode": mode, "project": self.cfg.project, "entity": self.cfg.entity, "id": run.id,
                                   "directory": str(Path(run.dir).parent)}  # fmt: skip
        return run

    def _use_inputs(self) -> None:
        """Online only: an offline run cannot declare inputs (wandb 0.29). A thread, because W&B waits for an answer."""
        if self.run.offline:
            return

        def use() -> None:
            for entry in self.record["inputs"]:
                try:
                    self.run.use_artifact(self._artifact(entry))
                except Exception as error:
                    self._warn(_first_line(error))

        threading.Thread(target=use, name="tracking-inputs", daemon=True).start()

    def _artifact(self, entry: dict):
        """The W&B artifact of an entry of the record. What is in it depends on the entry's content and place alone, so
        that W&B gives the data a training run reads the version that the prep run logged."""
        import wandb

        kind = "model" if entry["artifact"].startswith("Model") else "dataset"
        about = {"digest": entry["digest"], "path": str(Path(entry["path"]).absolute())}
        made = wandb.Artifact(_name(entry["artifact"]), type=kind, metadata=entry["metadata"] | about)
        facts = {key: entry[key] for key in ("artifact", "digest", "files")}
        # Copies, inside the run's directory: the originals may have changed when an offline run is uploaded.
        folder = Path(self.run.dir).absolute().parent / "artifacts"
        copies = folder / f"{_name(entry['artifact'])}-{(entry['digest'] or '')[:12]}"
        copies.mkdir(parents=True, exist_ok=True)
        self._add_json(made, copies / "artifact.json", facts)
        root = Path(entry["path"]).absolute()
        if entry["artifact"] == DATA:
            metadata = json.loads((root / "metadata.json").read_text())
            metadata = {key: value for key, value in metadata.items() if key not in TIMING}
            self._add_json(made, copies / "metadata.json", metadata)
        upload = sum(file["bytes"] for file in entry["files"]) <= self.cfg.upload_mb * 1e6
        for file in entry["files"]:
            # Source files are named from the working directory, others inside the artifact's own.
            path = Path(file["name"]).absolute() if "stamp" in file else root / file["name"]
            name = file["name"].lstrip("/")
            if not path.is_file():  # on a hub or in a bucket: artifact.json has its name and stamp
                continue
            if upload:
                (copies / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copies / name)
                made.add_file(str(copies / name), name, policy="immutable", skip_cache=True)
            else:
                made.add_reference(f"file://{quote(str(path))}", name, checksum=False)
        return made

    def _add_json(self, made, path: Path, value: dict) -> None:
        path.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
        made.add_file(str(path), path.name, policy="immutable", skip_cache=True)

    def _warn(self, reason: str) -> None:
        """One line, once."""
        if self.warned:
            return
        self.warned = True
        where = self.record["tracking"]["directory"] if self.record["tracking"] else self.directory / "wandb"
        self.say(f"W&B: {reason}; nothing is lost, upload it later with: wandb sync {where}")


def _name(name: str) -> str:
    """W&B allows letters, digits, dashes, underscores and dots."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- prep --------------------------------------------------------------------------------------------------


def record_data(cfg: Tracking, composed: Any, metadata: dict) -> None:
    """Write lineage.json beside a prep output and log the output to W&B. Does nothing if both were done.

    composed: the Hydra config. metadata: what prep.run returned.
    """
    directory = Path(metadata["directory"])
    files = lineage.data_files(metadata)
    earlier = lineage.read(directory)
    if earlier and earlier["outputs"][0]["digest"] == lineage.content_digest(files) and metadata["unchanged"]:
        return
    output = lineage.artifact(DATA, directory, files, lineage.data_summary(metadata), aliases=["latest"])
    record = lineage.record("prep", plain(composed), lineage.of_sources(metadata), [output])
    lineage.write(directory, record)
    tracker = Tracker(cfg, record, directory, sample_tag(metadata), lambda line: print(line, file=sys.stderr))
    tracker.start()
    tracker.inputs()
    tracker.output(output, ["latest"])
    if cfg.mode != "disabled":
        splits = metadata["splits"].items()
        tracker.log({f"{split}/{key}": part[key] for split, part in splits for key in ("packs", "tokens", "fill")})
    tracker.close(0)
    lineage.write(directory, record)


def plain(composed: Any) -> dict:
    """The composed config as plain data, without Hydra's own part."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(composed, resolve=True)
    values.pop("hydra", None)
    return values


def sample_tag(metadata: dict) -> list[str]:
    return [f"sample-{metadata['sample']}"] if metadata["sample"] is not None else []


# --- training ----------------------------------------------------------------------------------------------


class Training:
    """The record of a training run, and its W&B run. A context manager; does nothing on ranks other than 0.

        with Training(config, composed, metadata, data_dir, run_dir, rank, terminal) as tracked:
            tracked.register(callbacks)   every checkpoint that is saved becomes a ModelArtifact-sft
            tracked.log(step=..., ...)    metrics

    Aliases: `latest` is the newest checkpoint, `iter-N` its step, and `best` the one with the lowest validation loss
    among those that were saved at a step with a validation.
    """

    def __init__(self, config: TrainConfig, composed: Any, metadata: dict, data_dir: Path, run_dir: Path, rank: int,
                 terminal: TextIO):  # fmt: skip
        self.rank, self.run_dir, self.config, self.terminal = rank, run_dir, config, terminal
        if rank:
            return
        earlier = lineage.read(run_dir)
        model = asdict(config.model)
        inputs = [lineage.of_data(data_dir, metadata)]
        self.record = lineage.record("train", plain(composed), inputs, earlier["outputs"] if earlier else [])
        self.record["tracking"] = earlier["tracking"] if earlier else None
        self.losses: dict[int, float] = {
            output["metadata"]["step"]: output["metadata"]["validation_loss"]
            for output in self.record["outputs"]
            if output["metadata"]["validation_loss"] is not None
        }
        self.best = None
        self._saving = threading.Lock()
        self._hashing = ThreadPoolExecutor(1, "lineage")  # in order; hashing lets other threads run
        self.save()
        self.tracker = Tracker(config.tracking, self.record, run_dir, sample_tag(metadata), self.say)
        self._hashing.submit(self._describe_start, config.init_from, model)

    def __enter__(self) -> Training:
        if self.rank == 0:
            checkpoints = self.run_dir / "checkpoints"
            newest = lineage.newest_checkpoint(checkpoints)
            if newest != checkpoints and str(newest) not in [output["path"] for output in self.record["outputs"]]:
                self._hashing.submit(self._describe, newest)  # saved, but then the run was killed
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.rank:
            return
        self._hashing.shutdown(wait=True)
        for output in self._choose():
            self.tracker.output(output, ["best"])
        self.save()
        self.tracker.close(0 if kind is None or (kind is SystemExit and not error.code) else 1)
        self.save()

    def register(self, manager) -> None:
        manager.register("on_train_start", self.on_train_start)
        manager.register("on_checkpoint_save", self.on_checkpoint_save)

    def on_train_start(self, context) -> None:
        """Not before: Bridge's set-up walks through all loggers, and importing wandb in a thread adds some."""
        if self.rank == 0:
            self.tracker.start()

    def log(self, step: int, **values: float | None) -> None:
        if "validation_loss" in values:
            self.losses[step] = values["validation_loss"]
        self.tracker.log({name: value for name, value in values.items() if value is not None}, step)

    def on_checkpoint_save(self, context) -> None:
        """Bridge has committed a checkpoint; an asynchronous one may be older than the current step."""
        if self.rank == 0:
            newest = lineage.newest_checkpoint(Path(context.state.cfg.checkpoint.save))
            self._hashing.submit(self._describe, newest)

    def say(self, line: str) -> None:
        print(line, file=self.terminal, flush=True)

    def save(self) -> None:
        with self._saving:
            lineage.write(self.run_dir, self.record)

    def _describe_start(self, init_from: str, model: dict) -> None:
        entry = self._safely(lineage.of_model, init_from, model, self.config.seed, self.config.tracking.digests)
        if entry:
            self.record["inputs"].insert(0, entry)
        self._safely(self.save)
        self.tracker.inputs()

    def _describe(self, path: Path) -> None:
        self._safely(self._record_checkpoint, path)

    def _record_checkpoint(self, path: Path) -> None:
        entry = self._checkpoint(path)
        others = [output for output in self.record["outputs"] if output["path"] != str(path)]
        self.record["outputs"] = [*others, entry]
        self._choose()
        self.save()
        with contextlib.suppress(OSError):  # it may have been rotated away
            lineage.write(path, self.record | {"outputs": [entry]})
        self.tracker.output(entry, entry["aliases"])

    def _checkpoint(self, path: Path) -> dict:
        files = lineage.describe(path, lineage.inside(path), self.config.tracking.digests)
        step = int(path.name.removeprefix("iter_"))
        metadata = {
            "step": step,
            "validation_loss": self.losses.get(step),
            "model": self.config.model.name,
            "inputs": {entry["artifact"]: entry["digest"] for entry in self.record["inputs"]},
        }
        return lineage.artifact(MODEL, path, files, metadata, aliases=[])

    def _choose(self) -> list[dict]:
        """Give every output its aliases; returns the best one if it has changed."""
        outputs = self.record["outputs"]
        for output in outputs:
            output["metadata"]["validation_loss"] = self.losses.get(output["metadata"]["step"])
        scored = [output for output in outputs if output["metadata"]["validation_loss"] is not None]
        best = min(scored, key=lambda output: output["metadata"]["validation_loss"], default=None)
        for output in outputs:
            step = output["metadata"]["step"]
            output["aliases"] = [
                *(("best",) if output is best else ()),
                *(("latest",) if output is outputs[-1] else ()),
                f"iter-{step}",
            ]
        changed = best is not None and best["path"] != self.best
        self.best = best["path"] if best else None
        return [best] if changed else []

    def _safely(self, function: Callable, *arguments: Any) -> Any:
        """Nothing that goes wrong in keeping records may end a training run."""
        try:
            return function(*arguments)
        except Exception as error:
            self.say(f"lineage: {_first_line(error)}")
            return None


# --- names -------------------------------------------------------------------------------------------------


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


def resolve_names(config: TrainConfig, rank: int, world_size: int) -> None:
    """Replace wandb: names in data.path and init_from by paths. Rank 0 resolves them for all. Raises UserError."""
    names = [config.data.path, config.init_from]
    if not any(name.startswith("wandb:") for name in names):
        return
    if rank == 0:
        names = [resolve(name, config.tracking, config.output_dir) for name in names]
    if world_size > 1:
        import torch

        torch.distributed.broadcast_object_list(names, src=0)
    config.data.path, config.init_from = names


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
    lineage.verify(Path(output["path"]), output["files"])
    return output["path"]


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
        raise UserError(f"{spec}: W&B has no such artifact, or cannot be reached: {_first_line(error)}") from None
    original = Path(found.metadata["path"])
    try:
        lineage.verify(original, about["files"])
        return str(original)
    except UserError as error:
        if any(entry.ref for entry in found.manifest.entries.values()):
            raise UserError(f"{spec} was logged by reference, and {error}") from None
    found.download(str(target))
    lineage.verify(target, about["files"])
    return str(target)
