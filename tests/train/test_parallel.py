"""Two CPU ranks (gloo): every split of the model and the data gives the losses of one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, TORCHRUN, losses, run

pytestmark = pytest.mark.slow
STEPS = ["train.train_iters=20", "validation.eval_interval=20", "model.num_query_groups=2"]


def train(ranks, data, run_dir, *overrides):
    arguments = [f"data={data}", f"run_dir={run_dir}", *SMALL, *STEPS, *overrides]
    launcher = {1: [sys.executable], 2: TORCHRUN}[ranks]
    done = run(*launcher, "recipes/train.py", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return losses(run_dir)


@pytest.fixture(scope="module")
def weights(tiny_data, tmp_path_factory):
    """A checkpoint to start from: random weights are drawn in another order when the model is split."""
    run_dir = tmp_path_factory.mktemp("weights") / "run"
    train(1, tiny_data, run_dir, "train.train_iters=1")
    return f"init_from={run_dir}/checkpoints"


@pytest.fixture(scope="module")
def alone(tiny_data, weights, tmp_path_factory):
    return train(1, tiny_data, tmp_path_factory.mktemp("alone") / "run", weights)


SPLITS = {
    "DP": [],
    "TP": ["model.tensor_model_parallel_size=2"],
    "PP": ["model.pipeline_model_parallel_size=2"],
    "CP": ["model.context_parallel_size=2"],
}


@pytest.mark.parametrize("split", SPLITS)
def test_split_run_has_the_losses_of_one_process(split, tiny_data, weights, alone, tmp_path):
    split_losses = train(2, tiny_data, tmp_path / "run", weights, *SPLITS[split])
    assert len(split_losses) == 20
    assert split_losses == pytest.approx(alone, abs=1e-4)
    if split != "TP":
        return
    # What two tensor-parallel ranks saved, one rank and two data-parallel ranks continue alike.
    saved = f"init_from={tmp_path}/run/checkpoints"
    one = train(1, tiny_data, tmp_path / "one", saved, "train.train_iters=3")
    two = train(2, tiny_data, tmp_path / "two", saved, "train.train_iters=3")
    assert one == pytest.approx(two, abs=1e-4)
    assert one[1] < alone[1] - 2


def test_experts_spread_over_two_ranks(tiny_data, tmp_path):
    experts = ["model.num_moe_experts=4", "model.moe_router_topk=2", "train.train_iters=5"]
    train(1, tiny_data, tmp_path / "weights", *experts, "train.train_iters=1")
    start = f"init_from={tmp_path}/weights/checkpoints"
    one = train(1, tiny_data, tmp_path / "one", start, *experts)
    two = train(2, tiny_data, tmp_path / "two", start, *experts, "model.expert_model_parallel_size=2")
    assert len(one) == 5 and one == pytest.approx(two, abs=1e-4)


def test_a_killed_rank_ends_the_run_and_is_named(tiny_data, tmp_path):
    process = subprocess.Popen(
        [*TORCHRUN, "recipes/train.py", f"data={tiny_data}", f"run_dir={tmp_path}/run", *SMALL,
         "train.train_iters=5000"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not losses(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = (pid for pid in ranks if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: {victim})" in told, told
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.tensor_model_parallel_size=4", "model.num_attention_heads=4"], "start a multiple of 4"),
    ],
)
def test_what_cannot_run_here_is_refused_in_one_line(overrides, message, tiny_data, tmp_path):
    arguments = [f"data={tiny_data}", f"run_dir={tmp_path}/run", *SMALL, *overrides]
    done = run(*TORCHRUN, "recipes/train.py", *arguments, timeout=120)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told and all(message in line for line in told)
