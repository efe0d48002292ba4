"""Adam's update, in Triton's interpreter, against the same arithmetic in PyTorch."""

import pytest
import torch

from nemotron_sft.train.kernels.adam import update_together

FP32, BF16 = torch.float32, torch.bfloat16


def parts_of(master):
    """A master weight as its bf16 weight and the remainder."""
    bits = master.view(torch.int32)
    remainder = bits & 0xFFFF
    remainder = torch.where(remainder >= 1 << 15, remainder - (1 << 16), remainder).to(torch.int16)
    return ((bits >> 16) + (remainder < 0).int()).to(torch.int16).view(BF16), remainder


def whole(weight, remainder):
    """The master weight of a bf16 weight and its remainder."""
    low = remainder.to(torch.int32)
    high = weight.view(torch.int16).to(torch.int32) - (low < 0).int()
    return ((high << 16) | (low & 0xFFFF)).view(FP32)


@pytest.mark.parametrize(
    ("size", "decoupled", "factor", "first", "second", "gradients"),
    [
        (5000, True, 0.37, FP32, FP32, FP32),
        (2048, False, None, FP32, FP32, FP32),
        (3001, True, 0.5, BF16, BF16, BF16),
        (3001, True, 0.5, BF16, FP32, FP32),
    ],
)
def test_four_steps_are_what_adam_says(size, decoupled, factor, first, second, gradients):
    torch.manual_seed(0)
    master = torch.randn(size)
    master[:3] = torch.tensor([0.0, 1 - 2.0**-24, -1e-30])
    m, v = torch.zeros(size, dtype=first), torch.zeros(size, dtype=second)
    exact = first == second == FP32
    weight, remainder = parts_of(master)
    state = [weight, m.clone(), v.clone(), remainder]
    lr, b1, b2, eps, decay = 1e-2, 0.9, 0.95, 1e-8, 0.1
    for step in range(1, 5):
        g = torch.randn(size).to(gradients)
        c1, c2 = 1 - b1**step, 1 - b2**step
        scale = None if factor is None else torch.tensor([factor])
        both = [(g, *state), (g.clone(), *(each.clone() for each in state))]
        update_together(both, scale, (lr, b1, 1 - b1, b2, 1 - b2, c1, c2, eps, decay), decoupled)
        assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
        x = g.float() * (factor or 1.0) + (0 if decoupled else decay * master)
        m = (b1 * m.float() + (1 - b1) * x).to(first)
        v = (b2 * v.float() + (1 - b2) * x * x).to(second)
        found = whole(state[0], state[3])
        for moment, expected in ((state[1], m), (state[2], v)):
            near = {"rtol": 1e-6, "atol": 1e-6} if moment.dtype == FP32 else {"rtol": 2e-2, "atol": 1e-2}
            torch.testing.assert_close(moment, expected, **near)
        if exact:
            master = master - lr * (m / c1 / ((v / c2).sqrt() + eps) + (decay * master if decoupled else 0))
            torch.testing.assert_close(found, master, rtol=1e-6, atol=1e-7)
            master = found  # no drift from one step to the next
        tie = state[3] == -(1 << 15)
        assert torch.equal(state[0][~tie], found.bfloat16()[~tie])  # rounded to nearest
