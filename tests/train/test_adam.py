"""Our kernel for Adam, run by Triton's interpreter, against the same arithmetic in PyTorch."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nemotron_sft.train.compat import optimizer
from nemotron_sft.train.compat.adam import Factors

CHECK = """
import torch
from nemotron_sft.train.compat import adam

torch.manual_seed(0)
for size, decoupled, factor, first, second, gradients in (
    (5000, True, 0.37, torch.float32, torch.float32, torch.float32),
    (2048, False, None, torch.float32, torch.float32, torch.float32),
    (3001, True, 0.5, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (3001, True, 0.5, torch.bfloat16, torch.float32, torch.float32),
):
    master = torch.randn(size)
    master[:3] = torch.tensor([0.0, 1 - 2.0**-24, -1e-30])
    m, v = torch.zeros(size, dtype=first), torch.zeros(size, dtype=second)
    exact = first == second == torch.float32
    bits = master.view(torch.int32)
    remainder = (bits & 0xFFFF).to(torch.int32)
    remainder = torch.where(remainder >= 1 << 15, remainder - (1 << 16), remainder).to(torch.int16)
    weight = ((bits >> 16) + (remainder < 0).int()).to(torch.int16).view(torch.bfloat16)
    state = [weight, m.clone(), v.clone(), remainder]
    lr, b1, b2, eps, decay = 1e-2, 0.9, 0.95, 1e-8, 0.1
    for step in range(1, 5):
        g = torch.randn(size).to(gradients)
        c1, c2 = 1 - b1**step, 1 - b2**step
        scale = None if factor is None else torch.tensor([factor])
        both = [(g, *state), (g.clone(), *(each.clone() for each in state))]
        adam.launch(both, scale, (lr, b1, 1 - b1, b2, 1 - b2, c1, c2, eps, decay), decoupled)
        assert all(torch.equal(one, other) for one, other in zip(*both))
        x = g.float() * (factor or 1.0) + (0 if decoupled else decay * master)
        m = (b1 * m.float() + (1 - b1) * x).to(first)
        v = (b2 * v.float() + (1 - b2) * x * x).to(second)
        if exact:
            master = master - lr * (m / c1 / ((v / c2).sqrt() + eps) + (decay * master if decoupled else 0))
        low = state[3].to(torch.int32)
        high = state[0].view(torch.int16).to(torch.int32) - (low < 0).int()
        found = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
        for moment, expected in ((state[1], m), (state[2], v)):
            near = dict(rtol=1e-6, atol=1e-6) if moment.dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)
            torch.testing.assert_close(moment, expected, **near)
        if exact:
            torch.testing.assert_close(found, master, rtol=1e-6, atol=1e-7)
            master = found  # no drift from one step to the next
        tie = state[3] == -(1 << 15)
        assert torch.equal(state[0][~tie], found.bfloat16()[~tie])  # rounded to nearest
print("equal")
"""


def test_the_kernel_does_what_adam_says():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_a_factor_is_taken_once_and_a_gradient_that_nobody_took_is_told():
    import torch

    large, small = torch.zeros(1 << 16), torch.zeros(8)
    factors, factor = Factors(), torch.ones(1)
    assert factors.put([large, small], factor) == [small]
    assert factors.take(large) is factor and factors.take(large) is None
    factors.put([large], factor)
    with pytest.raises(RuntimeError, match="were not scaled"):
        factors.put([large], factor)


@pytest.mark.parametrize(
    ("change", "replaced", "waits"),
    [
        ({}, True, True),
        ({"grad_norm_skip_threshold": 10.0}, True, False),
        ({"optimizer_cpu_offload": True}, False, False),
        ({"main_params_dtype": "torch.float16"}, False, False),
        ({"optimizer": "sgd"}, False, False),
    ],
)
def test_gradients_wait_only_where_adam_surely_takes_their_factor(monkeypatch, change, replaced, waits):
    values = {
        "optimizer": "adam", "use_precision_aware_optimizer": True, "store_param_remainders": True, "clip_grad": 1.0,
        "main_params_dtype": "torch.float32", "optimizer_cpu_offload": False, "grad_norm_skip_threshold": math.inf,
    }  # fmt: skip
    called = {}
    monkeypatch.setattr(optimizer, "read_memory_at_full_speed", lambda factors: called.update(adam=factors))
    monkeypatch.setattr(optimizer, "scale_gradients_once", lambda factors: called.update(scaling=factors))
    optimizer.shorten_the_optimizers_step(SimpleNamespace(**values | change))
    assert ("adam" in called) is replaced and (called["scaling"] is not None) is waits
