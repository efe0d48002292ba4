"""What a GPU run computes in other kernels than Megatron's, held against plain PyTorch, where the CPU can do that."""

import pytest
import torch

from nemotron_sft.train.compat.adapters import add_adapter
from nemotron_sft.train.compat.experts import OnDevice, _stacked


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(7, 5), (3, 1, 5)])
def test_an_adapter_added_inside_its_product(shape, scale):
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    given, weight = torch.randn(shape, **double), torch.randn(6, 5, **double)
    down, up = torch.randn(2, 5, **double), torch.randn(6, 2, **double)
    leaves = (given, weight, down, up)
    fused = add_adapter().apply(given @ weight.t(), given, down, up, scale)
    plain = given @ weight.t() + scale * (given @ down.t() @ up.t())
    assert torch.allclose(fused, plain, atol=1e-12)
    toward = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad(fused, leaves, toward), torch.autograd.grad(plain, leaves, toward), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_weights_side_by_side_are_one_tensor_and_others_are_not():
    whole = torch.randn(4, 3, 2)
    assert torch.equal(_stacked(list(whole)), whole)
    assert _stacked(list(whole)).data_ptr() == whole.data_ptr()
    padded = torch.randn(4, 10)  # with a gap behind each, as a buffer's alignment makes it
    places = [row[:6].view(3, 2) for row in padded]
    assert torch.equal(_stacked(places), torch.stack(places))
    assert _stacked(list(whole.flip(0))) is not None  # a copy, in order again
    assert _stacked([whole[0], whole[2], whole[1]]) is None
    assert _stacked(list(reversed(list(whole)))) is None


def test_numbers_of_tokens_stay_where_they_are():
    counts = torch.tensor([2, 0, 3])
    held = OnDevice(counts)
    assert held.tolist() is held and held.ends.tolist() == [2, 2, 5] and held.ends.dtype == torch.int32
