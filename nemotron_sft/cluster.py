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
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemotron_sft.app import TYPED
from nemotron_sft.config import Prep, TrainConfig, check
from nemotron_sft.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {"train": TrainConfig, "prep": Prep}


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
    if extra := [key for key in cluster if key != "kind"]:
        raise UserError(f"cluster.{extra[0]} means nothing on this machine: add -m cluster=slurm, or remove it")


def run_here(jobs: Sequence[Sequence[str]]) -> int:
    """Run the jobs of a sweep on this machine, each in a process of its own; the exit status of the first to fail."""
    for overrides in jobs:
        print(f"--- {' '.join(overrides)}", flush=True)
        if status := subprocess.run([sys.executable, sys.argv[0], *overrides]).returncode:
            return status
    return 0


# --- submitting --------------------------------------------------------------------------------------------


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
        from nemotron_sft.megatron.run import plan

        for cfg in configs:
            plan(check(cfg, TrainConfig))
    except ImportError as error:
        print(f"# no preflight here: {error}")


def job_name(app: str, cfg: DictConfig) -> str:
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
        from nemotron_sft.megatron.run import find_data

        cfg.data.path = str(find_data(check(cfg, TrainConfig)))
    if cfg.run_dir is None:
        cfg.run_dir = str(Path(cfg.output_dir, "train", name if index is None else f"{name}-{index}"))
    elif index:
        raise UserError(f"run_dir={cfg.run_dir} would belong to every job of the sweep: leave it out")


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
    from submitit.slurm.slurm import _make_sbatch_string

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
        _make_sbatch_string(
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


def store(configs: list[DictConfig], folder: Path) -> None:
    """Write a submission's configs, and copy the code."""
    code = folder / "code"
    shutil.copytree(ROOT / "nemotron_sft", code / "nemotron_sft", ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (ROOT / "recipes").glob("*.py"):  # beside the package, so that this copy is what they import
        shutil.copy(recipe, code)
    if (ROOT / "data").exists():  # what is shipped with the repository
        (code / "data").symlink_to(ROOT / "data")
    (folder / "version.txt").write_text(version())
    (folder / "command.txt").write_text(shlex.join([sys.executable, *TYPED]) + "\n")
    for index, cfg in enumerate(configs):
        OmegaConf.save(cfg, folder / f"config-{index}.yaml")


def version() -> str:
    """The commit of the code and what differs from it, as `git` tells."""
    told = ""
    for command in ("rev-parse HEAD", "status --short -- nemotron_sft recipes"):
        try:
            git = subprocess.run(["git", "-C", ROOT, *command.split()], capture_output=True, text=True)
        except FileNotFoundError:
            return "unknown: git is not installed\n"
        told += git.stdout or git.stderr
    return told


@dataclass
class Task:
    """A job, or one element of an array, to be followed."""

    id: str
    label: str
    log: Path
    exit: Path
    quiet: bool
    read: int = 0  # bytes of the log that were shown
    status: int | None = None
    missing: int = field(default=0, repr=False)  # polls that did not find it in the queue


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


# --- following ---------------------------------------------------------------------------------------------

TICK, POLL = 0.5, 5.0  # seconds between looks at the files, and at the queue
OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


def follow(tasks: list[Task]) -> int:
    """Show the tasks' output until all have ended; the exit status of the first that failed, or 0.

    A job tells its end by its exit file. The queue is asked only to notice jobs that could not write one: cancelled
    before they started, or on a node that died.
    """
    asked, reason, done = time.monotonic() - POLL + 1, "", 0
    try:
        while open_tasks := [task for task in tasks if task.status is None]:
            for task in open_tasks:
                if not task.quiet:
                    show(task)
                if text := read(task.exit).strip():
                    task.status = int(text)
                    finish(task)
            if time.monotonic() - asked >= POLL:
                asked = time.monotonic()
                reason = ask(open_tasks, reason)
                quiet = [task for task in tasks if task.quiet]
                ended = sum(task.status is not None for task in quiet)
                if ended != done:
                    done = ended
                    print(f"{done} of {len(quiet)} shards done", flush=True)
            time.sleep(TICK)
    except KeyboardInterrupt:
        jobs = " ".join(sorted({task.id.split("_")[0] for task in tasks}))
        print(f"\nno longer following; the job goes on (scancel {jobs} ends it)", file=sys.stderr)
        return 130
    return next((task.status for task in tasks if task.status), 0)


def read(path: Path, start: int = 0) -> str:
    """The text of a file from byte `start` on; nothing if it does not exist (yet)."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def show(task: Task, everything: bool = False) -> None:
    """Print the whole lines that a task's log has gained; `everything`: also a last one without an end."""
    text = read(task.log, task.read)
    if not everything:
        text = text[: text.rfind("\n") + 1]
    task.read += len(text.encode())
    for line in text.splitlines():
        print(f"{task.label}{line}", flush=True)


def finish(task: Task) -> None:
    """Show the rest of a log; of a quiet task only if it failed, and then its end."""
    if not task.quiet:
        show(task, everything=True)
    elif task.status:
        print(f"{task.label} (job {task.id}) failed; {task.log} ends:")
        print("\n".join(read(task.log).splitlines()[-30:]), flush=True)


def ask(tasks: list[Task], reason: str) -> str:
    """Look the tasks up in the queue. Prints why one is waiting if that is news; returns it.

    A task that is twice not there, and has no exit file, has ended some other way.
    """
    ids = ",".join(sorted({task.id.split("_")[0] for task in tasks}))
    queue = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T %r", "-j", ids], capture_output=True, text=True)
    if queue.returncode and "Invalid job id" not in queue.stderr:
        return reason  # Slurm does not answer at the moment
    lines = [line.split(maxsplit=2) for line in queue.stdout.splitlines()]
    states = {line[0]: line[1:] for line in lines if line[1] not in OVER}
    for task in tasks:
        if task.id in states:
            task.missing = 0
            continue
        task.missing += 1
        if task.missing > 1 and task.status is None and not read(task.exit):
            task.status = 1
            finish(task)
            print(f"{task.label}job {task.id} ended as {final_state(task.id)}", flush=True)
    waiting = [state[1] for state in states.values() if state[0] == "PENDING" and state[1:] != ["Dependency"]]
    if waiting and waiting[0] not in (reason, "None"):
        print(f"waiting in the queue: {waiting[0]}", flush=True)
        return waiting[0]
    return reason


def final_state(job: str) -> str:
    """How Slurm says a job ended: CANCELLED, NODE_FAIL, ...; from its memory, or else from accounting."""
    for command in (["scontrol", "-o", "show", "job", job], ["sacct", "-n", "-X", "-P", "-o", "State", "-j", job]):
        try:
            told = subprocess.run(command, capture_output=True, text=True).stdout
        except FileNotFoundError:
            continue
        if found := re.search(r"JobState=(\S+)", told) or re.search(r"^([A-Z_]+)", told):
            return found[1]
    return "unknown to Slurm"
