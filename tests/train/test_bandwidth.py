"""Where the gradient of an embedding goes."""

import pytest


@pytest.mark.parametrize("in_place", [True, False])
def test_the_gradient_of_an_embedding_is_added_once(in_place, monkeypatch):
    import torch

    pytest.importorskip("triton")
    from nemotron_sft.train.compat.bandwidth import _embedded
    from nemotron_sft.train.kernels import embedding

    monkeypatch.setattr(embedding, "eligible", lambda *given: in_place)
    monkeypatch.setattr(embedding, "add_gradient", lambda gradient, ids, buffer: buffer.index_add_(0, ids, gradient))
    weight, ids = torch.nn.Parameter(torch.randn(7, 4)), torch.tensor([[0, 3, 3], [6, 0, 3]])
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(7, 4), False
    found = _embedded().apply(ids, weight)
    assert torch.equal(found, weight[ids])
    scale = torch.randn(2, 3, 4)
    (found * scale).sum().backward()
    assert weight.grad_added_to_main_grad is in_place
    if not in_place:  # then core's hook adds it
        weight.main_grad += weight.grad
    assert torch.allclose(weight.main_grad, torch.ones(7, 4).index_add(0, ids.flatten(), scale.flatten(0, 1)))
