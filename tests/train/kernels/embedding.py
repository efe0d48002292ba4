"""The gradient of an embedding, in Triton's interpreter."""

import pytest
import torch

from nemotron_sft.train.kernels import embedding


@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(1, 8, 3), (40, 72, 5), (100, 33, 1000)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rows_of_tokens_are_added_up(tokens, hidden, vocabulary, dtype, near, monkeypatch):
    monkeypatch.setattr(embedding, "WIDTH", 32)
    torch.manual_seed(0)
    gradient, ids = torch.randn(tokens, hidden).bfloat16(), torch.randint(0, vocabulary, (tokens,))
    buffer = torch.randn(vocabulary, hidden).to(dtype)
    expected = buffer.double().index_add(0, ids, gradient.double())
    others = buffer.clone()
    embedding.add_gradient(gradient, ids, buffer)
    assert (buffer.double() - expected).norm() < near * expected.norm()
    unused = [one for one in range(vocabulary) if one not in ids]
    assert torch.equal(buffer[unused], others[unused])
