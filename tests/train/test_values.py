"""Config values on Bridge's dataclasses: null, none, dtypes and enumerations by name, and the sections beside it."""

import enum
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from conftest import composed
from omegaconf import OmegaConf

from nemotron_sft.bridge_fields import SECTIONS, bridge_fields
from nemotron_sft.config import Rng, TrainConfig, check
from nemotron_sft.data import packed
from nemotron_sft.errors import UserError
from nemotron_sft.train import container, values
from nemotron_sft.train.start import Machine


class Backend(enum.Enum):
    flash = 1
    none = 2


@dataclass
class Target:
    count: int | None = 3
    sloppy: int = None
    rate: float = 0.5
    name: str = "x"
    dtype: torch.dtype = torch.float32
    maybe_dtype: torch.dtype | None = None
    backend: Backend | None = Backend.flash
    graph: Literal["none", "local"] | None = "local"
    anything: Any = 1
    items: list[int] | None = None


def section(key, value):
    return Rng(bridge={key: value})


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("count", "none", None), ("count", "None", None), ("count", 5, 5), ("sloppy", "none", None), ("rate", 2, 2.0),
        ("name", "none", "none"), ("dtype", "bfloat16", torch.bfloat16), ("dtype", "torch.uint8", torch.uint8),
        ("maybe_dtype", "float16", torch.float16), ("maybe_dtype", "none", None), ("backend", "flash", Backend.flash),
        ("backend", "none", Backend.none), ("graph", "none", "none"), ("graph", "local", "local"),
        ("anything", "none", None), ("items", [1, 2], [1, 2]), ("items", "none", None),
    ],
)  # fmt: skip
def test_values_by_name(key, value, meant):
    target = Target()
    values.apply(section(key, value), target, "s")
    found = getattr(target, key)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", "many", "s.count='many' should be of type int"),
        ("rate", "none", "s.rate='none' should be of type float"),
        ("dtype", "float17", "s.dtype=float17 is no dtype of torch: bfloat16"),
        ("dtype", "none", "s.dtype=none is no dtype of torch"),
        ("backend", "slow", "s.backend=slow: choose one of flash, none"),
        ("graph", "remote", "s.graph='remote' should be none or local"),
        ("nothing", 1, "s.nothing is not a field of Target"),
    ],
)
def test_values_that_do_not_fit_are_named(key, value, message):
    with pytest.raises(UserError, match=message):
        values.apply(section(key, value), Target(), "s")


def test_null_leaves_every_field_of_bridge_alone():
    cfg = composed("train")
    for section in SECTIONS:
        for key in bridge_fields(section):
            OmegaConf.update(cfg, f"{section}.{key}", None, force_add=True)
    checked = check(cfg, TrainConfig)
    assert {section: values.given(getattr(checked, section)) for section in SECTIONS} == {s: {} for s in SECTIONS}


def test_none_reaches_fields_that_are_listed_and_others():
    checked = check(
        composed("train", "checkpoint.save_interval=none", "model.num_moe_experts=none", "model.hf=none"), TrainConfig
    )
    assert checked.checkpoint.save_interval is None and checked.checkpoint.bridge == {"save_interval": "none"}
    assert checked.model.bridge["num_moe_experts"] == "none"
    assert checked.model.hf is None and "hf" not in checked.model.bridge  # of a key of our own null says the same


def built(tmp_path, *overrides):
    config = check(composed("train", "model=dense_1b", "model.vocab_size=1024", *overrides), TrainConfig)
    return container.build(config, None, None, tmp_path, Machine(None))


def test_the_sections_reach_bridge(bridge, tmp_path):
    made = built(
        tmp_path, "seed=7", "rng.te_rng_tracker=true", "mixed_precision.grad_reduce_in_fp32=false",
        "mixed_precision.params_dtype=float32", "comm_overlap.overlap_grad_reduce=true",
        "optimizer.exp_avg_dtype=bfloat16", "checkpoint.save_interval=none",
    )  # fmt: skip
    assert (made.rng.seed, made.rng.te_rng_tracker) == (7, True)
    assert made.mixed_precision.bf16 and not made.mixed_precision.grad_reduce_in_fp32
    assert made.mixed_precision.params_dtype == torch.float32
    assert made.comm_overlap.overlap_grad_reduce and not made.comm_overlap.tp_comm_overlap
    assert made.optimizer.exp_avg_dtype == torch.bfloat16
    assert made.checkpoint.save_interval is None
    plain = built(tmp_path)
    assert plain.mixed_precision == "bf16_mixed" and plain.comm_overlap is None
    assert built(tmp_path, "precision=fp8", "mixed_precision.fp8_wgrad=false").mixed_precision.fp8
    with pytest.raises(UserError, match=r"rng\.seed: set seed"):
        built(tmp_path, "rng.seed=3")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.epochs", 0, "must be above 0"), ("train.epochs", -1, "must be above 0"),
        ("train.train_iters", -1, "at least 0"), ("train.global_batch_size", 0, "at least 1"),
        ("train.packs_per_microbatch", 0, "at least 1"), ("validation.eval_interval", -5, "at least 0"),
        ("logger.log_interval", 0, "at least 1"), ("optimizer.lr", 0.0, "must be above 0"),
        ("optimizer.min_lr", -1.0, "at least 0"),
    ],
)  # fmt: skip
def test_lengths_and_rates_that_no_run_can_have(bridge, tmp_path, key, value, message):
    with pytest.raises(UserError, match=rf"{key}.*{message}"):
        built(tmp_path, f"{key}={value}")


def test_a_rate_below_that_of_the_end_stays_as_it_is(bridge, tmp_path, capsys):
    made = built(tmp_path, "optimizer.lr=1e-9", "optimizer.min_lr=1e-6").optimizer
    assert made.lr == made.min_lr == 1e-9
    assert "optimizer.min_lr=1e-06 is above optimizer.lr=1e-09: the rate stays at 1e-09" in capsys.readouterr().err


def test_rows_are_as_long_as_the_packs(bridge, tmp_path, tiny_data):
    config = check(composed("train", "model=tiny", "model.seq_length=1024"), TrainConfig)
    metadata = packed.read_metadata(tiny_data)
    with pytest.raises(UserError, match=r"model\.seq_length=1024, but the packs of .* hold 512 tokens"):
        container.build(config, metadata, tiny_data, tmp_path, Machine(None))


@pytest.mark.parametrize("scheme", ["lora", "lora_mixers", "dora"])
@pytest.mark.parametrize("model", ["tiny", "tiny_gpt", "dense_1b"])
def test_the_rate_of_adapters_is_not_below_that_of_the_models_end(model, scheme):
    optimizer = composed("train", f"model={model}", f"peft={scheme}").optimizer
    assert optimizer.lr > optimizer.min_lr
