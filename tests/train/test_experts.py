"""Weight gradients of experts: where they are added, and what experts without tokens get."""

from types import SimpleNamespace

import pytest

from nemotron_sft.train.compat import experts

COUNTS = [3, 0, 5, 0]


@pytest.fixture
def made():
    """gradient (T, out), tokens (T, in) and ends of experts of which two have no token, with what they should get."""
    import torch

    torch.manual_seed(0)
    gradient, tokens = torch.randn(sum(COUNTS), 8).bfloat16(), torch.randn(sum(COUNTS), 16).bfloat16()
    parts = zip(gradient.float().split(COUNTS), tokens.float().split(COUNTS), strict=True)
    expected = torch.stack([one.T @ other for one, other in parts])
    return gradient, tokens, torch.tensor(COUNTS).cumsum(0, dtype=torch.int32), expected


def test_experts_without_tokens_have_gradients_of_zero(made, monkeypatch):
    """Some GPUs leave there what was in the memory before."""
    import torch

    gradient, tokens, ends, expected = made
    product = torch._grouped_mm

    def leaves_garbage(*args, **kwargs):
        result = product(*args, **kwargs)
        result[[count == 0 for count in COUNTS]] = torch.nan
        return result

    monkeypatch.setattr(torch, "_grouped_mm", leaves_garbage)
    found = experts._gradients_of_weights(gradient, tokens, ends)
    assert torch.allclose(found.float(), expected, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_the_first_gradients_of_a_step_are_put_there_and_later_ones_added(made, side_by_side):
    import torch

    *given, expected = made
    whole = torch.full((4, 8, 16), 7.0)  # that of the step before: core has not cleared it
    buffers = list(whole) if side_by_side else [each.clone() for each in whole]
    weights = [SimpleNamespace(main_grad=each, grad_added_to_main_grad=False) for each in buffers]
    for times in (1, 2):
        experts._add_to_main_grads(tuple(weights), *given)
        assert torch.allclose(torch.stack(buffers), times * expected, rtol=1e-2, atol=0.1)
    assert all(weight.grad_added_to_main_grad for weight in weights)
