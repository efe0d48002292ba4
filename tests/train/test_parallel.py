"""Two CPU ranks (gloo): every split of the model and the data gives the losses of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, TORCHRUN, losses, run

from nemotron_sft.data import packed

pytestmark = pytest.mark.slow
STEPS = ["train.train_iters=10", "validation.eval_interval=10", "model.num_query_groups=2"]


def train(ranks, data, run_dir, *overrides, script="recipes/train.py"):
    arguments = [f"data={data}", f"run_dir={run_dir}", *SMALL, *STEPS, *overrides]
    launcher = {1: [sys.executable], 2: TORCHRUN}[ranks]
    done = run(*launcher, script, *arguments, PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return losses(run_dir)


@pytest.fixture(scope="module")
def tiny_data(tiny_data, tmp_path_factory):
    """The tiny data as if of three datasets, so that losses by dataset differ."""
    directory = shutil.copytree(tiny_data, tmp_path_factory.mktemp("data") / "three")
    metadata = packed.read_metadata(directory)
    metadata["blend"]["datasets"] = [metadata["blend"]["datasets"][0] | {"name": name} for name in "abc"]
    for split in metadata["splits"].values():
        packs = np.load(directory / split["file"], mmap_mode="r+")
        packs["source"] = np.arange(packs["source"].size).reshape(packs["source"].shape) % 3
        packs.flush()
    packed.write_metadata(directory, metadata)
    return directory


def by_dataset(run_dir):
    """Of training lines and the validation: {step: {dataset: (loss, tokens)}}, which have to give the line's loss."""
    found = {}
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        loss, tokens = ("loss", "trained_tokens") if "loss" in line else ("validation_loss", "validation_tokens")
        if loss in line:
            parts = {name: (line[f"{loss}/{name}"], line[f"{tokens}/{name}"]) for name in "abc"}
            total = sum(count for _, count in parts.values())
            assert sum(mean * count for mean, count in parts.values()) / total == pytest.approx(line[loss], rel=1e-5)
            found[line["step"], loss] = np.array(list(parts.values()))
    return found


@pytest.fixture(scope="module")
def weights(tiny_data, tmp_path_factory):
    """A checkpoint to start from: random weights are drawn in another order when the model is split."""
    run_dir = tmp_path_factory.mktemp("weights") / "run"
    train(1, tiny_data, run_dir, "train.train_iters=1")
    return f"init_from={run_dir}/checkpoints"


@pytest.fixture(scope="module")
def alone(tiny_data, weights, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return train(1, tiny_data, run_dir, weights), by_dataset(run_dir)


SPLITS = {
    "DP": [],
    "TP": ["model.tensor_model_parallel_size=2"],
    "PP": ["model.pipeline_model_parallel_size=2"],
    "CP": ["model.context_parallel_size=2"],
}


@pytest.mark.parametrize("split", SPLITS)
def test_split_run_has_the_losses_of_one_process(split, tiny_data, weights, alone, tmp_path):
    alone, parts_alone = alone
    by_rank_0 = ["run_dir=null", f"output_dir={tmp_path}"] if split == "DP" else []
    more = {}
    if split == "DP":  # as on GPUs, and asked after every step
        prompts = (ROOT / "data/tiny/heldout.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "few.jsonl").write_text("".join(prompts[:5]))
        by_rank_0 += [f"heldout.path={tmp_path}/few.jsonl", "heldout.interval=1", "heldout.max_new_tokens=2"]
        more["script"] = "tests/train/gather_late.py"
    train(2, tiny_data, tmp_path / "run", weights, *SPLITS[split], *by_rank_0, **more)
    (run_dir,) = tmp_path.glob("train/*" if by_rank_0 else "run")  # one for all ranks
    assert (run_dir / "logs/rank1.log").exists()
    split_losses, parts = losses(run_dir), by_dataset(run_dir)
    assert parts.keys() == parts_alone.keys() and len(parts) == 11
    for key, values in parts.items():
        assert values == pytest.approx(parts_alone[key], abs=1e-4)
    assert len(split_losses) == 10
    assert split_losses == pytest.approx(alone, abs=1e-4)
    if split != "TP":
        return
    # One rank reads what two tensor-parallel ranks saved: the weights, which one step at next to no rate leaves alone.
    saved = f"init_from={tmp_path}/run/checkpoints"
    still = ["train.train_iters=1", "optimizer.lr=1e-12", "optimizer.min_lr=0"]
    train(1, tiny_data, tmp_path / "one", saved, *still)
    (again,) = losses(tmp_path / "one", "validation_loss").values()
    assert again == pytest.approx(losses(tmp_path / "run", "validation_loss")[10], abs=1e-4)


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
