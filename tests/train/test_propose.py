"""Every model and experiment composes; what a preflight proposes for it fits, is allowed, and says how to type it."""

import pytest
from planned import GIB, H100, container, experiments, models, options, typed

from nemotron_sft.errors import UserError

pytestmark = pytest.mark.usefixtures("offline")

PEAK = 989
GPUS = {"nemotron_3_ultra": 192, "nemotron_3_super": 64}


def proposals(planned, gpus):
    """The proposals for a plan, each of them checked."""
    from nemotron_sft.train import propose
    from nemotron_sft.train.container import check_division
    from nemotron_sft.train.estimate import memory

    fitting = propose.propose(planned, gpus, H100, PEAK)
    for division in fitting:
        divided = propose.divide(planned, division)
        check_division(divided, gpus)
        assert memory(divided, gpus)["total"] == pytest.approx(division.bytes) and division.bytes <= 0.95 * H100
        assert 0 < division.seconds < 3600
        assert "GiB, about " in propose.text(division, planned.model.seq_length)
    assert [division.cost for division in fitting] == sorted(division.cost for division in fitting)
    return fitting


@pytest.mark.parametrize("name", models())
def test_proposals_for_every_model_are_sane(name, hf_dir):
    gpus = GPUS.get(name, 16)
    batch = f"train.global_batch_size={2 * gpus}"
    assert proposals(container(gpus, *options(name, hf_dir), batch, gpu_bytes=H100, checked=False), gpus)


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_fits_the_gpus_it_is_for_and_proposals_are_sane(name):
    from nemotron_sft.train.estimate import memory

    size = ["model.vocab_size=2048", "model.seq_length=512"] if name.startswith("tiny") else ["model.seq_length=4096"]
    cluster = typed(f"experiment={name}", *size).cluster
    gpus = cluster.get("nodes", 1) * (cluster.get("gpus_per_node") or 1)
    planned = container(gpus, f"experiment={name}", *size, gpu_bytes=H100)  # refused if it cannot be divided so
    assert memory(planned, gpus)["total"] <= 0.95 * H100
    assert proposals(planned, gpus)


def test_experiments_start_with_their_command():
    from nemotron_sft import paths

    for name in experiments():
        lines = (paths.CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
        assert lines[0] == "# @package _global_" and "recipes/train.py experiment=" + name in lines[1]


def test_typed_keys_make_the_division_that_was_proposed():
    from nemotron_sft.train import propose
    from nemotron_sft.train.estimate import memory

    command = ["model=nemotron_3_nano", "model.seq_length=4096"]
    planned = container(8, *command, gpu_bytes=H100)
    for division in proposals(planned, 8):
        again = container(8, *command, *propose.overrides(planned, division), gpu_bytes=H100)
        assert memory(again, 8)["total"] == pytest.approx(division.bytes)


def test_what_does_not_fit_anywhere_says_how_many_gpus_would_do():
    from nemotron_sft.train import propose

    planned = container(16, "model=nemotron_3_super", "train.global_batch_size=512", gpu_bytes=H100, checked=False)
    assert propose.propose(planned, 1, H100, PEAK) == []
    enough = propose.enough(planned, 1, H100, PEAK)
    assert 8 < enough <= 64 and propose.propose(planned, enough, H100, PEAK)


def test_adapters_need_far_fewer_gpus_than_all_parameters():
    from nemotron_sft.train import propose

    lora = container(1, "experiment=nano3_lora", "model.seq_length=4096", gpu_bytes=H100)
    (only,) = propose.propose(lora, 1, H100, PEAK)
    assert only.recompute == "full" and only.bytes / GIB == pytest.approx(72.1, rel=0.1)
    full = container(1, "model=nemotron_3_nano", "model.seq_length=4096", gpu_bytes=H100, checked=False)
    assert propose.enough(full, 1, H100, PEAK) >= 8


@pytest.fixture
def planned_out(monkeypatch, capsys, tmp_path):
    """Run a preflight in this process; returns what it printed and the UserError that ended it, if any."""
    from nemotron_sft.train import plan

    monkeypatch.setattr(plan, "start_bridge", lambda: None)

    def run(*overrides):
        error = None
        try:
            plan.plan(typed(*overrides, f"output_dir={tmp_path}"))
        except UserError as refused:
            error = str(refused)
        return capsys.readouterr().out, error

    return run


def test_a_division_that_does_not_fit_is_answered_with_ones_that_do(planned_out):
    nano = ["model=nemotron_3_nano", "world_size=8", "model.seq_length=4096", "model.expert_model_parallel_size=8"]
    out, error = planned_out(*nano)
    assert "It does not fit. These fit 8 GPUs of 79 GiB, the fastest first" in out and error is None
    assert "\n  1  " in out and "train.packs_per_microbatch=" in out
    out, _ = planned_out(*nano, "gpu.memory=139")  # which an H200 has
    assert "These fit" not in out and "of 139 GiB" in out
    out, _ = planned_out("model=nemotron_3_nano", "world_size=8", "gpu.memory=139")
    assert "\nThese fit 8 GPUs of 139 GiB" in out  # nobody asked for a division
    out, _ = planned_out("model=nemotron_3_ultra", "world_size=24", "train.global_batch_size=1024")
    assert "No division fits 24 GPUs of 79 GiB: 96 such GPUs would do" in out


def test_a_division_that_cannot_work_is_refused_after_ones_that_can(planned_out):
    out, error = planned_out(
        "model=nemotron_3_nano", "world_size=12", "model.expert_model_parallel_size=12", "train.global_batch_size=96"
    )
    assert "does not divide the 128 experts" in error
    assert out.startswith("Not as asked. These fit 12 GPUs of 79 GiB")
