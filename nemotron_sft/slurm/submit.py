"""Slurm jobs: what is frozen at submission, the sbatch scripts, and following a job to its end.

A submission has a folder of its own that all nodes see:

    output/slurm/NAME-DATE/
        command.txt      what was typed
        version.txt      the commit of the code, and the files that differ from it
        code/            a copy of the code; this is what runs, whatever is edited later
        config-0.yaml    the resolved config of the first job of a sweep, and so on
        job.sh           the sbatch script
        JOB_0_log.out    output of rank 0 and of the script, then one file per rank
        JOB.exit         exit status, once the job is over

submitit writes the sbatch scripts. What runs on the nodes is a recipe in plain Python (see node.py): a container
needs neither submitit nor Hydra's plugins, and no pickle has to be read by another version of Python.
"""

from __future__ import annotations

import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemotron_sft.config import Prep, TrainConfig, check
from nemotron_sft.errors import UserError
from nemotron_sft.paths import CONF, ROOT, TYPED
from nemotron_sft.record import code_version
from nemotron_sft.slurm.follow import Task, follow
from nemotron_sft.slurm.script import Script, Slurm, write_scripts
from nemotron_sft.train.versions import WrongVersions

SCHEMAS = {"train": TrainConfig, "prep": Prep}


@dataclass
class _Composed:
    cluster: Slurm


def settings(cluster: DictConfig) -> Slurm:
    """The checked cluster settings. Raises UserError."""
    if isinstance(cluster.get("time"), int):
        raise UserError(
            f"cluster.time={cluster.time} is a number, and YAML makes one of 4:00:00 as well: "
            'write hours:minutes:seconds in quotes, "4:00:00"'
        )
    slurm = check(OmegaConf.create({"cluster": cluster}), _Composed).cluster
    for key in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "array_parallelism"):
        if (value := getattr(slurm, key)) is not None and value < 1:
            raise UserError(f"cluster.{key} must be at least 1, not {value}")
    return slurm


def here(cluster: DictConfig) -> None:
    """Check that a config may run in this process. Raises UserError if it is meant for a cluster."""
    if cluster.kind == "slurm":
        name = next((a.split("=")[1] for a in TYPED[1:] if a.startswith("cluster=")), "slurm")
        command = shlex.join([TYPED[0], "-m", *TYPED[1:]])
        raise UserError(f"cluster={name} submits jobs, which takes -m: python {command}")
    if cluster.kind != "local":
        raise UserError(f"cluster.kind={cluster.kind}: choose local or slurm")
    # What an experiment or conf/local says of a cluster is for when there is one; what was typed is meant now.
    typed = [argument.lstrip("+").partition("=")[0] for argument in TYPED[1:] if not argument.startswith("~")]
    if extra := [key for key in typed if key.startswith("cluster.") and key != "cluster.kind"]:
        raise UserError(f"{extra[0]} means nothing on this machine: add -m cluster=slurm, or remove it")


def run_here(jobs: Sequence[Sequence[str]]) -> int:
    """Run the jobs of a sweep on this machine, each in a process of its own; the exit status of the first to fail."""
    for overrides in jobs:
        typed = [override.removeprefix("++") for override in overrides]  # which open_key adds to dotted keys
        print(f"--- {' '.join(typed)}", flush=True)
        if status := subprocess.run([sys.executable, sys.argv[0], *typed]).returncode:
            return status
    return 0


def launch(app: str, configs: list[DictConfig]) -> int:
    """Submit one job per composed config of `app` (train | prep), as an array if there are several.

    Returns an exit status: 0, or that of the first job that failed if the submission is followed. Raises UserError.
    """
    configs = [OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]) for cfg in configs]
    for cfg in configs:
        check(cfg, SCHEMAS[app])
    slurm = settings(configs[0].cluster)
    if any(cfg.cluster != configs[0].cluster for cfg in configs):
        raise UserError("a sweep over cluster settings is more than one submission: give one value each time")
    folder = new_folder(Path(slurm.folder).absolute(), job_name(app, configs[0]))
    for index, cfg in enumerate(configs):
        freeze(app, cfg, folder.name, index if len(configs) > 1 else None)
    scripts = write_scripts(app, configs, slurm, folder)
    if slurm.dry_run:
        for cfg in configs:
            print(f"# config\n{OmegaConf.to_yaml(cfg)}")
        for script in scripts:
            print(f"# {folder / script.file}\n{script.text}", flush=True)
        if app == "train":
            preflight(configs)
        return 0
    store(configs, folder)
    tasks = submit(scripts, folder)
    announce(app, configs, scripts, folder)
    return follow(tasks) if slurm.wait else 0


def preflight(configs: list[DictConfig]) -> None:
    """Print what each run would need. Takes seconds, and Megatron-Bridge, which a login node may not have."""
    try:
        from nemotron_sft.train.plan import plan  # noqa: PLC0415 -- NumPy and Megatron-Bridge

        for cfg in configs:
            plan(check(cfg, TrainConfig))
    except (ImportError, WrongVersions) as error:
        print(f"# no preflight here: {error}")


def job_name(app: str, cfg: DictConfig) -> str:
    """What Slurm shows of a submission: the run's name, or that of the blend."""
    name = cfg.name if app == "train" else f"prep-{cfg.blend.name or Path(cfg.blend.path).stem}"
    return re.sub(r"[^\w.-]", "_", name)


def new_folder(parent: Path, name: str) -> Path:
    """A path below `parent`, named after the job and the time, that does not exist yet."""
    folder = parent / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    numbers = (folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))
    return next(path for path in (folder, *numbers) if not path.exists())


def freeze(app: str, cfg: DictConfig, name: str, index: int | None) -> None:
    """Settle here what a run would otherwise decide when it starts. `index`: of the job in a sweep."""
    OmegaConf.resolve(cfg)
    if index is not None:
        cfg.tracking.group = cfg.tracking.group or name  # the jobs of a sweep are shown together
    if app != "train":
        return
    if cfg.data.path == "latest":
        from nemotron_sft.data.packed import find_data  # noqa: PLC0415 -- NumPy

        cfg.data.path = str(find_data(cfg.data.path, cfg.output_dir))
    if cfg.run_dir is None:
        cfg.run_dir = str(Path(cfg.output_dir, "train", name if index is None else f"{name}-{index}"))
    elif index:
        raise UserError(f"run_dir={cfg.run_dir} would belong to every job of the sweep: leave it out")


def store(configs: list[DictConfig], folder: Path) -> None:
    """Write a submission's configs, and copy the code."""
    code = folder / "code"
    shutil.copytree(ROOT / "nemotron_sft", code / "nemotron_sft", ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (ROOT / "recipes").glob("*.py"):  # beside the package, so that this copy is what they import
        shutil.copy(recipe, code)
    shutil.copytree(CONF, code / "conf", ignore=shutil.ignore_patterns("local"))  # it holds models' config.json
    if (ROOT / "data").exists():  # what is shipped with the repository
        (code / "data").symlink_to(ROOT / "data")
    (folder / "version.txt").write_text(code_version.version())
    (folder / "command.txt").write_text(shlex.join([sys.executable, *TYPED]) + "\n")
    for index, cfg in enumerate(configs):
        OmegaConf.save(cfg, folder / f"config-{index}.yaml")


def submit(scripts: list[Script], folder: Path) -> list[Task]:
    """sbatch every script. Raises UserError with Slurm's own words if it refuses; earlier ones are then cancelled."""
    environment = {  # of an enclosing allocation; they would count as options
        key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    tasks: list[Task] = []
    submitted: list[str] = []
    for part in scripts:
        path = folder / part.file
        path.write_text(part.text)
        after = [f"--dependency=afterok:{submitted[-1]}", "--kill-on-invalid-dep=yes"] if part.after else []
        try:
            sbatch = subprocess.run(
                ["sbatch", "--parsable", *after, str(path)], capture_output=True, text=True, env=environment
            )
        except FileNotFoundError:
            raise UserError("sbatch is not installed here: run this where you submit Slurm jobs") from None
        if sbatch.returncode:
            if submitted:
                subprocess.run(["scancel", *submitted], capture_output=True)
            raise UserError(f"sbatch refuses {path}: {' '.join(sbatch.stderr.split())}")
        part.id = sbatch.stdout.strip().split(";")[0]
        submitted.append(part.id)
        for label, suffix in part.jobs:
            job = part.id + suffix
            tasks.append(Task(job, label, folder / f"{job}_0_log.out", folder / f"{job}.exit", part.quiet))
    return tasks


def announce(app: str, configs: list[DictConfig], scripts: list[Script], folder: Path) -> None:
    """Say what was submitted, and the commands to go on with."""
    ids = [part.id for part in scripts]
    print(f"Submitted {', '.join(f'job {part.id} ({part.file})' for part in scripts)} in {folder}")
    logs = f"{ids[-1]}*_0_log.out" if len(scripts[-1].jobs) > 1 else f"{ids[-1]}_0_log.out"
    print(f"  follow  tail -F {folder}/{logs}")
    print(f"  cancel  scancel {' '.join(ids)}")
    given = " ".join(shlex.quote(argument) for argument in TYPED[1:] if not argument.startswith("run_dir="))
    if app == "train" and len(configs) == 1:
        given += f" run_dir={configs[0].run_dir}"
    if app == "prep" or len(configs) == 1:
        print(f"  resume  python {TYPED[0]} {given}")
    sys.stdout.flush()
