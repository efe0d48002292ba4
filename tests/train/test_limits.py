"""Settings that no run can have end in one line, in a preflight as in a run, before anything is built."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import SMALL, SMALL_HYBRID, composed
from planned import experiments, models, options

from nemotron_sft.bridge_fields import SECTIONS, bridge_fields
from nemotron_sft.config import TrainConfig, check
from nemotron_sft.data import packed
from nemotron_sft.data.whole import check_data
from nemotron_sft.errors import UserError
from nemotron_sft.train import limits, plan, resume, run
from nemotron_sft.train.start import this_machine


@pytest.fixture
def told(bridge, tiny_data, tmp_path, capsys):
    """What a preflight and the start of a run say of settings; both must say the same, or nothing."""

    def ask(*overrides):
        config = composed("train", f"data={tiny_data}", f"output_dir={tmp_path}", "preflight=true", *overrides)
        said = []
        for start in (lambda: plan.plan(check(config, TrainConfig)), lambda: settled(config)):
            with pytest.raises(UserError) as error:
                start()
            said.append(str(error.value))
        capsys.readouterr()
        assert said[0] == said[1] and "\n" not in said[0]
        assert not list(tmp_path.glob("train/*"))  # no run directory is left behind
        return said[0]

    return ask


def settled(config):
    return run.configure(run.settle(check(config, TrainConfig), config, this_machine()), sys.stdout)


def test_epochs_decide_the_number_of_steps(bridge, tiny_data, tmp_path):
    packs = packed.read_metadata(tiny_data)["splits"]["training"]["packs"]
    config = composed("train", f"data={tiny_data}", f"output_dir={tmp_path}", *SMALL, "train.epochs=0.5")
    assert settled(config).train.train_iters == -(-packs // 2 // 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*SMALL_HYBRID, "model.moe_router_topk=0"], "model.moe_router_topk=0 must be at least 1"),
        ([*SMALL_HYBRID, "model.moe_router_topk=5"], "model.moe_router_topk=5 is more than model.num_moe_experts=4"),
        ([*SMALL_HYBRID, "model.num_moe_experts=none"], "num_moe_experts=none, but .* has layers of experts"),
        ([*SMALL_HYBRID, "model.mamba_num_groups=3"], "mamba_num_heads=4 is not a multiple of model.mamba_num_groups"),
        ([*SMALL_HYBRID, "model.hybrid_layer_pattern=''"], "Megatron-Bridge refuses these settings: num_layers"),
        ([*SMALL_HYBRID, "model.num_attention_heads=3"], "num_attention_heads=3 is not a multiple of .*groups=2"),
        ([*SMALL, "model.num_attention_heads=3"], "hidden_size=64 is not a multiple of model.num_attention_heads=3"),
        ([*SMALL, "model.hidden_size=65"], "hidden_size=65 is not a multiple of .* or set model.kv_channels"),
        ([*SMALL, "model.kv_channels=21"], "kv_channels=21: .* even"),
        ([*SMALL, "model.num_layers=0"], "model.num_layers=0 must be at least 1"),
        ([*SMALL, "model.normalization=Batch"], "choose LayerNorm or RMSNorm"),
        ([*SMALL, "peft=lora"], "peft.scheme=lora adapts a trained model"),
        ([*SMALL, "optimizer.optimizer=adamw"], r"optimizer.optimizer=adamw: choose adam \(which is AdamW\), sgd"),
        ([*SMALL, "scheduler.lr_warmup_fraction=0.1"], "refuses these settings: Cannot specify lr_warmup_fraction"),
        ([*SMALL, "train.global_batch_size=3"], "global_batch_size=3 is not a multiple of 2"),
        ([*SMALL, "train.global_batch_size=5"], "use 6"),
        ([*SMALL, "train.global_batch_size=100000", "train.epochs=1"], "a step would be .* epochs; take"),
        ([*SMALL, "train.train_iters=0"], "train.train_iters=0 converts Hugging Face weights: set init_from"),
        ([*SMALL, "train.micro_batch_size=3"], "train.micro_batch_size: set train.packs_per_microbatch"),
        ([*SMALL, "checkpoint.save_retain_interval=5"], "save_retain_interval: .* checkpoint.most_recent_k"),
        ([*SMALL, "logger.log_memory_interval=5"], "log_memory_interval: .* metrics.jsonl has peak_memory_gib"),
        (
            [*SMALL, "logger.skip_train_metrics_log=true", "logger.log_timers_to_tensorboard=true"],
            "log_timers_to_tensorboard: only lines of Megatron-Bridge's own have it",
        ),
        ([*SMALL, "data.verify=none"], "choose sizes or full"),
        ([*SMALL, "init_from={data}"], "init_from=.* holds neither a Megatron checkpoint nor a Hugging Face model"),
        ([*SMALL, "init_from={data}/metadata.json"], "init_from=.*metadata.json: no such directory"),
        ([*SMALL, "checkpoint.load={data}"], "checkpoint.load=.* holds no checkpoint"),
        ([*SMALL, "run_dir={data}"], "run_dir=.* holds prepared data, which a run would overwrite"),
        ([*SMALL, "run_dir={data}/metadata.json"], "run_dir=.*metadata.json is a file"),
    ],
)
def test_settings_that_cannot_work_together(told, tiny_data, overrides, message):
    assert re.search(message, told(*(each.replace("{data}", str(tiny_data)) for each in overrides)))


def test_prediction_heads_of_a_gpt_need_a_gpu(bridge, tiny_data, tmp_path):
    given = [f"data={tiny_data}", f"output_dir={tmp_path}", "model.mtp_num_layers=1"]
    with pytest.raises(UserError, match="mtp_num_layers: heads of a GPT need a GPU"):
        settled(composed("train", *given, *SMALL))
    settled(composed("train", *given, *SMALL_HYBRID))


def test_rules_are_about_keys_that_there_are():
    typed = check(composed("train"), TrainConfig)
    for name in {name for _, names in limits.RULES.values() for name in names} | limits.INSTEAD.keys():
        section, _, key = name.rpartition(".")
        assert hasattr(getattr(typed, section) if section else typed, key) or key in bridge_fields(section), name
    assert bridge_fields("logger").issuperset(limits.IN_BRIDGES_LINES)
    assert limits.HINTS.keys() <= {name for _, names in limits.RULES.values() for name in names}


def examples():
    """A value on the wrong side of every rule, for every key that has it."""
    wrong = {
        "must be at least 0": (-1, float("nan")), "must be at least 1": (0, -2), "must be above 0": (0, float("inf")),
        "must be at least 0 and below 1": (-0.1, 1), "must be above 0 and at most 1": (0, 1.5),
        "must be at least 1, or -1 for all": (0, -2),
    }  # fmt: skip
    return [(name, value, rule) for rule, (_, names) in limits.RULES.items() for name in names for value in wrong[rule]]


def test_numbers_that_no_run_can_have():
    config, base = check(composed("train"), TrainConfig), "the defaults are not refused"
    assert limits.check_numbers(config) is None, base
    for name, value, rule in examples():
        section, _, key = name.rpartition(".")
        node = getattr(config, section) if section else config
        store = vars(node) if hasattr(node, key) else node.bridge
        before = store.get(key)
        store[key] = value
        with pytest.raises(UserError, match=re.escape(f"{name}={value} {rule}")):
            limits.check_numbers(config)
        store[key] = before


def test_keys_that_bridge_does_not_read_are_not_read():
    from megatron.bridge import training

    sources = [file.read_text() for file in Path(training.__path__[0]).rglob("*.py")]
    assert not any("save_retain_interval" in text for text in sources)
    assert set(SECTIONS) >= {name.partition(".")[0] for name in limits.INSTEAD}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.global_batch_size=100000"], "global_batch_size=100000 is more than the .* a step reads the data"),
        (
            ["train.train_iters=5", "scheduler.lr_warmup_iters=5"],
            "lr_warmup_iters=5: the rate rises until the end, step 5",
        ),
        (["train.train_iters=5", "scheduler.lr_warmup_iters=4"], None),
    ],
)
def test_what_would_surprise_is_said_in_one_line(bridge, tiny_data, tmp_path, capsys, overrides, line):
    config = composed("train", f"data={tiny_data}", f"output_dir={tmp_path}", *SMALL, *overrides)
    settled(config)
    said = capsys.readouterr().out  # where data and run are is the first line
    assert re.search(line, said) and said.count("\n") == 2 if line else said.count("\n") == 1
    plan.plan(check(config, TrainConfig))
    assert not line or re.search(line, capsys.readouterr().out)


def test_data_without_validation_packs_says_that_nothing_is_validated(bridge, tiny_data, tmp_path, capsys):
    data = copied(tiny_data, tmp_path)
    metadata = packed.read_metadata(data)
    metadata["splits"]["validation"] |= {"packs": 0, "file": None}
    (data / "metadata.json").write_text(json.dumps(metadata))
    for interval, lines in ((5, 1), (0, 0)):
        overrides = [f"data={data}", f"output_dir={tmp_path}", *SMALL, f"validation.eval_interval={interval}"]
        settled(composed("train", *overrides))
        assert capsys.readouterr().out.count("no validation packs: nothing is validated") == lines


@pytest.mark.parametrize("world_size", [1, 16])
def test_a_preflight_of_any_model_for_any_number_of_gpus_is_a_plan_or_one_line(bridge, hf_dir, world_size):
    asked = [options(name, hf_dir) for name in models()]
    asked += [[f"experiment={name}", "init_from=random"] for name in experiments()]
    planned = 0
    for overrides in asked:
        given = [
            *overrides,
            f"world_size={world_size}",
            "data=/nowhere",
            "preflight=true",
            "train.global_batch_size=64",
        ]
        try:
            plan.plan(check(composed("train", *given), TrainConfig))
            planned += 1
        except UserError as error:
            assert re.search("processes cannot be divided|adapts a trained model|takes its vocabulary", str(error))
    assert planned > 5


def test_a_run_directory_of_another_model_is_refused_by_a_preflight(told, tmp_path, monkeypatch):
    own = tmp_path / "run/checkpoints/iter_0000004"
    own.mkdir(parents=True)
    (own / "run_config.yaml").write_text("model:\n  hidden_size: 128\ntrain: {}\nvalidation:\n  x: 1\n")
    monkeypatch.setattr(resume, "check_data", lambda *_: None)
    assert "is of a model with hidden_size=128, but model.hidden_size=64" in told(*SMALL, f"run_dir={tmp_path / 'run'}")


# --- prepared data -------------------------------------------------------------------------------------------


def copied(data, tmp_path):
    """The packs and metadata of a prep output, to be damaged."""
    there = tmp_path / "data"
    there.mkdir()
    for file in (*data.glob("*.npy"), data / "metadata.json"):
        shutil.copy(file, there)
    return there


def inner_keys(node, above=()):
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (*above, key)
        yield from inner_keys(value, (*above, key))


def test_metadata_without_something_that_training_reads(bridge, tiny_data, tmp_path):
    """Whatever is missing or of another type is named, or nobody needs it."""
    data = copied(tiny_data, tmp_path)
    whole = (data / "metadata.json").read_text()
    config = composed("train", f"data={data}", f"output_dir={tmp_path}", *SMALL)
    refused = set()
    for number, keys in enumerate(inner_keys(json.loads(whole))):
        metadata = json.loads(whole)
        inner = metadata
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = (None, "x", [])[number % 3]
        (data / "metadata.json").write_text(json.dumps(metadata))
        try:
            settled(config)
        except UserError as error:
            assert str(data) in str(error) or "tokenizer" in str(error) or "template" in str(error)
            refused.add(".".join(keys))
    assert {"pack_size", "splits.training.tokens", "splits.validation.file", "tokenizer"} <= refused
    for text in (whole[: len(whole) // 2], "[]", ""):
        (data / "metadata.json").write_text(text)
        with pytest.raises(UserError, match=r"metadata\.json"):
            check_data(data)


def test_files_of_two_outputs_and_files_cut_short(tiny_data, tmp_path):
    data = copied(tiny_data, tmp_path)
    training, validation = data / "training.npy", data / "validation.npy"
    shutil.copy(training, validation)
    with pytest.raises(UserError, match=r"validation\.npy has .* they are of two outputs"):
        check_data(data)
    shutil.copy(tiny_data / "validation.npy", validation)
    check_data(data, "full")
    with open(training, "r+b") as file:
        file.truncate(training.stat().st_size - 1)
    with pytest.raises(UserError, match=r"training\.npy is truncated"):
        check_data(data)
    shutil.copy(tiny_data / "training.npy", training)
    with open(training, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    check_data(data)
    with pytest.raises(UserError, match=r"training\.npy"):
        check_data(data, "full")
