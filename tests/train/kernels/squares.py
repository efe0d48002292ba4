"""The norm of many tensors, in Triton's interpreter."""

import pytest
import torch

from nemotron_sft.train.kernels import squares

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(squares, "CHUNK", 256)
    monkeypatch.setattr(squares, "BLOCK", 64)


def between_nans(number, dtype=BF16, after=0):
    """Random numbers, with NaN before and after them that nobody may read; `after` numbers after a multiple of 64."""
    wide = torch.full((64 + after + number + 64,), torch.nan, dtype=dtype)
    numbers = wide[64 + after : -64]
    return numbers.copy_(torch.randn(number))


@pytest.mark.parametrize(
    "make",
    [
        lambda: [between_nans(1)],
        lambda: [between_nans(number) for number in (1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000)],
        lambda: [between_nans(number, F32) for number in (1, 64, 255, 256, 257)],
        lambda: [between_nans(300, dtype, after) for dtype in (BF16, F32) for after in range(9)],
        lambda: [between_nans(70), between_nans(300, F32), between_nans(2, BF16, 1), between_nans(5, F32, 1)],
        lambda: [torch.empty(0, dtype=BF16), between_nans(9, F32), torch.empty(0), between_nans(12).view(3, 4)],
        lambda: [between_nans(1).view(())],
        lambda: list(between_nans(999).split([100, 333, 7, 559])),
    ],
    ids=["one", "borders", "fp32", "unaligned", "mixed", "empty", "scalar", "beside"],
)
def test_the_norm_is_that_of_all_numbers(make):
    torch.manual_seed(0)
    tensors = make()
    assert squares.eligible(tensors)
    found, nothing = squares.l2norm(1 << 16, None, [tensors], False)
    expected = sum(tensor.double().square().sum() for tensor in tensors).sqrt()
    assert found.shape == (1,) and found.dtype == F32 and nothing is None
    assert (found - expected).abs() < 1e-6 * expected
    assert torch.equal(found, squares.l2norm(1 << 16, None, [tensors], False)[0])


def test_nothing_has_the_norm_zero():
    assert squares.l2norm(1 << 16, None, [[torch.empty(0), torch.empty(0, dtype=BF16)]])[0].tolist() == [0.0]


def test_changed_numbers_and_other_tensors_are_seen():
    tensors = [torch.ones(300), torch.ones(724)]
    assert squares.l2norm(1 << 16, None, [tensors])[0].tolist() == [32.0]
    tensors[0].fill_(0), tensors[1][1:].fill_(0)
    assert squares.l2norm(1 << 16, None, [tensors])[0].tolist() == [1.0]
    assert squares.l2norm(1 << 16, None, [[torch.full((12,), 2.0), *tensors]])[0].tolist() == [7.0]


def test_not_every_tensor_can_be_read():
    assert not squares.eligible([torch.ones(3), torch.ones(3).half()])
    assert not squares.eligible([torch.ones(3, 3).t()])
    assert not squares.eligible([torch.ones(3).double()])
