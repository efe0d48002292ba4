"""Hugging Face weights are loaded whole or not at all: what is missing, too much or of another shape is named."""

import os

import pytest
from safetensors.torch import load_file, save_file

from nemotron_sft.errors import UserError


@pytest.fixture(scope="module")
def saved(bridge, tmp_path_factory):
    """A random small Nemotron 3 (Mamba, attention, experts) as transformers' own save_pretrained leaves it."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=256, hidden_size=64, hybrid_override_pattern="M*ME", num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
        chunk_size=64, intermediate_size=96, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=96, n_group=1, topk_group=1, tie_word_embeddings=False,
        time_step_min=1e-9, num_nextn_predict_layers=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("hf")
    NemotronHForCausalLM(config).save_pretrained(path)
    return path


def load(directory):
    """The Megatron model of a Hugging Face directory, filled from it."""
    from nemotron_sft.train import checkpoints, hf
    from nemotron_sft.train.compat.cpu import adapt_model

    provider = hf.auto_bridge(str(directory)).to_megatron_provider(load_weights=False)
    adapt_model(provider)
    with checkpoints.alone():
        yield checkpoints._with_hf_weights(provider, str(directory))[0]


def test_one_process_of_torchrun_is_alone_for_a_while(bridge, monkeypatch):
    import torch.distributed as dist

    from nemotron_sft.train import checkpoints

    theirs = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    with checkpoints.alone():
        assert dist.get_world_size() == 1
        assert not theirs.keys() & os.environ.keys()
    assert theirs.items() <= os.environ.items()


def test_a_nemotron_of_transformers_is_loaded_whole(saved):
    import torch
    from transformers import NemotronHForCausalLM

    theirs = NemotronHForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1))
    for model in load(saved):
        with torch.no_grad():
            ours = model.eval()(tokens, torch.arange(48)[None], None)
            expected = theirs(tokens).logits
    assert torch.equal(model.embedding.word_embeddings.weight, theirs.get_input_embeddings().weight)
    assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("backbone.layers.0.mixer.D"), r"has no weight backbone.layers.0.mixer.D, which "),
        (lambda weights: weights.pop("backbone.embedding.weight"), r"has no weight backbone.embeddings.weight, which"),
        (lambda weights: weights.update(extra=weights["lm_head.weight"] + 0), r"has a weight extra that the model"),
        (lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:, :32].clone()}), r"[Ss]hape"),
    ],
    ids=["missing", "no embedding", "too much", "another shape"],
)
def test_half_a_checkpoint_is_refused_by_the_name_of_the_weight(saved, change, message, tmp_path):
    for file in saved.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as refused:
        next(load(tmp_path))
    assert "\n" not in str(refused.value)
