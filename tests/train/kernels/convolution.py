"""The convolution's kernels, run by Triton's interpreter, against plain PyTorch.

TRITON_INTERPRET=1 python -m pytest tests/train/kernels/convolution.py
"""

import pytest
import torch
import torch.nn.functional as F

from nemotron_sft.train.kernels import convolution

CUT = 2**-7  # the interpreter cuts a float32 off where it makes a bf16 of it, a GPU rounds it
ROW = 128  # numbers of a token in memory; those of x stand in their midst


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(convolution, "FORWARD_BLOCK", (16, 32))
    monkeypatch.setattr(convolution, "BACKWARD_BLOCK", (16, 32))


def rows(batch, dim, seqlen):
    """Random (batch, dim, seqlen), bf16, in the midst of (batch, seqlen, ROW) of NaN; returns both."""
    whole = torch.full((batch, seqlen, ROW), torch.nan, dtype=torch.bfloat16)
    view = whole[:, :, 32 : 32 + dim].transpose(1, 2)
    return view.copy_(torch.randn(batch, dim, seqlen)), whole


def documents(batch, seqlen):
    """Documents of 1, 2, 3, 1, 1, 2, 5, 2, 1 and 9 tokens, and of the rest; some start around a block's border."""
    starts = torch.tensor([1, 3, 6, 7, 8, 10, 15, 17, 18, 27])
    token = torch.arange(seqlen) + torch.arange(batch)[:, None]  # the second sequence starts one token later
    return (token[:, :, None] >= starts).sum(2, dtype=torch.int32)


def arguments(batch, dim, seqlen, bias=True, seq_idx=True, dtype=torch.bfloat16):
    """x, weight, bias, seq_idx and dout."""
    torch.manual_seed(seqlen)
    weight, offset = torch.randn(dim, 4).to(dtype), torch.randn(dim).to(dtype) if bias else None
    docs = documents(batch, seqlen) if seq_idx else None
    return rows(batch, dim, seqlen)[0], weight, offset, docs, rows(batch, dim, seqlen)[0]


def expected(x, weight, bias, seq_idx, dout, silu):
    """out, dx, dweight and dbias, float32, by gathering the four tokens of each."""
    leaves = [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in (x, weight, bias)]
    x, weight, bias = leaves
    y = 0 if bias is None else bias[:, None]
    for shift in range(4):
        earlier = F.pad(x, (shift, 0))[:, :, : x.shape[2]]
        if seq_idx is not None:
            same = F.pad(seq_idx, (shift, 0), value=-1)[:, : x.shape[2]] == seq_idx
            earlier = earlier * same[:, None]
        y = y + weight[:, 3 - shift, None] * earlier
    out = F.silu(y) if silu else y
    out.backward(dout.float())
    return out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


def check(x, weight, bias, seq_idx, dout, silu=True):
    """Compare forward and backward; where a token is padding, the output is zero, and gradients flow all the same."""
    assert convolution.eligible(x, weight, bias, seq_idx, dout=dout)
    out, dx, dweight, dbias = expected(x, weight, bias, seq_idx, dout, silu)
    if seq_idx is not None:
        out = out * (seq_idx >= 0)[:, None]
    found = convolution.forward(x, weight, bias, seq_idx, silu)
    assert found.dtype == x.dtype and found.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(found.float(), out, rtol=CUT, atol=1e-6)

    found, *sums, states = convolution.backward(x, weight, bias, dout, seq_idx, None, silu)
    assert found.dtype == x.dtype and found.stride() == torch.empty_like(x).stride() and states is None
    torch.testing.assert_close(found.float(), dx, rtol=CUT, atol=1e-5)
    for tensor, exact, like in zip(sums, (dweight, dbias), (weight, bias), strict=True):
        if like is None:
            assert tensor is None
            continue
        assert tensor.dtype == like.dtype and tensor.stride() == like.stride()
        rounding = 2**-8 if like.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(tensor.float(), exact, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("seqlen", [2, 16, 35])
@pytest.mark.parametrize("seq_idx", [True, False], ids=["documents", "one"])
def test_every_length_and_a_dim_that_is_no_multiple_of_the_block(small_blocks, seqlen, seq_idx):
    check(*arguments(2, 40, seqlen, seq_idx=seq_idx))


@pytest.mark.parametrize(
    ("bias", "silu", "dtype"),
    [(False, True, torch.bfloat16), (True, False, torch.bfloat16), (True, True, torch.float32)],
    ids=["no bias", "no silu", "float32"],
)
def test_kinds_of_weights(small_blocks, bias, silu, dtype):
    check(*arguments(1, 32, 21, bias, dtype=dtype), silu)


def test_padding_before_within_and_after_documents(small_blocks):
    x, weight, bias, seq_idx, dout = arguments(1, 32, 35)
    for padding in (slice(0, 5), slice(14, 19), slice(30, None)):
        seq_idx[:, padding] = -1
    check(x, weight, bias, seq_idx, dout)


def test_dx_is_written_in_place_and_nothing_around_it_and_gradients_are_always_the_same(small_blocks):
    x, weight, bias, seq_idx, dout = arguments(2, 24, 18)
    first, *sums, _ = convolution.backward(x, weight, bias, dout, seq_idx, None, True)
    dx, whole = rows(2, 24, 18)
    assert convolution.eligible(x, weight, bias, seq_idx, dout=dout, dx=dx)
    found, *again, _ = convolution.backward(x, weight, bias, dout, seq_idx, dx, True)
    assert found is dx and torch.equal(dx, first) and all(map(torch.equal, sums, again))
    assert whole[:, :, :32].isnan().all() and whole[:, :, 56:].isnan().all()


def test_what_is_left_to_causal_conv1d():
    x, weight, bias, seq_idx, dout = arguments(2, 16, 20)
    assert convolution.eligible(x, weight, bias, seq_idx, dout=dout, dx=dout)
    for change in (
        {"x": x.float()},
        {"x": x.contiguous()},  # a channel's tokens next to each other
        {"x": x[:, :0], "weight": weight[:0], "bias": bias[:0]},
        {"x": x[:, 1:9], "weight": weight[1:9], "bias": bias[1:9]},  # not at a multiple of 16 bytes
        {"x": x[:, :12], "weight": weight[:12], "bias": bias[:12]},
        {"weight": weight[:, :3].contiguous()},
        {"weight": weight.t().contiguous().t()},
        {"weight": weight.half(), "bias": bias.half()},
        {"bias": bias.float()},
        {"seq_idx": seq_idx.long()},
        {"seq_idx": seq_idx[:1].expand(2, -1)},
        {"initial_states": x},
        {"final_states": x},
        {"dout": dout.contiguous()},
        {"dx": x[:, :8]},
    ):
        assert not convolution.eligible(**{"x": x, "weight": weight, "bias": bias, "seq_idx": seq_idx} | change), change
