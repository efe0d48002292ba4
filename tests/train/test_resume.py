"""What cannot go on with what is on disk is refused in one line."""

import json
from types import SimpleNamespace

import pytest

from nemotron_sft.errors import UserError
from nemotron_sft.record import lineage
from nemotron_sft.train import resume
from nemotron_sft.train.compat.optimizer import take_rates
from nemotron_sft.train.progress import Progress

MODEL = {"hidden_size": 64, "hybrid_layer_pattern": "M*|M*E", "vocab_size": 2048, "kv_channels": None}


def refused(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_is_not_made_shorter(tmp_path):
    resume.check_steps(8, 8, tmp_path)
    resume.check_steps(0, 0, tmp_path)
    assert "trained for 8 steps already, more than train.train_iters=6" in refused(resume.check_steps, 8, 6, tmp_path)


def test_steps_keep_their_size_and_order():
    now = SimpleNamespace(train=SimpleNamespace(global_batch_size=8), rng=SimpleNamespace(seed=1))
    saved = {"train": {"global_batch_size": 8}, "rng": {"seed": 2}}
    resume.check_order(now, saved, "another run", False)
    resume.check_order(now, {}, "of Megatron-LM", False)
    assert "trained with seed=2, not 1" in refused(resume.check_order, now, saved, "here", True)
    saved["train"]["global_batch_size"] = 4
    told = refused(resume.check_order, now, saved, "there", False)
    assert "there was trained with train.global_batch_size=4, not 8: set it to 4, or start another" in told


def test_a_checkpoint_of_another_model_is_refused_by_the_key_that_differs():
    resume.check_model(SimpleNamespace(**MODEL), MODEL | {"hybrid_layer_pattern": "M*M*E", "kv_channels": 32}, "here")
    resume.check_model(SimpleNamespace(**MODEL), {}, "of Megatron-LM")
    for key, other in (("hidden_size", 128), ("hybrid_layer_pattern", "M*ME"), ("vocab_size", 4096)):
        told = refused(resume.check_model, SimpleNamespace(**MODEL), MODEL | {key: other}, "here")
        assert f"of a model with {key}={other}, but model.{key}=" in told


def test_an_optimizer_saved_by_buffers_keeps_its_division():
    now = SimpleNamespace(
        model=SimpleNamespace(tensor_model_parallel_size=1, expert_model_parallel_size=2, context_parallel_size=2),
        checkpoint=SimpleNamespace(load_optim=True),
    )
    saved = {
        "model": {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 4, "context_parallel_size": 1},
        "checkpoint": {"save_optim": True},
        "optimizer": {"use_distributed_optimizer": True},
    }
    told = refused(resume.check_division, now, saved, "here")
    assert "here was saved with model.expert_model_parallel_size=4" in told
    for section, key, value in (
        ("checkpoint", "dist_ckpt_optim_fully_reshardable", True),
        ("checkpoint", "save_optim", False),
        ("optimizer", "use_distributed_optimizer", False),
        ("model", "expert_model_parallel_size", 2),
    ):
        resume.check_division(now, saved | {section: saved[section] | {key: value}}, "here")
    now.checkpoint.load_optim = False
    resume.check_division(now, saved, "here")


def test_adapters_of_another_shape_are_refused():
    class LoRA:
        dim, alpha, target_modules, exclude_modules = 8, 16, ["linear_qkv"], []

    saved = {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 8, "alpha": 16, "target_modules": ["linear_qkv"]}
    resume.check_adapters(LoRA(), saved, "here")
    resume.check_adapters(None, None, "here")
    assert "dim=4, but peft.dim=8" in refused(resume.check_adapters, LoRA(), saved | {"dim": 4}, "here")
    assert "alpha=32" in refused(resume.check_adapters, LoRA(), saved | {"alpha": 32}, "here")
    assert "peft none, not lora" in refused(resume.check_adapters, LoRA(), None, "here")
    assert "peft lora, not none" in refused(resume.check_adapters, None, saved, "here")


@pytest.fixture
def run_dir(tmp_path):
    """A run that was trained on data of digest aaaa, from a base model with one file of five bytes."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"12345")
    inputs = [
        {"artifact": lineage.PRETRAIN, "digest": "b", "files": [{"name": "model.safetensors", "bytes": 5}]},
        {"artifact": lineage.DATA, "digest": "aaaa", "files": []},
    ]
    (tmp_path / "run").mkdir()
    lineage.write(tmp_path / "run", {"format": lineage.FORMAT, "version": lineage.VERSION, "inputs": inputs})
    return tmp_path / "run"


def test_other_data_is_refused_and_the_same_data_elsewhere_is_not(run_dir, monkeypatch):
    monkeypatch.setattr(lineage, "of_data", lambda path, metadata: {"digest": metadata})
    resume.check_data(run_dir, run_dir / "elsewhere", "aaaa")
    resume.check_data(run_dir / "older", run_dir, "aaaa")
    told = refused(resume.check_data, run_dir, run_dir / "data", "cccc")
    assert "is not what" in told and "aaaa then, cccc now" in told


def test_a_base_may_move_but_not_change(run_dir):
    base = run_dir.parent / "base"
    saved = {"checkpoint": {"pretrained_checkpoint": str(base)}}
    moved = base.rename(run_dir.parent / "moved")
    resume.check_base(str(moved), saved, run_dir)
    (moved / "model.safetensors").write_bytes(b"123456")
    assert f"were trained for {base}; {moved} is another model" in refused(
        resume.check_base, str(moved), saved, run_dir
    )


def test_metrics_go_on_behind_the_step_that_was_loaded(tmp_path):
    earlier = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": 2.5},
               {"step": 2, "test_loss": 2.6}, {"step": 3, "loss": 1.0}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in earlier)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    metadata = {"version": 2, "blend": {"datasets": []}, "splits": {"training": {"tokens": 1, "packs": 1}}}
    progress = Progress(metadata, tmp_path, None, 0.0, 0, None)
    progress.begin, progress.total = 2, 4
    with progress._continued() as file:
        file.write("end\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(
        json.dumps(line) + "\n" for line in earlier[:4]
    ) + "end\n"
    assert (progress.losses, progress.validation, progress.test) == ([(1, 3.0), (2, 2.0)], [(2, 2.5)], None)


def test_saved_parameter_groups_take_the_learning_rates_of_the_config():
    saved = [{"wd_mult": 1.0, "max_lr": 1, "min_lr": 0, "step": 7}, {"wd_mult": 0.0, "max_lr": 1, "min_lr": 0}]
    current = [{"wd_mult": 0.0, "max_lr": 3, "min_lr": 2}, {"pre_wd_mult": 1.0, "max_lr": 4, "min_lr": 1}]
    take_rates(current, saved, ["wd_mult"])
    assert saved == [{"wd_mult": 1.0, "max_lr": 4, "min_lr": 1, "step": 7}, {"wd_mult": 0.0, "max_lr": 3, "min_lr": 2}]
    twins = [{"wd_mult": 1.0, "max_lr": 5}, {"wd_mult": 1.0, "max_lr": 6}]
    take_rates(twins, saved, ["wd_mult"])
    assert saved[0]["max_lr"] == 4, "which of two is meant cannot be told"
