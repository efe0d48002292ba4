"""Where gradients wait for their factor, and where Adam's kernel takes it."""

import math
from types import SimpleNamespace

import pytest

from nemotron_sft.train.compat import optimizer
from nemotron_sft.train.compat.adam import Factors


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
