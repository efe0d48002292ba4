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
import functools
import json
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from nemotron_sft.config import Tracking
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.record import lineage
from nemotron_sft.record.lineage import DATA

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


def _quiet_wandb(cfg: Tracking) -> Any:
    """W&B's process-wide set-up, without messages: they would tell a user without an account to log in."""
    import wandb

    address = {"base_url": cfg.base_url} if cfg.base_url else {}
    return wandb.setup(settings=wandb.Settings(silent=True, **address))


class Tracker:
    """A W&B run that belongs to a lineage record. Its methods return at once; a thread does what they ask for, from
    `start` on.

    record: as nemotron_sft.record.lineage describes it; its "tracking" entry is filled in once the run exists.
    directory: W&B's files go to <directory>/wandb. say: prints a line for people.
    """

    def __init__(self, cfg: Tracking, record: dict, directory: Path, tags: list[str], say: Callable[[str], None]):
        self.cfg, self.record, self.directory, self.tags, self.say = cfg, record, directory, tags, say
        self.run: Any = None  # wandb.Run
        self.status = 0  # of the command
        self.warned = False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to do what was asked for, unless tracking is disabled."""
        if self.cfg.mode != "disabled" and not self._thread:
            self._thread = threading.Thread(target=self._attempt, args=(self._work,), name="tracking", daemon=True)
            self._thread.start()

    def log(self, values: dict, step: int | None = None) -> None:
        """Log metrics."""
        self._do(lambda: self.run.log(values, step=step))

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table."""

        def log() -> None:
            import wandb

            self.run.log({name: wandb.Table(columns=columns, data=rows)}, step=step)

        self._do(log)

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

    def _attempt(self, task: Callable[[], Any]) -> None:
        """Do something in a thread of ours. Whatever goes wrong is one line, and never a traceback on the terminal.

        Not only Exceptions: on a full disk W&B cancels what it waits for, which asyncio does not count among them.
        """
        try:
            task()
        except BaseException as error:
            with contextlib.suppress(Exception):  # of a terminal that is closed already
                self._warn(first_line(error))

    def _work(self) -> None:
        self.run = self._open()
        while task := self._tasks.get():
            self._attempt(task)
        lineage.write(self.run.dir, self.record)
        self.run.save(str(Path(self.run.dir, lineage.FILE)), base_path=self.run.dir, policy="now")
        self.run.finish(self.status)

    def _open(self) -> Any:
        _quiet_wandb(self.cfg)
        if self.cfg.mode == "wandb":
            try:
                return self._init("online")
            except BaseException as error:
                reason = first_line(error)
            run = self._init("offline")
            self._warn(reason)
            return run
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
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
                self._attempt(functools.partial(self._use_input, entry))

        threading.Thread(target=use, name="tracking-inputs", daemon=True).start()

    def _use_input(self, entry: dict) -> None:
        self.run.use_artifact(self._artifact(entry))

    def _artifact(self, entry: dict) -> Any:
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

    def _add_json(self, made: Any, path: Path, value: dict) -> None:
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


def sample_tag(metadata: dict) -> list[str]:
    """The W&B tag of data that is a sample."""
    return [f"sample-{metadata['sample']}"] if metadata["sample"] is not None else []
