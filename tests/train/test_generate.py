"""Answers to prompts of many lengths in one batch are those that each prompt gets alone."""

import numpy as np
import pytest

from nemotron_sft.train.checkpoints import alone
from nemotron_sft.train.compat.cpu import adapt_model
from nemotron_sft.train.generate import IN_A_BATCH, Sampling, _alike, generate

EOS, VOCABULARY = 5, 128
SMALL = dict(hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=16,
             vocab_size=VOCABULARY, seq_length=64, init_method_std=0.3)  # fmt: skip


@pytest.fixture(scope="module", params=["rope", "learned_absolute", "hybrid"])
def model(request, bridge):
    """A model with random weights, so many of them that its answers are no mere repetition."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    if request.param == "hybrid":
        provider = HybridModelProvider(
            hybrid_layer_pattern="M*EM*/*-", mamba_num_heads=4, mamba_head_dim=16, mamba_num_groups=2,
            mamba_state_dim=16, mamba_chunk_size=8, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32,
            mtp_num_layers=1, position_embedding_type="rope", **SMALL,
        )  # fmt: skip
    else:
        provider = GPTModelProvider(num_layers=2, position_embedding_type=request.param, **SMALL)
    adapt_model(provider)
    torch.manual_seed(1)
    with alone():
        provider.finalize()
        (built,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        yield built


def without_cache(model, prompt, budget: int) -> list[int]:
    """Greedily, each token by a pass over all before it."""
    import torch

    row = list(map(int, prompt))
    with torch.no_grad():
        while len(row) < len(prompt) + budget:
            logits = model(torch.tensor([row]), torch.arange(len(row))[None], None)
            row.append(int(logits[0, -1].argmax()))
            if row[-1] == EOS:
                return row[len(prompt) : -1]
    return row[len(prompt) :]


def test_answers_in_batches_are_those_without_batch_and_cache(model):
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 9, 40, 9, 17, 5, 1, 30]
    prompts = [rng.integers(6, VOCABULARY, n).astype(np.int32) for n in lengths]
    budget = [int(n) for n in rng.integers(1, 12, len(prompts))]
    model.eval()
    expected = [without_cache(model, *each) for each in zip(prompts, budget, strict=True)]
    assert len({tuple(each) for each in expected}) == len(prompts)
    for size in (16, 3, 1):
        assert generate([model], prompts, budget, EOS, Sampling(), size) == expected


def test_what_is_drawn_for_a_prompt_does_not_depend_on_its_batch(model):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(6, VOCABULARY, n).astype(np.int32) for n in (4, 12, 7, 1, 25)]
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
    together, one_by_one = (generate([model], prompts, [8] * 5, EOS, sampling, size) for size in (5, 1))
    assert together == one_by_one != generate([model], prompts, [8] * 5, EOS, Sampling(), 5)


def test_a_batch_holds_prompts_of_similar_length():
    lengths = [20, 20, 84, 85, 170, 300, 610, 900]
    assert list(_alike(lengths, 8, *IN_A_BATCH)) == [(0, 3), (3, 5), (5, 6), (6, 8)]
    assert list(_alike(lengths, 2, *IN_A_BATCH)) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert list(_alike(lengths, 8, 0, 0)) == [(0, 2), *((i, i + 1) for i in range(2, 8))]
