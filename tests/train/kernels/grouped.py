"""Products of tokens with their experts' weights, and weight gradients of experts, in Triton's interpreter.

Its products know float16, not bfloat16.
"""

import pytest
import torch

from nemotron_sft.train.kernels import grouped

COUNTS = [0, 1, 37, 0, 64, 100, 32, 5, 0]
ROOM = 48  # numbers between one expert's gradient and the next one's


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, value in {"ROWS": 32, "WIDE": 32, "NARROW": 16, "STEP": 32, "STRIP": 2}.items():
        monkeypatch.setattr(grouped, name, value)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("out", "into"), [(72, 104), (128, 64), (40, 200)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_gradients_are_those_of_each_expert_alone(out, into, dtype, near, first):
    torch.manual_seed(0)
    gradient, tokens = torch.randn(sum(COUNTS), out).half(), torch.randn(sum(COUNTS), into).half()
    wide = torch.randn(len(COUNTS), out * into + ROOM).to(dtype)
    before = wide.clone()
    buffer = wide[:, : out * into].view(len(COUNTS), out, into)
    parts = zip(gradient.float().split(COUNTS), tokens.float().split(COUNTS), strict=True)
    expected = torch.stack([one.T @ other for one, other in parts]) + (0 if first else buffer.float())
    grouped.weight_gradients(gradient, tokens, torch.tensor(COUNTS).cumsum(0).int(), buffer, first)
    assert (buffer.float() - expected).norm() < near * expected.norm()
    without = [expert for expert, count in enumerate(COUNTS) if not count]
    assert torch.equal(buffer[without].float(), expected[without])
    assert torch.equal(wide[:, out * into :], before[:, out * into :])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("out", "into"), [(72, 104), (128, 64), (40, 200)])
def test_tokens_are_multiplied_with_their_experts_weight(out, into, transposed, monkeypatch):
    torch.manual_seed(0)
    room = torch.full((sum(COUNTS) + ROOM, out), torch.nan, dtype=torch.float16)
    monkeypatch.setattr(torch, "empty", lambda rows, columns, **given: room[:rows])
    tokens, weights = torch.randn(sum(COUNTS), into).half(), torch.randn(len(COUNTS), out, into).half()
    parts = zip(tokens.float().split(COUNTS), weights.float(), strict=True)
    expected = torch.cat([one @ other.T for one, other in parts])
    given = weights.transpose(1, 2).contiguous() if transposed else weights
    found = grouped.multiply(tokens, given, torch.tensor(COUNTS).cumsum(0).int(), transposed)
    assert found.shape == expected.shape and (found.float() - expected).norm() < 1e-3 * expected.norm()
    assert room[sum(COUNTS) :].isnan().all()  # an expert's last tile ends with its tokens
