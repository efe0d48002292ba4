"""The commands themselves on GPUs: resuming, the hybrid model, and the same losses on two GPUs as on one.

Skipped without CUDA, those for two GPUs on one; run on a GPU machine with: python -m pytest tests/gpu -q -s
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, TORCHRUN, losses

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
mamba = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")

TINY = [*SMALL, "model.num_query_groups=2", "optimizer.lr=1e-3", "tracking=disabled", "logger.log_interval=1"]
STEPS = ["train.train_iters=20", "validation.eval_interval=20"]
HYBRID = ["experiment=tiny_gpu", "tracking=disabled", "logger.log_interval=1"]


def start(run_dir, data, *overrides, ranks=1):
    """Start training; its output goes to files beside the run directory."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_suffix(".log").open("w")
    launcher = [sys.executable] if ranks == 1 else TORCHRUN
    return subprocess.Popen(
        [*launcher, "recipes/train.py", f"data={data}", f"run_dir={run_dir}", *overrides],
        cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True,
    )  # fmt: skip


def finish(run_dir, process, timeout=500):
    process.wait(timeout)
    assert process.returncode == 0, run_dir.with_suffix(".log").read_text()[-4000:]
    return losses(run_dir)


def largest_difference(some, others):
    assert some.keys() == others.keys()
    return max(abs(some[step] - others[step]) for step in some)


def test_killed_and_resumed_equals_a_straight_run(tiny_data, tmp_path):
    settings = [*TINY, "train.train_iters=60", "validation.eval_interval=100", "checkpoint.save_interval=20"]
    straight = start(tmp_path / "straight", tiny_data, *settings)
    killed = start(tmp_path / "killed", tiny_data, *settings)
    while max(losses(tmp_path / "killed"), default=0) < 30:
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()[-4000:]
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = losses(tmp_path / "killed")
    assert max(before) < 60
    (tmp_path / "killed" / "metrics.jsonl").unlink()
    resumed = finish(tmp_path / "killed", start(tmp_path / "killed", tiny_data, *settings))
    whole = finish(tmp_path / "straight", straight)
    worst = largest_difference(resumed, {step: whole[step] for step in resumed})
    print(f"\nkilled at step {max(before)}, resumed from {min(resumed) - 1}; largest difference of a loss {worst:.3g}")
    assert min(resumed) in (21, 41) and max(resumed) == 60
    assert worst < 1e-5


@mamba
def test_the_hybrid_learns(tiny_data, tmp_path):
    found = finish(tmp_path / "run", start(tmp_path / "run", tiny_data, *HYBRID, "train.train_iters=100"))
    print(f"\nhybrid: loss {found[1]:.3f} at step 1, {found[50]:.3f} at 50, {found[100]:.3f} at 100; ", end="")
    times = sorted(losses(tmp_path / "run", "step_ms").values())
    print(f"median step {times[len(times) // 2]:.0f} ms")
    assert found[100] < 0.5 * found[1]


SPLITS = {
    "DP": ["heldout.path=data/tiny/heldout.jsonl"],  # answering goes through the wrapped model
    "TP": ["model.tensor_model_parallel_size=2"],
    "TP+SP": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "CP": ["model.context_parallel_size=2"],
    "PP": ["model.pipeline_model_parallel_size=2", "train.packs_per_microbatch=1"],
}


@pytest.fixture(scope="module")
def split_runs(tiny_data, tmp_path_factory):
    """The losses of 20 steps, on one GPU and split in every way over two; all runs share the GPUs at one time."""
    root = tmp_path_factory.mktemp("splits")
    finish(root / "weights", start(root / "weights", tiny_data, *TINY, "train.train_iters=1"))
    begin = [*TINY, *STEPS, f"init_from={root}/weights/checkpoints"]
    running = {"alone": start(root / "alone", tiny_data, *begin)}
    running |= {name: start(root / name, tiny_data, *begin, *split, ranks=2) for name, split in SPLITS.items()}
    for process in running.values():
        process.wait(500)
    return root, running


@two_gpus
@pytest.mark.parametrize("split", SPLITS)
def test_two_gpus_have_the_losses_of_one(split, split_runs):
    root, running = split_runs
    alone, split_losses = (finish(root / name, running[name]) for name in ("alone", split))
    worst = largest_difference(alone, split_losses)
    print(f"\n{split}=2: loss {alone[1]:.4f} to {alone[20]:.4f}; largest difference {worst:.3g}")
    assert len(alone) == 20
    assert worst < 0.01  # bf16; 0.0023 was seen


@two_gpus
@mamba
def test_experts_of_the_hybrid_on_two_gpus(tiny_data, tmp_path):
    settings = [*HYBRID, "checkpoint.save_interval=100"]
    finish(tmp_path / "weights", start(tmp_path / "weights", tiny_data, *settings, "train.train_iters=1"))
    settings += [*STEPS, f"init_from={tmp_path}/weights/checkpoints"]
    alone = start(tmp_path / "alone", tiny_data, *settings)
    split = start(tmp_path / "split", tiny_data, *settings, "model.expert_model_parallel_size=2", ranks=2)
    one, two = finish(tmp_path / "alone", alone), finish(tmp_path / "split", split)
    worst = largest_difference(one, two)
    print(f"\nEP=2: loss {one[1]:.4f} to {one[20]:.4f}; largest difference {worst:.3g}")
    assert worst < 0.05
