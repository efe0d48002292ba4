"""Estimates of memory and time against what was measured on GPUs, and adapters against those that Bridge builds."""

import pytest
from planned import GIB, H100, container

pytestmark = pytest.mark.usefixtures("offline")

DENSE = ["model=dense_1b", "model.vocab_size=32768", "model.seq_length=4096"]
NANO = ["model=nemotron_3_nano", "model.seq_length=4096", "train.global_batch_size=8"]
RANDOM = [*NANO, "init_from=random", "model.moe_token_dispatcher_type=alltoall"]
SLICE = [*RANDOM, "model.hybrid_layer_pattern=MEM*ME", "model.num_layers=6", "model.expert_model_parallel_size=1"]
SLICE14 = [
    *RANDOM, "model.hybrid_layer_pattern=MEMEM*EMEMEM*E", "model.num_layers=14", "model.expert_model_parallel_size=4",
    "train.global_batch_size=32",
]  # fmt: skip
FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"]
LORA = [*NANO, "peft=lora", "model.expert_model_parallel_size=1", *FULL]
MIXERS = [*NANO, "peft=lora_mixers", "model.expert_model_parallel_size=1", *FULL]
# NVIDIA's verification card of Nemotron 3.5 Lightning, pretraining on 16 H100s in Bridge, allocated memory.
LIGHTNING = [
    "model=nemotron_35_lightning", "model.seq_length=8192", "model.context_parallel_size=2",
    "train.global_batch_size=512", "model.recompute_granularity=selective",
    "model.recompute_modules=[moe,layernorm,core_attn]", "mixed_precision.grad_reduce_in_fp32=false",
]  # fmt: skip

# Settings of older measurements: logits of all tokens, core's cross entropy, master weights beside the bf16 ones. With
# the experts' products one by one, too: their times hold no more.
OLD = ["model.cross_entropy_fusion_impl=native", "optimizer.use_precision_aware_optimizer=false"]
BESIDE = OLD[1:]
# What was run, GPUs, packs in a row, share of tokens with logits, GiB at the peak, seconds a step (None: not used).
MEASURED = {
    "1.1B, rows of 4,096": ([*DENSE, *OLD], 1, 1, 2 / 3, 24.4, 0.806),
    "1.1B, rows of 8,192": ([*DENSE, *OLD], 1, 2, 2 / 3, 29.8, 0.4395),
    "1.1B, rows of 16,384": ([*DENSE, *OLD], 1, 4, 2 / 3, 40.6, 0.4183),
    "1.1B, rows of 32,768": ([*DENSE, *OLD], 1, 8, 2 / 3, 62.3, 0.4117),
    # Four packs of 4,096 in a row: what the product chose then, for 32,768 tokens a step.
    "slice of 2.9B, before": ([*SLICE, "model.vocab_size=32768", *OLD], 1, 4, 1, 63.5, None),
    "slice of 3.4B, before": ([*SLICE, *OLD], 1, 1, 1, 67.0, None),
    "slice of 3.4B": ([*SLICE, *BESIDE], 1, 4, 2 / 3, 69.6, 0.313),
    "slice of 3.4B, Adam keeps master weights": (SLICE, 1, 4, 2 / 3, 63.2, 0.3224),
    "the same, rows of 32,768": (SLICE, 1, 8, 2 / 3, 74.2, 0.2996),
    "slice of 8.8B on four H200s, before": ([*SLICE14, *OLD], 4, 8, 1, 114, 0.68),
    "30B, LoRA, rows of 4,096, before": ([*LORA, *OLD], 1, 1, 1, 68.7, None),
    "30B, LoRA, rows of 8,192, before": ([*LORA, *OLD], 1, 2, 1, 72.1, None),
    "30B, LoRA on four H200s, before": ([*LORA, "train.global_batch_size=32", *OLD], 4, 2, 1, 71.8, None),
    "30B, LoRA without experts, before": ([*MIXERS, *OLD], 1, 1, 1, 65.6, None),
    "30B, LoRA": (LORA, 1, 2, 2 / 3, 63.9, 2.3745),
    "30B, LoRA, rows of 16,384": (LORA, 1, 4, 2 / 3, 68.6, None),  # timed on an H200
    "Lightning, published": ([*LIGHTNING, *OLD], 16, 1, 1, 68.5, 36.9),
}


@pytest.mark.parametrize("name", MEASURED)
def test_memory_and_time_are_near_what_was_measured(name):
    from nemotron_sft.train.estimate import memory
    from nemotron_sft.train.speed import seconds_per_step

    overrides, gpus, packs, logits, gib, seconds = MEASURED[name]
    planned = container(gpus, *overrides, f"train.packs_per_microbatch={packs}", gpu_bytes=H100)
    assert memory(planned, gpus, logits)["total"] / GIB == pytest.approx(gib, rel=0.1)
    if seconds:
        assert seconds_per_step(planned, gpus, 989, logits) == pytest.approx(seconds, rel=0.2)


def test_the_row_that_a_gpu_gets_by_itself_is_one_that_fits():
    def packs(*overrides):
        return container(1, *overrides, gpu_bytes=int(79.2 * GIB)).train.micro_batch_size

    assert packs(*DENSE) == packs(*DENSE, *OLD) == 8
    assert packs(*SLICE) == 4
    assert packs(*SLICE, "model.vocab_size=32768", *OLD) == 4
    assert packs(*SLICE, *BESIDE) < 8  # which ran out of memory
    assert packs(*LORA) == 2
    # With separate products for each expert, rows of 8,192 ran out of memory; rows of 4,096 need 68.7 GiB.
    assert packs(*LORA, *OLD) == 1


def test_logits_of_trained_tokens_count_and_of_as_many_more_as_are_predicted_ahead():
    from nemotron_sft.train.estimate import memory, tokens_with_logits

    split = {"tokens": 1000, "trained_tokens": 600, "sequences": 20}
    nano = container(1, *SLICE, gpu_bytes=H100)
    assert tokens_with_logits(nano.model, {"splits": {"training": split}}) == 0.6
    assert tokens_with_logits(nano.model, {"splits": {"training": split | {"tokens": 0}}}) == 1
    assert tokens_with_logits(nano.model, None) == 1
    nano.model.mtp_num_layers = 2
    assert tokens_with_logits(nano.model, {"splits": {"training": split}}) == 0.64
    nano.model.mtp_num_layers = None
    fewer = memory(nano, 1)["total"] - memory(nano, 1, 0.6)["total"]
    assert fewer == pytest.approx(0.4 * 4 * 131072 * nano.train.micro_batch_size * 4096)


def test_more_or_less_of_a_setting_moves_the_estimate_as_it_should():
    from nemotron_sft.train.estimate import memory

    def shares(*overrides, gpus=16):
        return memory(container(gpus, *NANO, "train.global_batch_size=128", *overrides), gpus)

    base = shares()
    assert (
        shares("model.recompute_granularity=selective", "model.recompute_modules=[moe]")["activations"]
        < (base["activations"])
    )
    assert shares(*FULL)["activations"] < shares("model.recompute_granularity=selective")["activations"]
    narrow = shares(
        "mixed_precision.grad_reduce_in_fp32=false", "optimizer.use_precision_aware_optimizer=true",
        "optimizer.main_grads_dtype=bfloat16", "optimizer.exp_avg_dtype=bfloat16",
        "optimizer.exp_avg_sq_dtype=bfloat16",
    )  # fmt: skip
    assert narrow["gradients"] == base["gradients"] / 2 and narrow["optimizer"] == base["optimizer"] / 2
    assert shares("train.packs_per_microbatch=2")["activations"] == 2 * base["activations"]
    lightning = memory(container(16, "model=nemotron_35_lightning", "model.seq_length=4096"), 16)
    # Two blocks more, and the loss of two tokens more: 2 x 4 bytes for every entry of the vocabulary.
    assert lightning["activations"] - base["activations"] > 4096 * 131072 * 8


@pytest.mark.parametrize("scheme", ["LoRA", "DoRA"])
def test_counted_adapters_are_those_that_bridge_builds(scheme):
    import importlib

    from megatron.bridge.training.model_load_save import temporary_distributed_context

    from nemotron_sft.train.compat.cpu import adapt
    from nemotron_sft.train.sizes import sizes

    planned = container(
        1, "model=dense_1b", "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96",
        "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=64", "model.vocab_size=256",
    )  # fmt: skip
    planned.peft = getattr(importlib.import_module(f"megatron.bridge.peft.{scheme.lower()}"), scheme)(dim=8)
    counted = sizes(planned.model, planned.peft).total
    adapt(planned)
    with temporary_distributed_context("gloo"):
        planned.model.finalize()
        (built,) = planned.model.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        adapted = planned.peft(built, training=True)
        assert counted.adapters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted.kept > sizes(planned.model).total.kept
