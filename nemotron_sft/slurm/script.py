"""The sbatch scripts of a submission."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemotron_sft.train.compat.submitit import sbatch_script

TEMPLATE = Path(__file__).with_name("job.sh.jinja")


@dataclass
class Container:
    image: str | None
    mounts: list[str]
    python: str


@dataclass
class Slurm:
    """conf/cluster/slurm.yaml, which explains every key."""

    kind: str
    account: str | None
    partition: str | None
    qos: str | None
    nodes: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int | None
    mem: str | None
    time: str | None
    constraint: str | None
    exclusive: bool | None
    dependency: str | None
    array_parallelism: int
    sbatch_args: dict[str, Any]
    srun_args: list[str]
    container: Container
    python: str | None
    setup: list[str]
    environment: dict[str, str]
    signal_lead: int
    max_requeues: int
    wait: bool
    dry_run: bool
    folder: str

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass
class Script:
    file: str
    text: str
    jobs: list[tuple[str, str]]  # of each of its jobs: label, suffix of the id
    quiet: bool = False  # too many to show the progress of each
    after: bool = False  # starts when the previous script's jobs have succeeded
    id: str = ""  # of its job, once it is submitted


def write_scripts(app: str, configs: list[DictConfig], slurm: Slurm, folder: Path) -> list[Script]:
    """The sbatch scripts of a submission; nothing is written to disk."""
    many = len(configs) > 1
    if app == "train" or configs[0].shards == 1:
        jobs = [(f"{i}: ", f"_{i}") for i in range(len(configs))] if many else [("", "")]
        config = "config-${SLURM_ARRAY_TASK_ID:-0}.yaml"
        text = script(app, slurm, folder, config, array=len(configs) if many else None)
        return [Script("job.sh", text, jobs)]
    scripts = []
    for i, cfg in enumerate(configs):
        name = f"-{i}" if many else ""
        config, shards = f"config-{i}.yaml", [(f"shard {n}", f"_{n}") for n in range(cfg.shards)]
        text = script(app, slurm, folder, config, "shard=$SLURM_ARRAY_TASK_ID", array=cfg.shards)
        scripts.append(Script(f"shards{name}.sh", text, shards, quiet=True))
        text = script(app, slurm, folder, config)
        scripts.append(Script(f"merge{name}.sh", text, [(f"{i}: " if many else "", "")], after=True))
    return scripts


def script(app: str, slurm: Slurm, folder: Path, config: str, arguments: str = "", array: int | None = None) -> str:
    """The text of an sbatch script that runs `app` on FOLDER/`config`, `array` times if that is given."""
    train = app == "train"
    image, python = slurm.container.image, slurm.container.python
    recipe = shlex.quote(str(folder / "code" / f"{app}.py"))
    command = [
        python if image else shlex.quote(slurm.python or sys.executable),
        f"-u {recipe} --frozen {shlex.quote(str(folder))}/{config}",
        '--job "$job"',
        arguments,
    ]
    srun = ["--open-mode=append", "--kill-on-bad-exit=1"]
    if slurm.cpus_per_task:  # since Slurm 22.05 srun does not take it from sbatch
        srun.append(f"--cpus-per-task={slurm.cpus_per_task}")
    if image:
        here, base = Path.cwd(), Path(slurm.folder).absolute()
        shared = [here] if base.is_relative_to(here) else [here, base]
        seen = [*(f"{path}:{path}" for path in shared), *slurm.container.mounts]
        srun += [f"--container-image={image}", f"--container-mounts={','.join(seen)}", f"--container-workdir={here}"]
    before, after = around_tasks(slurm, folder, retry_lost=not train)
    extra = {"chdir": str(Path.cwd()), "requeue": True, **slurm.sbatch_args}
    return (
        sbatch_script(
            command=" ".join(part for part in command if part),
            folder=folder,
            job_name=folder.name,
            account=slurm.account,
            partition=slurm.partition,
            qos=slurm.qos,
            nodes=slurm.nodes if train else 1,
            ntasks_per_node=slurm.tasks if train else 1,
            gpus_per_node=slurm.gpus_per_node if train else None,
            cpus_per_task=slurm.cpus_per_task,
            mem=slurm.mem,
            time=slurm.time,
            constraint=slurm.constraint,
            exclusive=slurm.exclusive or None,
            dependency=slurm.dependency,
            signal_delay_s=slurm.signal_lead,
            array_parallelism=slurm.array_parallelism,
            map_count=array,
            wckey=None,
            stderr_to_stdout=True,
            additional_parameters=extra,
            srun_args=[*srun, *slurm.srun_args],
            setup=before,
            teardown=after,
        )
        + "\n"
    )


def around_tasks(slurm: Slurm, folder: Path, retry_lost: bool) -> tuple[list[str], list[str]]:
    """The lines of job.sh.jinja before and after the tasks. retry_lost: queue a job again whose task was killed."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["quote"] = shlex.quote
    text = environment.from_string(TEMPLATE.read_text()).render(
        environment=slurm.environment,
        setup=slurm.setup,
        folder=folder,
        max_requeues=slurm.max_requeues,
        retry_lost=retry_lost,
    )
    before, _, after = text.rpartition("--- tasks ---\n")
    return before.splitlines(), after.splitlines()
