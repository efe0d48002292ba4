"""RMSNorm, forward and backward, in Triton's interpreter, against float64 and autograd."""

import math
from types import SimpleNamespace

import pytest
import torch

from nemotron_sft.train.kernels import norms

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-3  # large enough that a kernel without it is found
ROUNDED = 5e-3  # the interpreter cuts fp32 off to bf16, where a GPU rounds to nearest
NAME = SimpleNamespace(name="kBFloat16")  # as Transformer Engine names it


def between_nans(*shape):
    """Random bf16 rows, with rows of NaN before and after them that nobody may read."""
    wide = torch.full((shape[0] + 8, *shape[1:]), math.nan, dtype=BF16)
    wide[4:-4] = torch.randn(shape) * 0.2
    return wide[4:-4]


def reference(x, weight, gradient, size):
    """Output, 1 / rms of (rows, groups) and both gradients, in float64; `size` channels at a time are a group."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    groups = x.view(len(x), -1, size)
    scale = (groups.square().mean(-1, keepdim=True) + EPS).rsqrt()
    output = (groups * scale).view_as(x) * weight
    output.backward(gradient.double())
    return output.detach(), scale.detach().squeeze(-1), x.grad, weight.grad


def near(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    return (found.double() - expected).norm() < (ROUNDED if dtype == BF16 else 1e-5) * expected.norm()


@pytest.mark.parametrize(
    ("rows", "hidden", "processors", "step", "dtype", "centered", "given"),
    [
        (1, 64, 3, 1, BF16, False, False),
        (14, 200, 3, 1, F32, True, True),
        (15, 200, 3, 4, BF16, True, True),
        (9, 2688, 3, 1, BF16, False, False),
        (9, 2688, 3, 4, F32, False, True),
        (7, 4096, 3, 2, F32, True, False),
        (140, 64, 200, 1, F32, False, False),  # more partial sums than are added at a time
    ],
)
def test_rows_are_normalised_and_gradients_are_those_of_autograd(
    monkeypatch, rows, hidden, processors, step, dtype, centered, given
):
    monkeypatch.setattr(norms, "processors", lambda device: processors)
    monkeypatch.setattr(norms, "FORWARD", norms.FORWARD._replace(rows=step))
    monkeypatch.setattr(norms, "BACKWARD", norms.BACKWARD._replace(rows=step, programs=1))
    torch.manual_seed(0)
    x, gradient = between_nans(rows, hidden), between_nans(rows, hidden)
    weight = (torch.randn(hidden) * 0.3 + (0 if centered else 1)).to(dtype)
    expected = reference(x, weight.double() + centered, gradient, hidden)
    buffer = torch.full((rows + 4, hidden), 7, dtype=BF16)
    into = buffer[:rows] if given else None
    output, nothing, scale = norms.forward(x, weight, EPS, into, None, NAME, 0, centered)
    assert nothing is None and (output is into or not given) and (buffer[rows:] == 7).all()
    assert near(output, expected[0], BF16) and near(scale, expected[1].view(-1), F32)
    found = norms.backward(gradient, x, scale, weight, 1, centered)
    assert near(found[0], expected[2], BF16) and near(found[1], expected[3], dtype)
    again = norms.backward(gradient, x, scale, weight, 1, centered)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize(
    ("rows", "channels", "size", "step", "dtype"),
    [
        (1, 256, None, 1, BF16),
        (13, 4096, 512, 1, BF16),
        (13, 1536, 256, 1, F32),
        (6, 768, 256, 4, BF16),
        (11, 2048, 1024, 4, F32),
    ],
)
def test_gradients_of_groups_are_those_of_autograd(monkeypatch, rows, channels, size, step, dtype):
    monkeypatch.setattr(norms, "processors", lambda device: 6)
    monkeypatch.setattr(norms, "GROUPED", norms.GROUPED._replace(rows=step, programs=1))
    torch.manual_seed(0)
    x, gradient = between_nans(rows, channels), between_nans(rows, channels)
    weight = (torch.randn(channels) * 0.3 + 1).to(dtype)
    _, scale, *expected = reference(x, weight, gradient, size or channels)
    given = (gradient, x, weight, None, EPS, None, scale.t().reshape(-1).float(), None, size, False, True)
    found = norms.backward_grouped(*given)
    assert near(found[0], expected[0], BF16) and near(found[1], expected[1], dtype) and found[2:] == (None, None)
    again = norms.backward_grouped(*given)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


X, WEIGHT = torch.ones(4, 2688, dtype=BF16), torch.ones(2688, dtype=BF16)


@pytest.mark.parametrize(
    ("change", "eligible"),
    [
        ({}, True),
        ({"weight": WEIGHT.float(), "ln_out": X.clone()}, True),
        ({"inp": torch.nn.Parameter(X)}, True),
        ({"quantizer": object()}, False),
        ({"otype": SimpleNamespace(name="kFloat32")}, False),
        ({"ln_out": X.float()}, False),
        ({"ln_out": X[1:]}, False),
        ({"inp": X.float()}, False),
        ({"inp": X[:0]}, False),
        ({"inp": X[None]}, False),
        ({"inp": torch.ones(2688, 4, dtype=BF16).t()}, False),
        ({"inp": X[:, :2048].clone(), "weight": WEIGHT[:2048]}, False),  # Transformer Engine has a tuned kernel
        ({"inp": X[:, :128].clone(), "weight": WEIGHT[:128]}, False),
        ({"inp": X.view(1, -1).repeat(1, 2), "weight": WEIGHT.repeat(8)}, False),
        ({"weight": WEIGHT.half()}, False),
    ],
)
def test_other_norms_are_left_to_transformer_engine(change, eligible):
    given = {
        "inp": X, "weight": WEIGHT, "eps": EPS, "ln_out": None, "quantizer": None, "otype": NAME, "sm_margin": 0,
        "zero_centered_gamma": False,
    } | change  # fmt: skip
    assert norms.eligible(**given) is eligible
    if change.keys() & {"inp", "weight"} or not change:
        assert norms.eligible_backward(given["inp"], given["inp"], None, given["weight"], 0, False) is eligible


@pytest.mark.parametrize(
    ("change", "eligible"),
    [
        ({}, True),
        ({"group_size": 300}, False),
        ({"group_size": None}, False),
        ({"is_rms_norm": False}, False),
        ({"recompute_output": True}, False),
        ({"bias": WEIGHT}, False),
        ({"z": X}, False),
        ({"dy": X.float()}, False),
    ],
)
def test_other_grouped_norms_are_left_to_mamba_ssm(change, eligible):
    given = {
        "dy": X, "x": X, "weight": WEIGHT, "bias": None, "eps": EPS, "mean": None, "rstd": torch.ones(16),
        "group_size": 512, "is_rms_norm": True,
    } | change  # fmt: skip
    assert norms.eligible_grouped(**given) is eligible
