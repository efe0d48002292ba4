"""Every model config builds its Bridge recipe without network or weights; preflight counts right and refuses wrong."""

import re

import pytest
from conftest import recipe
from hydra import compose, initialize_config_dir

from nemotron_sft import app, config, paths
from nemotron_sft.errors import UserError

# Parameters as the published checkpoints have them, multi-token prediction included, the router's balancing bias (a
# buffer) left out: Lightning's 32,913,266,240 elements have 3,072 of it, Super's 123,611,033,088 have 20,992, Ultra's
# index counts 1,121,049,257,984 bytes, 25,088 elements of it in fp32. Of Nano 12B v2 only "12.3 billion" is published.
PUBLISHED = {
    "nemotron_3_nano": 31_577_937_344,
    "nemotron_35_lightning": 32_913_266_240 - 24 * 128,
    "nemotron_3_nano_4b": 3_973_556_832,
    "nemotron_nano_9b_v2": 8_888_227_328,
    "nemotron_nano_12b_v2": 12_310_001_152,
    "nemotron_3_super": 123_611_033_088 - 41 * 512,
    "nemotron_3_ultra": (1_121_049_257_984 - 4 * 49 * 512) // 2,
    "llama32_1b": 1_235_814_400,
    "qwen3_8b": 8_190_735_360,
}


@pytest.fixture(scope="module", autouse=True)
def offline(bridge, tmp_path_factory):
    """Bridge, with an empty hub cache and no way to the hub."""
    offline = pytest.MonkeyPatch()
    offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("empty")))
    yield
    offline.undo()


def container(world_size, *overrides):
    from nemotron_sft.train.container import build
    from nemotron_sft.train.start import Machine

    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        composed = compose("train", [app.open_key(override) for override in overrides])
    machine = Machine(gpu_bytes=None, world_size=world_size)
    return build(config.check(composed, config.TrainConfig), None, None, paths.ROOT / "output", machine)


def models():
    return sorted(file.stem for file in (paths.CONF / "model").glob("*.yaml"))


@pytest.fixture
def hf_dir(tmp_path):
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


def options(name, hf_dir):
    if name == "hf":
        return [f"model={name}", f"model.hf={hf_dir}"]
    # Models without a published checkpoint take their vocabulary and pack size from the data.
    return [f"model={name}", *([] if name in PUBLISHED else ["model.vocab_size=32768", "model.seq_length=512"])]


@pytest.mark.parametrize("name", models())
def test_every_model_passes_preflight(name, hf_dir):
    from nemotron_sft.train import estimate

    gpus = 192 if name == "nemotron_3_ultra" else 16
    planned = container(gpus, *options(name, hf_dir), "train.global_batch_size=192")
    rows = estimate.describe(planned, None, gpus)
    total = int(re.match(r"([\d,]+) total", rows["parameters"])[1].replace(",", ""))
    assert total == PUBLISHED.get(name, total) > 0
    parts = estimate.sizes(planned.model)
    for pipeline in (1, 2, 3):  # every parameter is on some stage, and on one
        assert sum(estimate._stages(parts, pipeline), estimate.Part()) == parts.whole
    assert "GiB" in rows["memory per GPU"] and rows["processes"].startswith(f"{gpus} = ")


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

    from nemotron_sft.train import estimate
    from nemotron_sft.train.compat.cpu import adapt

    planned = container(1, *SHAPE, *variant)
    counted = estimate.sizes(planned.model).whole
    adapt(planned)
    with temporary_distributed_context("gloo"):
        planned.model.finalize()
        (built,) = planned.model.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        assert counted.dense + counted.experts == sum(p.numel() for p in built.parameters())
    if planned.model.num_moe_experts:
        assert counted.active < counted.dense + counted.experts


@pytest.mark.parametrize(("pack_size", "gib"), [(4096, 23.8), (16384, 39.3)])
def test_memory_estimate_is_near_what_an_h100_needed(pack_size, gib):
    """Peak memory of a 1.107B model, measured with Bridge 0.6.2 and Transformer Engine on one H100."""
    from nemotron_sft.train import estimate

    planned = container(
        1, "model=tiny_gpt", "model.num_layers=16", "model.hidden_size=2048", "model.ffn_hidden_size=8192",
        "model.num_attention_heads=32", "model.num_query_groups=8", "model.vocab_size=32768",
        "model.share_embeddings_and_output_weights=false", f"model.seq_length={pack_size}",
        "train.packs_per_microbatch=1", "ddp.grad_reduce_in_fp32=true",
    )  # fmt: skip
    parts = estimate.sizes(planned.model).whole
    assert parts.dense == pytest.approx(1.107e9, rel=1e-3)
    assert estimate.memory(planned, 1)["total"] / 2**30 == pytest.approx(gib, rel=0.1)


def test_pipeline_and_context_rules():
    four = [*SHAPE, "model.vocab_size=256"]
    with pytest.raises(UserError, match="rows of 66 tokens do not divide into 2 x 2 pieces"):
        container(2, *four, "model.context_parallel_size=2", "model.seq_length=66", "train.packs_per_microbatch=1")
    with pytest.raises(UserError, match="neither a divisor nor a multiple of the 2 query groups"):
        container(3, *four, "model.tensor_model_parallel_size=3", "model.num_attention_heads=6")
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
    assert "31,577,937,344 total" in done.stdout and "32 = 32 data" in done.stdout
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_replaced_by_what_is_installed(monkeypatch):
    from megatron.core.transformer.enums import AttnBackend

    from nemotron_sft.train import tuning

    def resolved(installed):
        model = container(1, "experiment=tiny_gpu", "model.vocab_size=2048", "model.attention_backend=flash").model
        monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: name if name in installed else None)
        tuning.use_what_is_installed(model)
        monkeypatch.undo()
        return model.attention_backend, model.moe_token_dispatcher_type

    assert resolved([]) == (AttnBackend.auto, "alltoall")
    assert resolved(["flash_attn_interface", "deep_ep"]) == (AttnBackend.flash, "flex")
