"""Jobs on a real Slurm, with fake nodes on this host (up.sh); skipped where that cannot start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, TORCHRUN

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running cluster, which the environment points to."""
    root = tmp_path_factory.mktemp("slurm")
    os.environ["SLURM_TEST_ROOT"] = str(root)
    with (root.parent / "up.log").open("w+") as log:  # the daemons would keep a pipe open
        started = subprocess.run([HERE / "up.sh"], stdout=log, stderr=log, timeout=60)
        log.seek(0)
        told = log.read()
    if started.returncode:
        subprocess.run([HERE / "down.sh"])
        pytest.skip(f"no Slurm here: {told.strip()}")
    os.environ["SLURM_CONF"] = re.search(r"export SLURM_CONF=(\S+)", told)[1]
    yield
    subprocess.run([HERE / "down.sh"], timeout=120)
    del os.environ["SLURM_CONF"], os.environ["SLURM_TEST_ROOT"]


class Checkout:
    """A copy of the repository that a test may edit, and commands run in it."""

    def __init__(self, path, home):
        for name in ("conf", "hydra_plugins", "nemotron_sft", "recipes"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        (path / "data").symlink_to(ROOT / "data")
        self.path = path
        self.env = os.environ | {"PYTHONPATH": str(path), "HOME": str(home)}

    def command(self, recipe, *overrides):
        fixed = ["-m", "cluster=slurm", "cluster.environment.MASTER_ADDR=127.0.0.1"]
        return [sys.executable, f"recipes/{recipe}.py", *fixed, *(str(o) for o in overrides)]

    def run(self, recipe, *overrides, timeout=300):
        return subprocess.run(
            self.command(recipe, *overrides),
            cwd=self.path, env=self.env, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def start(self, recipe, *overrides):
        """The same, to be watched while it runs; the process and the job id."""
        process = subprocess.Popen(
            self.command(recipe, *overrides),
            cwd=self.path, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return process, re.match(r"Submitted job (\d+)", process.stdout.readline())[1]

    def submit(self, recipe, *overrides):
        """Submit detached; the job id and the submission's folder."""
        done = self.run(recipe, "cluster.wait=false", *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        job, folder = re.search(r"Submitted job (\d+) .* in (\S+)", done.stdout).groups()
        return job, Path(folder)


@pytest.fixture
def checkout(slurm, tmp_path):
    """A checkout for real runs."""
    (tmp_path / "home").mkdir()
    return Checkout(tmp_path / "checkout", tmp_path / "home")


@pytest.fixture
def stub(checkout):
    """A checkout whose train.py is stub.py: two ranks, no Megatron."""
    shutil.copy(HERE / "stub.py", checkout.path / "recipes" / "train.py")
    return checkout


STUB = ["data=none", "cluster.tasks_per_node=2"]


def until(condition, seconds=300):
    """Wait for a true value of `condition()`, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"still not after {seconds} s")


def show(job):
    """Slurm's fields of a job, or of the elements of an array."""
    told = subprocess.run(["scontrol", "-o", "show", "job", str(job)], capture_output=True, text=True).stdout
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in told.splitlines()]


def state(job):
    return show(job)[0]["JobState"]


def ended(job):
    states = [fields["JobState"] for fields in show(job)]
    return states if all(s in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for s in states) else None


def submitted(shown):
    return re.search(r"Submitted job (\d+)", shown)[1]


def queue():
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout


def test_another_slurm_on_this_machine_has_jobs_of_its_own(slurm, tmp_path):
    """As where two clones run these tests at one time; and the end of one is not the end of both."""
    other = os.environ | {"SLURM_TEST_ROOT": str(tmp_path), "SLURM_CONF": f"{tmp_path}/etc/slurm.conf", "NODES": "1"}
    held = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]
    job = subprocess.run(held, capture_output=True, text=True, check=True).stdout.strip()
    try:
        assert subprocess.run([HERE / "up.sh"], env=other, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
        seen = subprocess.run(["squeue", "-h"], env=other, capture_output=True, text=True, check=True)
        assert not seen.stdout and job in queue()
    finally:
        subprocess.run([HERE / "down.sh"], env=other, timeout=120)
    subprocess.run(["scancel", job], check=True)
    assert until(lambda: ended(job)) == ["CANCELLED"]


# --- submitting --------------------------------------------------------------------------------------------


def test_attached(stub):
    done = stub.run("train", *STUB, "name=ok")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks [0, 1] lr 0.0" in done.stdout and "step 0" in done.stdout


def test_two_nodes(stub):
    done = stub.run("train", "data=none", "cluster.nodes=2", "name=ok")
    assert done.returncode == 0 and "ranks [0, 1]" in done.stdout, done.stdout + done.stderr


def test_detached(stub):
    job, folder = stub.submit("train", *STUB, "name=ok")
    assert state(job) in ("PENDING", "RUNNING")
    assert until(lambda: ended(job)) == ["COMPLETED"]
    assert (folder / f"{job}.exit").read_text() == "0\n"
    assert "ranks [0, 1]" in (folder / f"{job}_0_log.out").read_text()


def test_dry_run_touches_nothing(stub, tiny_data):
    def seen():  # byte code apart
        return sorted(p for p in stub.path.rglob("*") if "__pycache__" not in p.parts), queue()

    before = seen()
    options = [f"data={tiny_data}", "cluster.nodes=2", "cluster.tasks_per_node=2", "optimizer.lr=1e-5",
               "train.global_batch_size=16"]  # fmt: skip
    done = stub.run("train", *options, "cluster.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --ntasks-per-node=2" in done.stdout and "lr: 1.0e-05" in done.stdout
    assert "processes        4 = 4 data x 1 tensor" in done.stdout and "memory per GPU" in done.stdout
    assert seen() == before


def test_a_sweep_is_one_array_with_one_group(stub):
    job, folder = stub.submit("train", *STUB, "name=ok", "optimizer.lr=1e-5,2e-5", "cluster.array_parallelism=1")
    assert until(lambda: ended(job)) == ["COMPLETED"] * 2
    logs = [(folder / f"{job}_{i}_0_log.out").read_text() for i in range(2)]
    assert "lr 1e-05" in logs[0] and "lr 2e-05" in logs[1]
    assert {re.search(r"group (\S+)", log)[1] for log in logs} == {folder.name}
    assert {p.name for p in (stub.path / "output/train").iterdir()} == {f"{folder.name}-0", f"{folder.name}-1"}


def test_later_edits_do_not_reach_a_queued_job(stub):
    job, folder = stub.submit("train", *STUB, "name=ok", "cluster.sbatch_args={hold: true}")
    for path in stub.path.glob("conf/**/*.yaml"):
        path.write_text(re.sub(r"\blr: \S+", "lr: 7e-7", path.read_text()))
    for path in [*stub.path.glob("nemotron_sft/*.py"), *stub.path.glob("recipes/*.py")]:
        path.write_text("raise SystemExit('edited')\n")
    subprocess.run(["scontrol", "release", job], check=True)
    assert until(lambda: ended(job)) == ["COMPLETED"]
    log = (folder / f"{job}_0_log.out").read_text()
    assert "ranks [0, 1] lr 0.0" in log and "7e-07" not in log


def test_sbatch_refuses(stub):
    done = stub.run("train", *STUB, "cluster.partition=nowhere")
    assert done.returncode == 2
    assert re.fullmatch(r"error: sbatch refuses \S+: .*invalid partition.*\n", done.stderr)


def test_login_process_stays_light(stub):
    """Neither torch nor Megatron is imported to submit."""
    (stub.path / "sitecustomize.py").write_text(
        "import atexit, sys, pathlib\n"
        "atexit.register(lambda: pathlib.Path('modules.txt').write_text('\\n'.join(sys.modules)))\n"
    )
    before = stub.submit("train", *STUB, "name=ok", "cluster.sbatch_args={hold: true}")
    modules = {name.split(".")[0] for name in (stub.path / "modules.txt").read_text().split()}
    subprocess.run(["scancel", before[0]], check=True)
    assert "hydra" in modules and not modules & {"torch", "megatron", "transformers", "numba", "pyarrow"}


# --- failing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_raise_in_one_rank(stub, rank):
    done = stub.run("train", *STUB, f"name=raise{rank}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"rank {rank} on {os.uname().nodename} failed:" in done.stdout
    assert f"ValueError: rank {rank} is broken" in done.stdout
    assert done.stdout.count("Traceback") == 1  # the guilty rank's, and not what the other made of it
    assert until(lambda: ended(submitted(done.stdout))) == ["FAILED"]


def test_a_raise_that_the_other_rank_does_not_notice(stub):
    """srun ends the other rank, whose SIGTERM is not the failure."""
    done = stub.run("train", *STUB, "name=raise_alone")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ValueError: rank 0 is broken" in done.stdout and "killed by signal" not in done.stdout
    assert until(lambda: ended(submitted(done.stdout))) == ["FAILED"]


def test_a_users_error(stub):
    done = stub.run("train", *STUB, "name=user_error")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: the data is missing: prepare it" in done.stdout and "Traceback" not in done.stdout
    assert until(lambda: ended(submitted(done.stdout))) == ["FAILED"]


def test_kill_9(stub):
    following, job = stub.start("train", *STUB, "name=wait", f"run_dir={stub.path}/run")
    pid = until(lambda: (p := stub.path / "run/pid1").exists() and p.read_text())
    time.sleep(1)
    os.kill(int(pid), signal.SIGKILL)
    shown, _ = following.communicate(timeout=300)
    assert following.returncode == 137
    assert "task 1: Killed" in shown and "error: a task was killed by signal 9" in shown
    assert until(lambda: ended(job)) == ["FAILED"]


def test_scancel_while_following(stub):
    following, job = stub.start("train", *STUB, "name=wait", f"run_dir={stub.path}/run")
    until(lambda: (stub.path / "run/pid1").exists())
    subprocess.run(["scancel", job], check=True)
    shown, _ = following.communicate(timeout=300)
    assert following.returncode == 143, shown
    assert until(lambda: ended(job)) == ["CANCELLED"]


def test_cancelled_before_it_starts(stub):
    following, job = stub.start("train", *STUB, "name=ok", "cluster.sbatch_args={hold: true}")
    subprocess.run(["scancel", job], check=True)
    shown, _ = following.communicate(timeout=300)
    assert following.returncode == 1 and f"job {job} ended as CANCELLED" in shown


# --- stopping early ----------------------------------------------------------------------------------------


def test_requeued_up_to_the_limit(stub):
    """A signal ahead of the time limit queues the job again, max_requeues times."""
    following, job = stub.start("train", *STUB, "name=wait", f"run_dir={stub.path}/run", "cluster.max_requeues=1")
    pids = set()
    for _ in range(2):
        pids.add(until(lambda: (p := stub.path / "run/pid0").exists() and (t := p.read_text()) not in pids and t))
        time.sleep(1)
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
    shown, _ = following.communicate(timeout=300)
    assert following.returncode == 143, shown
    assert "queued again (1 of 1 times)" in shown and "stopped early, after 1 times" in shown
    assert until(lambda: ended(job)) == ["FAILED"]


def test_preemption_requeues(stub):
    """SIGTERM by a job that goes first: queued again, and started when there is room."""
    job, folder = stub.submit("train", *STUB, "name=wait", f"run_dir={stub.path}/run", "cluster.exclusive=true")
    first = until(lambda: (p := stub.path / "run/pid0").exists() and p.read_text())
    subprocess.run(["srun", "-p", "urgent", "-N2", "--exclusive", "sleep", "1"], check=True, timeout=90)
    until(lambda: (stub.path / "run/pid0").read_text() != first, seconds=300)
    # A later end must not pass for this preemption.
    assert show(job)[0]["Restarts"] == "1" and show(job)[0]["PreemptTime"] == "None"
    subprocess.run(["scancel", job], check=True)
    assert "queued again" in (folder / f"{job}_0_log.out").read_text()


# --- training ----------------------------------------------------------------------------------------------


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def stop_midway(job, run_dir, *scancel):
    until(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= 3, seconds=240)
    subprocess.run(["scancel", *scancel, job], check=True)


def test_training_goes_on_after_a_signal_and_after_scancel(checkout, tiny_data):
    """SIGUSR2 saves, requeues and resumes by itself; after scancel the same command with run_dir=... resumes."""
    run_dir = checkout.path / "run"
    options = [f"data={tiny_data}", f"run_dir={run_dir}", *SMALL, "train.train_iters=300", "cluster.tasks_per_node=2"]
    job, folder = checkout.submit("train", *options)
    stop_midway(job, run_dir, "--signal=USR2")
    log = folder / f"{job}_0_log.out"
    until(lambda: "queued again (1 of 3 times)" in log.read_text())
    assert "told to stop: saved a checkpoint" in log.read_text()
    saved = int((run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 300
    until(lambda: losses(run_dir)[-1][0] >= saved + 3, seconds=240)
    steps = [step for step, _ in losses(run_dir)]
    assert steps == list(range(1, len(steps) + 1))  # no step twice, none left out

    stop_midway(job, run_dir)
    assert until(lambda: ended(job)) == ["CANCELLED"]
    saved = int((run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved == len(losses(run_dir))  # scancel, too, leaves time to save

    done = checkout.run("train", *options[:-2], f"train.train_iters={saved + 3}", options[-1], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [step for step, _ in losses(run_dir)]
    assert steps == list(range(1, saved + 4))

    # Two ranks under torchrun have the same losses and leave the same files.
    done = subprocess.run(
        [*TORCHRUN, "recipes/train.py", *options[:-1], f"run_dir={checkout.path}/other", "train.exit_interval=3"],
        cwd=checkout.path, env=checkout.env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(checkout.path / "other")) == 3
    assert losses(run_dir)[:3] == losses(checkout.path / "other")
    names = [sorted(p.name for p in run.iterdir()) for run in (run_dir, checkout.path / "other")]
    assert names[0] == names[1] and {"logs", "checkpoints", "metrics.jsonl", "config.yaml"} <= set(names[0])


# --- preparation -------------------------------------------------------------------------------------------


def test_prep_as_an_array_is_byte_identical(checkout, tmp_path):
    lines = (ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)[:800]
    for i in range(5):
        (tmp_path / f"part{i}.jsonl").write_text("".join(lines[i::5]))
    datasets = [{"name": f"part{i}", "path": f"{tmp_path}/part{i}.jsonl"} for i in range(5)]
    (tmp_path / "mix.json").write_text(json.dumps({"datasets": datasets}))
    options = ["blend=file", f"blend.path={tmp_path}/mix.json", "pack_size=512"]
    # The first attempt of one shard is lost, as if somebody had killed it.
    lose = 'srun() { if [ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" = 1 ]; then return 137; fi; command srun "$@"; }'
    done = checkout.run(
        "prep", *options, "prep.shards=3", f"output_dir={tmp_path}/array", f"cluster.setup=['{lose}']", timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 shards done" in done.stdout and "Wrote" in done.stdout
    array = re.search(r"job (\d+) \(shards.sh\)", done.stdout)[1]
    assert sorted(fields["Restarts"] for fields in show(array)) == ["0", "0", "1"]

    one = subprocess.run(
        [sys.executable, "recipes/prep.py", *options, f"output_dir={tmp_path}/one"],
        cwd=checkout.path, env=checkout.env, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    for name in ("training.npy", "validation.npy", "test.npy"):
        assert (tmp_path / "array" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert len(np.load(tmp_path / "one/training.npy", mmap_mode="r")) > 10


def test_a_bad_record_fails_the_whole_preparation(checkout, tmp_path):
    (tmp_path / "bad.jsonl").write_text("this is not JSON\n")
    options = ["blend=file", f"blend.path={tmp_path}/mix.json", "blend.name=bad", "prep.shards=2"]
    (tmp_path / "mix.json").write_text(json.dumps({"datasets": [{"name": "bad", "path": f"{tmp_path}/bad.jsonl"}]}))
    done = checkout.run("prep", *options, f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and "bad.jsonl" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "out/metadata.json").exists()
    until(lambda: not queue())
