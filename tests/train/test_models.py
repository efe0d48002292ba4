"""Every model config builds its Bridge recipe without network or weights; preflight counts right and refuses wrong."""

import re

import pytest
from conftest import recipe
from planned import PUBLISHED, container, models, options

from nemotron_sft.errors import UserError

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("name", models())
def test_every_model_passes_preflight(name, hf_dir):
    from nemotron_sft.config import Gpu
    from nemotron_sft.train import estimate, plan, sizes

    gpus = 192 if name == "nemotron_3_ultra" else 16
    planned = container(gpus, *options(name, hf_dir), "train.global_batch_size=192")
    rows = plan.describe(planned, None, gpus, Gpu(79, 989))
    total = int(re.match(r"([\d,]+) total", rows["parameters"])[1].replace(",", ""))
    assert total == PUBLISHED.get(name, total) > 0
    parts = sizes.sizes(planned.model)
    again = sizes.Part(parts.embedding.dense if parts.block.dense else 0)  # multi-token prediction reads it, too
    for pipeline in (1, 2, 3):  # every parameter is on some stage, and on one
        stages = estimate.stage_parts(parts, pipeline)
        whole = sum(stages, sizes.Part())
        assert whole.dense == parts.total.dense + (again.dense if pipeline > 1 else 0)
        assert (whole.experts, whole.active) == (parts.total.experts, parts.total.active)
    assert "GiB" in rows["memory per GPU"] and rows["processes"].startswith(f"{gpus} = ")
    assert re.match(r"about .* a step, .* in all", rows["time"])


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize(
    ("world_size", "wrong", "message"),
    [
        (7, ["tensor_model_parallel_size=7"], r"tensor_model_parallel_size=7 does not divide .*choose one of 1, "),
        (17, ["pipeline_model_parallel_size=17"], r"pipeline_model_parallel_size=17 does not divide the \d+ layers"),
        (8, ["context_parallel_size=3", "sequence_parallel=false", "tensor_model_parallel_size=1"], r"2 x 3 pieces"),
        (9, ["expert_model_parallel_size=9"], r"has no experts|does not divide the \d+ experts"),
        (16, ["sequence_parallel=true", "tensor_model_parallel_size=1"], r"needs tensor parallelism"),
        (15, ["pipeline_model_parallel_size=2"], r"15 processes .*start a multiple of|divide the 5 layers"),
    ],
)  # fmt: skip
def test_wrong_topology_of_every_model_is_refused(name, world_size, wrong, message, hf_dir):
    with pytest.raises(UserError, match=message) as refused:
        container(world_size, *options(name, hf_dir), *(f"model.{key}" for key in wrong))
    assert "\n" not in str(refused.value)


def test_mamba_layers_give_every_context_parallel_rank_whole_heads(hf_dir):
    given = options("nemotron_3_nano", hf_dir)
    split = [
        "model.sequence_parallel=false",
        "model.tensor_model_parallel_size=1",
        "model.expert_model_parallel_size=1",
    ]
    for context in (2, 16):  # in 64 heads of 8 groups
        container(context, *given, *split, f"model.context_parallel_size={context}", "train.global_batch_size=16")
    with pytest.raises(UserError, match="context_parallel_size=128 does not divide the 64 heads in 8 groups"):
        container(128, *given, *split, "model.context_parallel_size=128", "train.global_batch_size=16")


SHAPE = ["model=tiny_gpt", "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96",
         "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=64"]  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [
        ["model.vocab_size=256"],
        ["model.vocab_size=320", "model.share_embeddings_and_output_weights=false", "model.qk_layernorm=true"],
        ["model.vocab_size=256", "model.gated_linear_unit=false", "model.add_bias_linear=true"],
        ["model.vocab_size=256", "model.normalization=LayerNorm", "model.add_qkv_bias=true", "model.kv_channels=32"],
        ["model.vocab_size=256", "model.num_moe_experts=4", "model.moe_router_topk=2", "model.qk_layernorm=false"],
    ],
)
def test_counted_parameters_are_those_of_the_built_model(variant):
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    from nemotron_sft.train.compat.cpu import adapt
    from nemotron_sft.train.sizes import sizes

    planned = container(1, *SHAPE, *variant)
    counted = sizes(planned.model).total
    adapt(planned)
    with temporary_distributed_context("gloo"):
        planned.model.finalize()
        (built,) = planned.model.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        assert counted.dense + counted.experts == sum(p.numel() for p in built.parameters())
    if planned.model.num_moe_experts:
        assert counted.active < counted.dense + counted.experts


def test_pipeline_and_context_rules():
    four = [*SHAPE, "model.vocab_size=256"]
    with pytest.raises(UserError, match="rows of 66 tokens do not divide into 2 x 2 pieces"):
        container(2, *four, "model.context_parallel_size=2", "model.seq_length=66", "train.packs_per_microbatch=1")
    with pytest.raises(UserError, match="neither a divisor nor a multiple of the 2 query groups"):
        container(3, *four, "model.tensor_model_parallel_size=3", "model.num_attention_heads=6", "model.kv_channels=16")
    with pytest.raises(UserError, match="use 12"):
        container(3, *four, "train.global_batch_size=4")


def test_unknown_architectures_and_recipes_are_one_line(hf_dir):
    import json

    file = hf_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["WhatForCausalLM"]}))
    with pytest.raises(UserError, match="no bridge for the architecture WhatForCausalLM"):
        container(1, "model=hf", f"model.hf={hf_dir}")
    with pytest.raises(UserError, match="neither a directory nor a hub id"):
        container(1, "model=hf", "model.hf=/nowhere/at/all")
    with pytest.raises(UserError, match="no such function below megatron"):
        container(1, "model=qwen3_8b", "model.recipe=qwen.qwen3.qwen3_9b_sft_config")


def test_the_small_nano_for_one_gpu_has_all_of_its_kinds_of_layers():
    from nemotron_sft.train import estimate, topology

    planned = container(1, "experiment=tiny_gpu", "model.vocab_size=2048")
    assert topology.layer_kinds(planned.model) == {"mamba", "attention", "moe"}
    assert estimate.memory(planned, 1)["total"] < 4 * 2**30


def test_preflight_prints_and_writes_nothing(tmp_path):
    done = recipe("train", "experiment=nano3_sft", "preflight=true", f"output_dir={tmp_path}/out", "world_size=32")
    assert done.returncode == 0, done.stderr
    assert "31,577,937,344 total" in done.stdout and "32 = 16 data x 2 tensor" in done.stdout
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_replaced_by_what_is_installed(monkeypatch):
    from megatron.core.transformer.enums import AttnBackend

    from nemotron_sft.train import tuning

    def resolved(installed):
        model = container(8, "model=nemotron_3_nano", "model.attention_backend=flash").model
        monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: name if name in installed else None)
        tuning.use_what_is_installed(model)
        monkeypatch.undo()
        return model.attention_backend, model.moe_token_dispatcher_type

    assert resolved([]) == (AttnBackend.auto, "alltoall")
    assert resolved(["flash_attn_interface", "deep_ep"]) == (AttnBackend.flash, "flex")


def test_tokens_of_experts_on_one_gpu_take_the_plain_dispatcher():
    for experts, dispatcher in ((1, "alltoall"), (8, "flex")):
        planned = container(8, "model=nemotron_3_nano", f"model.expert_model_parallel_size={experts}")
        assert planned.model.moe_token_dispatcher_type == dispatcher


def test_a_key_that_bridge_would_overrule_names_the_one_that_counts():
    assert container(8, "experiment=nano3_sft_8gpu").mixed_precision.grad_reduce_in_fp32 is False
    with pytest.raises(UserError, match=r"set mixed_precision\.grad_reduce_in_fp32, which Bridge copies to it"):
        container(8, "model=nemotron_3_nano", "ddp.grad_reduce_in_fp32=false")


def test_a_pattern_of_another_number_of_layers_is_refused():
    with pytest.raises(UserError, match=r"num_layers=2, but model\.hybrid_layer_pattern=M\*M\*E has 5: set both"):
        container(1, "model=tiny", "model.num_layers=2")
    for given in ("MEM|*", "MEM*/*E"):  # stages of a pipeline; a head for further tokens
        assert container(8, "model=nemotron_3_nano", "model.num_layers=4", f"model.hybrid_layer_pattern={given}")
