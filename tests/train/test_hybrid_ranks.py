"""A small Nemotron 3 on two CPU ranks: each split has one process's losses and answers; no document sees another."""

import json
import sys

import pytest
from conftest import ROOT, SMALL_HYBRID, TORCHRUN, losses, run

from nemotron_sft.train.compat.cpu import CUDA_ONLY, KERNELS

pytestmark = pytest.mark.slow
SPLITS = {
    "DP": [],
    "EP": ["model.expert_model_parallel_size=2"],
    "TP": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "PP": ["model.pipeline_model_parallel_size=2"],
    "CP": ["model.context_parallel_size=2", "heldout.path=null"],
}


@pytest.fixture(scope="module")
def go_on(tiny_data, tmp_path_factory):
    """A function that trains four steps from the same weights, on one or two ranks: losses and first answers."""
    root = tmp_path_factory.mktemp("hybrid")
    prompts = (ROOT / "data/tiny/heldout.jsonl").read_text().splitlines(keepends=True)
    (root / "few.jsonl").write_text("".join(prompts[::32]))
    # Where context parallelism pads documents, the padding is routed too, and counts for the experts' balance.
    still = ["model.moe_aux_loss_coeff=0.0", "model.moe_router_enable_expert_bias=false"]

    def train(ranks, name, *overrides):
        done = run(
            *({1: [sys.executable], 2: TORCHRUN}[ranks]), "recipes/train.py", f"data={tiny_data}",
            f"run_dir={root}/{name}", *SMALL_HYBRID, *still, "train.train_iters=4", "tracking=disabled",
            f"heldout.path={root}/few.jsonl", "heldout.max_new_tokens=4", "heldout.temperature=1", *overrides,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        file = root / name / "heldout.json"
        return losses(root / name), json.loads(file.read_text())["asked"][0]["answers"] if file.exists() else []

    train(1, "weights", "train.train_iters=1")
    return lambda ranks, name, *overrides: train(ranks, name, f"init_from={root}/weights/checkpoints", *overrides)


@pytest.fixture(scope="module")
def alone(go_on):
    return go_on(1, "alone")


@pytest.mark.parametrize("split", SPLITS)
def test_split_hybrid_has_the_losses_and_answers_of_one_process(split, go_on, alone):
    expected, found = alone, go_on(2, split, *SPLITS[split])
    assert len(expected[0]) == 4 and found[0] == pytest.approx(expected[0], abs=1e-4)
    assert len(set(expected[1])) == 5 and found[1] == (expected[1] if split != "CP" else [])


def test_documents_that_are_cut_over_context_parallel_ranks_do_not_see_each_other(tmp_path):
    for name in (*CUDA_ONLY, *KERNELS):  # a GPU's kernels are installed, as in a container, and nobody may look
        (tmp_path / f"{name}.py").write_text("raise RuntimeError(__name__)")
    done = run(*TORCHRUN, "tests/train/cut_documents.py", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("others 0.0, own moved") == 2, done.stdout
