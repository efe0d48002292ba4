"""Our kernel for Adam against Transformer Engine's, on a GPU: python -m pytest tests/gpu/test_adam_kernel.py"""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def trained(gradients, factor, factors=None):
    """Weights and states after three steps: gradients scaled before, or by Adam itself."""
    import transformer_engine.pytorch  # noqa: F401 -- loads the extension
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.optimizers import FusedAdam, multi_tensor_applier

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn_like(each).mul(0.02).bfloat16()) for each in gradients]
    adam = FusedAdam(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, master_weights=True,
                     use_decoupled_grad=True, store_param_remainders=True)  # fmt: skip
    for step in range(3):
        torch.manual_seed(step)
        given = [each.normal_() for each in gradients]
        for weight, gradient in zip(weights, given, strict=True):
            weight.decoupled_grad = gradient
        now = factors.put(given, factor) if factors else given
        if now:
            overflow = torch.zeros(1, dtype=torch.int, device="cuda")
            multi_tensor_applier(extension.multi_tensor_scale_tensor, overflow, [now, now], factor)
        adam.step()
    return weights, [adam.state[weight] for weight in weights]


def test_three_steps_are_those_of_transformer_engine():
    from nemotron_sft.train.compat.adam import Factors, read_memory_at_full_speed

    sizes = [(1856, 2688), (1856, 2688), (257, 513), (2688,)]  # aligned, odd, and too small for a launch
    gradients = [torch.empty(*size, device="cuda") for size in sizes]
    factor, factors = torch.tensor([0.37], device="cuda"), Factors()
    theirs, their_states = trained(gradients, factor)
    read_memory_at_full_speed(factors)
    ours, our_states = trained(gradients, factor, factors)
    for one, other, state, their_state in zip(ours, theirs, our_states, their_states, strict=True):
        assert (one == other).float().mean() > 0.9999 and (one - other).abs().max() <= 2.0**-8 * other.abs().max()
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], their_state[name], rtol=1e-5, atol=1e-6)
