"""Losses of logits and their gradient, in Triton's interpreter."""

import pytest
import torch

from nemotron_sft.train.kernels import cross_entropy

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "THREADS", 16)


def given(rows, columns, dtype, scale=3.0):
    torch.manual_seed(0)
    logits = (torch.randn(rows, 1, columns) * scale).to(dtype)
    labels = torch.randint(0, columns, (rows, 1))
    labels[rows // 2] = -100
    return logits, labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 500, 512])
def test_losses_and_gradients_are_those_of_pytorch(columns, dtype, weighted):
    logits, labels = given(7, columns, dtype)
    weights = torch.rand(7, 1) if weighted else torch.ones(7, 1)
    expected_of = logits.float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(expected_of[:, 0], labels[:, 0], reduction="none")[:, None]
    (expected * weights).sum().backward()

    leaf = logits.detach().clone().requires_grad_()
    losses = cross_entropy.losses_of(leaf * 1, labels)
    (losses * weights).sum().backward()
    assert losses.shape == (7, 1) and losses.dtype == F32 and leaf.grad.dtype == dtype
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=2e-5)
    rounding = 1e-5 if dtype == F32 else (1 + weighted) * 2**-7
    torch.testing.assert_close(leaf.grad.float(), expected_of.grad, rtol=rounding, atol=2e-6)


def test_logits_stay_where_nobody_asks_for_a_gradient():
    logits, labels = given(5, 300, BF16)
    before = logits.clone()
    cross_entropy.losses_of(logits, labels)
    with torch.no_grad():
        cross_entropy.losses_of(logits.requires_grad_(), labels)
    assert torch.equal(logits, before)


def test_extreme_logits():
    logits = torch.full((4, 1, 200), -1e4)
    logits[0, 0, 3], logits[1, 0, :] = 3e38, -3e38
    logits[2, 0, 7:], logits[3, 0, 100] = -torch.inf, torch.nan
    labels = torch.tensor([[3], [5], [6], [0]])
    losses = cross_entropy.losses_of(logits, labels)[:, 0]
    expected = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0], reduction="none")
    torch.testing.assert_close(losses, expected, equal_nan=True)
