"""The sbatch scripts of a submission."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemotron_sft.train.compat.submitit import sbatch_script


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
            setup=_before(slurm, folder),
            teardown=_after(slurm, retry_lost=not train),
        )
        + "\n"
    )


def _before(slurm: Slurm, folder: Path) -> list[str]:
    array = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    return [
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
        *(f"export {key}={shlex.quote(str(value))}" for key, value in slurm.environment.items()),
        *slurm.setup,
        f"job={shlex.quote(str(folder))}/{array}",
        'rm -f "$job".exit "$job"_stop "$job"_failure.txt',
        "cancelled=",
        "trap cancelled=yes TERM # wait for the tasks, however they end",
    ]


def _after(slurm: Slurm, retry_lost: bool) -> list[str]:
    """What the script does once the tasks have ended: queue the job again, or say what went wrong.

    A job is queued again if it was told to stop, by its time limit or by preemption; jobs of preparation also if a
    task was killed from outside (status above 128) by something else than scancel (143).

    srun's status is the highest of its tasks', and when one fails it ends the others with SIGTERM: 143 may stand for
    another's failure.
    """
    lost = ' || { [ "$status" -gt 128 ] && [ "$status" -ne 143 ]; }' if retry_lost else ""
    return [
        "status=$?",
        "trap '' TERM # which requeueing sends as well, also to scontrol",
        'if [ "$status" -eq 143 ] && [ -z "$cancelled" ] && [ -e "$job"_failure.txt ]; then',
        '  [ "$(head -c 7 "$job"_failure.txt)" = "error: " ] && status=2 || status=1',
        "fi",
        "before=${SLURM_RESTART_COUNT:-0}",
        "stopped() {",
        f'  [ -e "$job"_stop ]{lost} || scontrol -o show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"',
        "}",
        'if [ "$status" -ne 0 ] && stopped; then',
        f'  if [ "$before" -lt {slurm.max_requeues} ]; then',
        f'    echo "stopped early; queued again ($((before + 1)) of {slurm.max_requeues} times)"',
        '    scontrol requeue "$SLURM_JOB_ID" && exit "$status"',
        "  fi",
        '  echo "error: stopped early, after $before times in the queue again (cluster.max_requeues)"',
        'elif [ "$status" -gt 128 ]; then',
        '  echo "error: a task was killed by signal $((status - 128)); srun names it above"',
        '  [ ! -e "$job"_failure.txt ] || echo "another said: $(tail -n 1 "$job"_failure.txt) (${job}_failure.txt)"',
        'elif [ "$status" -ne 0 ]; then',
        '  cat "$job"_failure.txt 2> /dev/null || echo "error: srun failed with status $status"',
        "fi",
        'echo "$status" > "$job".exit',
        'exit "$status"',
    ]
