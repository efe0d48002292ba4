"""Mamba layers on the CPU: the scan is the recurrence, documents do not see each other, packed = alone."""

from itertools import pairwise

import numpy as np
import pytest
from test_batches import PACK, VOCABULARY, make_packs, token_losses


def recurrence(x, dt, A, B, C, document):
    """What `scan` computes, step by step: (n, t, h, p)."""
    import torch

    heads = x.shape[2] // B.shape[2]
    B, C = (each.repeat_interleave(heads, 2) for each in (B, C))  # (n, t, h, s)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        if t and document[0, t] != document[0, t - 1]:
            state = torch.zeros_like(state)
        step = dt[:, t, :, None, None]
        state = torch.exp(step * A[:, None, None]) * state + step * x[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (7, 16), (50, 16), (64, 16), (300, 128)])
def test_scan_is_the_recurrence_of_each_document(length, chunk):
    import torch

    from nemotron_sft.train.compat.mamba import scan

    rng = torch.Generator().manual_seed(length)
    double = dict(generator=rng, dtype=torch.double)
    document = torch.sort(torch.randint(0, 4, (1, length), generator=rng))[0]
    given = [torch.randn(2, length, 4, 8, **double), torch.rand(2, length, 4, **double), -4 * torch.rand(4, **double),
             *torch.randn(2, 2, length, 2, 6, **double)]  # fmt: skip
    given = [each.requires_grad_() for each in given]
    expected, found = recurrence(*given, document), scan(*given, document, chunk)
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn(expected.shape, **double)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (found, expected)), strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    single = scan(*(each.float() for each in given), document, chunk)
    assert torch.allclose(single.double(), expected, atol=1e-4)


def test_convolution_is_pytorchs_for_each_document():
    import torch

    from nemotron_sft.train.compat.mamba import convolve

    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((2, 40, 6), (6, 4), (6,)))
    ends = [0, 1, 3, 20, 40]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(ends).diff())[None]
    found = convolve(x, weight, bias, document)
    for start, end in pairwise(ends):
        alone = torch.nn.functional.conv1d(x[:, start:end].transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[
            ..., : end - start
        ]
        assert torch.allclose(found[:, start:end], alone.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("ends", "total"), [([0, 7], 7), ([0, 5, 7, 11], 16), ([0, 1, 1, 1, 4], 4), ([0, 0, 3], 3), ([0, 64, 100], 128)]
)
def test_tokens_have_the_numbers_of_their_documents(ends, total, bridge):
    """As core numbers them: what is beyond the last boundary is one document more."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    found = PackedSeqParams(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32), total_tokens=total).seq_idx
    lengths = np.diff([*ends, total])
    assert found.dtype == torch.int32 and found.tolist() == [np.repeat(np.arange(len(lengths)), lengths).tolist()]
    assert PackedSeqParams(cu_seqlens_q=torch.tensor(ends)).seq_idx is None


@pytest.fixture(scope="module", params=[16, 128])
def model(request, bridge):
    """A small hybrid with the layers of Nemotron 3: Mamba, attention, mixture of experts, and a plain MLP."""
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core.activations import squared_relu

    from nemotron_sft.train.compat.cpu import adapt_model

    with temporary_distributed_context("gloo"):
        provider = HybridModelProvider(
            hybrid_layer_pattern="ME*M-", hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
            kv_channels=16, mamba_num_heads=4, mamba_head_dim=16, mamba_num_groups=2, mamba_state_dim=16,
            mamba_chunk_size=request.param, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=48,
            moe_shared_expert_intermediate_size=96, activation_func=squared_relu, moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True, vocab_size=VOCABULARY, seq_length=PACK, init_method_std=0.3,
        )  # fmt: skip
        adapt_model(provider)
        provider.finalize()
        yield provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)[0].eval()


@pytest.mark.parametrize("told", [True, False])
def test_changing_one_document_leaves_the_losses_of_the_others(model, told, monkeypatch):
    if not told:  # a caller that leaves out total_tokens, as Bridge's step does for a model not called hybrid
        from megatron.bridge.training.utils import packed_seq_utils

        whole = packed_seq_utils.get_packed_seq_params
        monkeypatch.setattr(
            packed_seq_utils, "get_packed_seq_params", lambda batch: whole(batch | {"total_tokens": None})
        )
    records = make_packs([[10, 20, 30], [33, 31]])
    before, _ = token_losses(model, records)
    changed = records.copy()
    changed["input_ids"][0, 10:30] = (changed["input_ids"][0, 10:30] + 7) % VOCABULARY
    after, _ = token_losses(model, changed)
    inside = np.zeros(len(before), bool)
    inside[9:30] = True
    assert (after - before).abs()[inside].max() > 0.01
    assert (after - before).abs()[~inside].max() == 0


def test_packed_losses_are_those_of_the_documents_alone(model):
    import torch

    lengths = [[10, 20, 30], [33, 31], [64], [1, 2, 3, 50]]
    records = make_packs(lengths)
    losses, _ = token_losses(model, records)
    for i, (record, sizes) in enumerate(zip(records, lengths, strict=True)):
        for start, end in pairwise(np.cumsum([0, *sizes])):
            if end - start < 2:
                continue
            tokens = torch.from_numpy(record["input_ids"][start:end].astype(np.int64))[None]
            with torch.no_grad():
                alone = model(tokens[:, :-1], torch.arange(end - start - 1)[None], None, labels=tokens[:, 1:])[0]
            assert torch.allclose(alone, losses[i * PACK + start : i * PACK + end - 1], atol=1e-4)
