"""Jobs without a Slurm: the scripts, what is refused, and a thousand units whose tasks keep failing."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, composed, recipe, run

from nemotron_sft import config
from nemotron_sft.data import packed, prep, units
from nemotron_sft.data import plan as plans
from nemotron_sft.errors import UserError
from nemotron_sft.paths import CONF
from nemotron_sft.slurm import node, script, submit

GOLDEN = ROOT / "tests/vectors/slurm"


# --- scripts -----------------------------------------------------------------------------------------------

PYXIS = [
    "cluster.account=nlp",
    "cluster.partition=batch",
    "cluster.nodes=2",
    "cluster.gpus_per_node=8",
    "cluster.cpus_per_task=16",
    'cluster.mem="0"',
    "cluster.time=4:00:00",
    "cluster.exclusive=true",
    "cluster.container.image='nvcr.io#nvidia/nemo:25.11'",
    "cluster.container.mounts=[/lustre/data:/data]",
    "cluster.environment.NCCL_DEBUG=WARN",
    "cluster.srun_args=['--mpi=pmix']",
    "cluster.sbatch_args={mail-user: me@example.org}",
]
BARE = [
    "cluster.partition=gpu",
    "cluster.gpus_per_node=4",
    "cluster.cpus_per_task=8",
    "cluster.mem=200G",
    "cluster.time=1-00:00:00",
    "cluster.python=/shared/venv/bin/python",
    "cluster.setup=[module load cuda/12.8]",
    "cluster.signal_lead=300",
    "cluster.max_requeues=10",
]


@pytest.mark.parametrize(
    ("name", "app_name", "overrides", "array"),
    [("pyxis", "train", PYXIS, None), ("bare", "train", BARE, None), ("shards", "prep", [*BARE, "shards=64"], 64)],
)
def test_golden_scripts(name, app_name, overrides, array):
    """tests/vectors/slurm holds what sbatch gets; a difference is either an accident or to be read and copied there."""
    slurm = submit.settings(composed(app_name, "cluster=slurm", *overrides).cluster)
    folder = Path("/shared/project/output/slurm/nano3-20260101-120000")
    arguments = "shard=$SLURM_ARRAY_TASK_ID" if array else ""
    config_file = "config-0.yaml" if array else "config-${SLURM_ARRAY_TASK_ID:-0}.yaml"
    text = script.script(app_name, slurm, folder, config_file, arguments, array=array)
    text = text.replace(str(Path.cwd()), "/shared/project")
    assert text == (GOLDEN / f"{name}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_values_reach_the_shell_as_they_are(tmp_path):
    """Variables and the folder's name are quoted, lines of setup are not."""
    slurm = submit.settings(composed("train", "cluster=slurm").cluster)
    slurm.environment = {"ODD": "it's $HOME; {{ not jinja }}", "NUMBER": 7}
    slurm.setup = ["LATER=${NUMBER}1"]
    folder = tmp_path / "a b" / "it's"
    before, after = script.around_tasks(slurm, folder, retry_lost=True)
    shown = ["scontrol() { :; }", *before, 'printf "%s\\n" "$ODD" "$LATER" "$job"']
    done = subprocess.run(["bash", "-c", "\n".join(shown)], capture_output=True, text=True, env={"SLURM_JOB_ID": "5"})
    assert done.stdout.splitlines() == ["it's $HOME; {{ not jinja }}", "71", f"{folder}/5"], done.stderr
    assert after[0] == "status=$?"


def test_a_submission_holds_the_job_template(tmp_path):
    submit.store([], tmp_path)
    assert (tmp_path / "code/nemotron_sft/slurm/job.sh.jinja").read_text() == script.TEMPLATE.read_text()


def test_a_submission_holds_every_file_that_the_code_reads(tmp_path):
    """What the working tree holds beside the tests: a copy without a model's config.json asked the hub for it."""
    submit.store([], tmp_path)
    copied = subprocess.run(
        ["git", "ls-files", "conf", "nemotron_sft", "data"], cwd=ROOT, capture_output=True, text=True
    )
    assert len(names := copied.stdout.split()) > 100
    assert [name for name in names if not (tmp_path / "code" / name).is_file()] == []


def test_srun_is_told_the_cpus():
    slurm = submit.settings(composed("train", "cluster=slurm", "cluster.cpus_per_task=3").cluster)
    text = script.script("train", slurm, Path("/f"), "config-0.yaml")
    assert re.search(r"^srun .*--cpus-per-task=3 ", text, re.MULTILINE)


def test_paths_with_spaces_survive(tmp_path):
    """The script's own shell finds everything below a folder with a space in its name."""
    slurm = submit.settings(composed("train", "cluster=slurm", f"cluster.python={sys.executable}").cluster)
    folder = tmp_path / "a folder"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "train.py").write_text("import sys; print(sys.argv[1:])")
    text = script.script("train", slurm, folder, "config-${SLURM_ARRAY_TASK_ID:-0}.yaml")
    fake = 'scontrol() { echo n1; }; srun() { shift $(($# - 7)); "$@"; }; SLURM_JOB_ID=7\n'
    done = subprocess.run(["bash", "-c", fake + text], capture_output=True, text=True)
    assert done.stdout.strip() == str(["--frozen", f"{folder}/config-0.yaml", "--job", f"{folder}/7"]), done.stderr
    assert (folder / "7.exit").read_text() == "0\n"


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_an_experiment_starts_on_this_machine_too(experiment):
    """It says what it needs of a cluster, which is only refused here where it was typed."""
    submit.here(composed("train", f"experiment={experiment}").cluster)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=slurm"], "cluster=slurm submits jobs, which takes -m: python recipes/train.py -m cluster=slurm"),
        (["cluster.wait=false"], "cluster.wait means nothing on this machine"),
        (["-m", "cluster=slurm", "cluster.wiat=false"], "unknown key cluster.wiat: did you mean cluster.wait?"),
        (["-m", "cluster=slurm", "cluster.time=240"], "write hours:minutes:seconds in quotes"),
        (["-m", "cluster=slurm", "cluster.nodes=0"], "cluster.nodes must be at least 1, not 0"),
        (["-m", "cluster=slurm", "cluster.nodes=1,2"], "a sweep over cluster settings"),
        (
            ["-m", "cluster=slurm", "optimizer.learning_rate=1"],
            "unknown key optimizer.learning_rate: did you mean optimizer.lr?",
        ),
        (["-m", "cluster=slurm", "optimizer.lr=1e-5,2e-5", "run_dir=x"], "run_dir=x would belong to every job"),
        (["-m", "cluster=slrum"], "no cluster named slrum: did you mean cluster=slurm?"),
    ],
)
def test_refused_with_one_line(arguments, message):
    done = recipe("train", *arguments, "data=none")
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["train", "prep"])
def test_a_submission_needs_neither_torch_nor_megatron(name, tmp_path):
    """From a login node without them, with an sbatch that says yes to everything."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules.update(torch=None, megatron=None)")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 4711\n")
    sbatch.chmod(0o755)
    options = ["-m", "cluster=slurm", "cluster.wait=false", f"cluster.folder={tmp_path}/jobs"]
    options += ["data=/nowhere", "optimizer.lr=1e-5", "train.manual_gc=true"] if name == "train" else []
    command = [sys.executable, "-X", "importtime", f"recipes/{name}.py", *options]
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = run(*command, **here)
    assert done.returncode == 0 and "Submitted job 4711" in done.stdout, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(told) == (1 if name == "train" else 0) and all("Megatron-Bridge is not installed" in t for t in told)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "submitit" in imported
    assert not imported & {"torch", "megatron", "transformers", "wandb", "pyarrow", "numba"}
    (typed,) = tmp_path.glob("jobs/*/command.txt")
    assert typed.read_text() == shlex.join([sys.executable, f"recipes/{name}.py", *options]) + "\n"


def test_a_sweep_on_this_machine_records_each_command_as_it_could_be_typed(monkeypatch):
    started = []

    def fake(command):
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(submit.subprocess, "run", fake)
    assert submit.run_here([["++optimizer.lr=1e-5", "seed=1"], ["++optimizer.lr=2e-5", "seed=1"]]) == 0
    assert [command[2:] for command in started] == [[f"optimizer.lr={lr}", "seed=1"] for lr in ("1e-5", "2e-5")]


def test_no_sbatch(tmp_path):
    done = recipe("train", "-m", "cluster=slurm", "data=none", f"cluster.folder={tmp_path}", PATH=tmp_path)
    assert done.returncode == 2 and "sbatch is not installed here" in done.stderr


def test_settings_of_ones_own(tmp_path):
    own = tmp_path / ".config/nemotron-sft/cluster/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [slurm]\naccount: my-project\ntime: '4:00:00'\n")
    done = recipe("train", "-m", "cluster=mine", "data=none", "cluster.dry_run=true", HOME=tmp_path)
    assert "#SBATCH --account=my-project" in done.stdout and "#SBATCH --time=4:00:00" in done.stdout, done.stderr
    done = recipe("train", "cluster=mine", "data=none", HOME=tmp_path)
    assert "cluster=mine submits jobs, which takes -m" in done.stderr


def test_every_key_is_explained():
    text = (ROOT / "conf/cluster/slurm.yaml").read_text()
    fields = script.Slurm.__dataclass_fields__.keys() | script.Container.__dataclass_fields__.keys()
    assert set(re.findall(r"^ *(\w+):", text, re.MULTILINE)) == fields


# --- on the node -------------------------------------------------------------------------------------------


def test_the_first_failure_is_kept(tmp_path):
    """Of several processes that fail, the first names itself; each leaves its traceback."""
    code = (
        "import sys; from nemotron_sft.slurm import node\n"
        "node.failed(sys.argv[1], int(sys.argv[2]), f'rank {sys.argv[2]}: boom\\n', 1)"
    )
    for rank in (1, 0, 2):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "9", str(rank)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 1
        assert ("failed too" in done.stdout) == (rank != 1)
    assert (tmp_path / "9_failure.txt").read_text() == "rank 1: boom\n"
    assert len(list(tmp_path.glob("9_*_traceback.txt"))) == 3


def test_distributed_environment_comes_from_slurm(monkeypatch):
    for key, value in {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(key, value)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(key, "of an enclosing job")
    assert node.set_up_distributed() == 9
    assert [node.os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "16", "1"]


# --- shards ------------------------------------------------------------------------------------------------


def prepared(output, *overrides):
    data = ["blend=tiny", f"output_dir={output}", "workers=1"]
    return config.check(composed("prep", *data, *overrides), config.Prep)


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_is_none(tmp_path, shard):
    with pytest.raises(UserError, match=r"is not one of the 3 shards: take 0 \.\. 2"):
        prep.run_shard(prepared(tmp_path, "shards=3", f"shard={shard}"))


@pytest.mark.slow
def test_a_thousand_units_with_failing_tasks(tmp_path, monkeypatch):
    """Every unit fails with 1 %, before or after its file is committed, and a lost shard is sent again: nothing is
    lost, nothing is there twice, and the output is that of a run without failures."""
    size = (ROOT / "data/tiny/train.jsonl").stat().st_size
    monkeypatch.setattr(plans, "UNIT_BYTES", size // 1100)
    straight = prep.run(prepared(tmp_path / "straight"))

    dice, real, committed, lost = random.Random(0), units.run_unit, [], 0

    def fragile(todo, unit):
        fate = dice.random()
        if fate < 0.005:
            todo.spool(unit).with_suffix(".dead.tmp").write_bytes(b"half a")
            raise OSError("node lost")
        existed = todo.spool(unit).exists()
        stats = real(todo, unit)
        if not existed:
            committed.append(unit.key)
        if fate < 0.01:
            raise OSError("node lost")
        return stats

    monkeypatch.setattr(prep, "run_unit", fragile)
    plan = plans.plan(prepared(tmp_path / "array"))
    monkeypatch.setattr(plans, "plan", lambda cfg, inputs=None: plan)  # the same in every task; made and
    monkeypatch.setattr(prep, "trusted", lambda todo, pool: todo)  # checked once to save time
    assert len(plan.units) >= 1000
    waiting = list(range(64))
    while waiting:
        shard = waiting.pop(dice.randrange(len(waiting)))
        try:
            prep.run_shard(prepared(tmp_path / "array", "shards=64", f"shard={shard}"))
        except OSError:
            lost += 1
            waiting.append(shard)
    assert lost >= 5
    assert sorted(committed) == sorted(unit.key for unit in plan.units)
    metadata = prep.run(prepared(tmp_path / "array", "shards=64"))
    assert [metadata["splits"][s]["sha256"] for s in packed.SPLITS] == [
        straight["splits"][s]["sha256"] for s in packed.SPLITS
    ]
