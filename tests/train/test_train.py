"""The training command, end to end on the CPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, losses, recipe, run

pytestmark = pytest.mark.slow
STRAIGHT = ["train.train_iters=20", "validation.eval_interval=10"]


def train(data, run_dir, *overrides, **kwargs):
    done = recipe("train", f"data={data}", f"run_dir={run_dir}", *SMALL, *overrides, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory):
    """A run of 20 steps in one go."""
    run_dir = tmp_path_factory.mktemp("train") / "straight"
    done = train(tiny_data, run_dir, *STRAIGHT)
    return run_dir, done.stdout


def lines_of_steps(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_a_run_leaves_what_it_promises(straight):
    run_dir, shown = straight
    for name in ("config.yaml", "command.txt", "metrics.jsonl", "report.html", "megatron.yaml", "logs/rank0.log"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "checkpoints" / "iter_0000020").is_dir()
    assert sorted(losses(run_dir)) == list(range(1, 21))
    assert losses(run_dir)[20] < losses(run_dir)[1] - 2
    validation = losses(run_dir, "validation_loss")
    assert set(validation) >= {10, 20} and validation[20] < validation[10]
    assert "100%  step 20/20" in shown and "validation loss" in shown
    assert not re.search(r"INFO:|WARNING|megatron\.core", shown)  # Megatron's noise is in the log


def test_a_finished_run_finishes_what_is_missing_and_goes_on_if_asked(tiny_data, straight, tmp_path):
    """As after a kill between the last save and the summary."""
    shutil.copytree(straight[0], tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(line for line in lines if "test_loss" not in line) + '{"ste')
    for name in ("report.html", "lineage.json"):
        (tmp_path / "run" / name).unlink()
    shown = train(tiny_data, tmp_path / "run", *STRAIGHT, "export.hf=true")
    assert "training loss" in shown.stdout and (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/hf/config.json").exists()
    for key in ("loss", "validation_loss", "test_loss"):
        assert losses(tmp_path / "run", key) == losses(straight[0], key)
    record = json.loads((tmp_path / "run/lineage.json").read_text())
    assert {"iter-20", "best"} <= set(record["outputs"][-1]["aliases"])
    train(tiny_data, tmp_path / "run", "train.train_iters=22")
    assert sorted(losses(tmp_path / "run")) == list(range(1, 23))


def test_killed_while_saving_the_run_resumes_from_the_last_whole_checkpoint(tiny_data, straight, tmp_path):
    options = [*STRAIGHT, "checkpoint.save_interval=5"]
    process = subprocess.Popen(
        [sys.executable, "recipes/train.py", f"data={tiny_data}", f"run_dir={tmp_path}/run", *SMALL, *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    second = tmp_path / "run" / "checkpoints" / "iter_0000010"
    deadline = time.time() + 240
    while not second.exists():  # being written from this moment on
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(tiny_data, tmp_path / "run", *options)
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), abs=1e-5)


def test_stopped_it_goes_on_from_the_last_checkpoint_that_is_whole(tiny_data, straight, tmp_path):
    train(tiny_data, tmp_path / "run", *STRAIGHT, "checkpoint.save_interval=5", "train.exit_interval=15")
    stopped = lines_of_steps(tmp_path / "run")
    assert len(stopped) == 15
    saved = tmp_path / "run" / "checkpoints"
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "15"
    (saved / "iter_0000015" / "run_config.yaml").unlink()  # killed just before it was written
    train(tiny_data, tmp_path / "run", *STRAIGHT, "checkpoint.save_interval=5")
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), abs=1e-5)
    lines = lines_of_steps(tmp_path / "run")
    assert len(lines) == 20 and lines[:10] == stopped[:10]
    assert all(line not in stopped for line in lines[10:])  # trained again: "seconds" differs


def test_unwritable_run_directory_is_one_line(tiny_data):
    done = recipe("train", f"data={tiny_data}", "run_dir=/proc/nowhere", *SMALL)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB: less than a checkpoint."""
    if run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield tmp_path
    run("umount", "--lazy", tmp_path)  # W&B's own process may still be ending


def test_full_disk_is_one_line_and_leaves_no_checkpoint_that_looks_whole(tiny_data, small_disk):
    done = recipe("train", f"data={tiny_data}", f"run_dir={small_disk}/run", *SMALL, "train.train_iters=2")
    assert done.returncode == 2 and "is full" in done.stderr.strip().splitlines()[-1], done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stdout
    assert not (small_disk / "run/checkpoints/latest_checkpointed_iteration.txt").exists()
