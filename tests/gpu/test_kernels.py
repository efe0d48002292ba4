"""Our kernels against those that they stand in for, on a GPU: python -m pytest tests/gpu/test_kernels.py"""

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


def test_three_steps_of_adam_are_those_of_transformer_engine():
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


BF16 = torch.bfloat16
COUNTS = torch.tensor([0, 1, 130, 0, 4000, 64, 63, 900, 0])  # tokens of experts


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def near(ours, theirs, tolerance):
    """Whether two results differ by less than `tolerance`, both of the same dtype and shape."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1024), (777, 2688), (4099, 5120), (4099, 8192)])
def test_norms_are_those_of_transformer_engine(rows, hidden, centered):
    import transformer_engine.pytorch  # noqa: F401 -- loads the extension
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.constants import TE_DType

    from nemotron_sft.train.kernels import norms

    x, gradient, weight = random(rows, hidden), random(rows, hidden), random(hidden)
    given = (x, weight, 1e-5, None, None, TE_DType[BF16], 0, centered)
    assert norms.eligible(*given) is (hidden in (2688, 5120))
    theirs, ours = extension.rmsnorm_fwd(*given), norms.forward(*given)
    assert near(ours[0], theirs[0], 1e-3) and near(ours[2], theirs[2], 1e-6)
    back = (gradient, x, theirs[2], weight, 0, centered)
    assert norms.eligible_backward(*back) is norms.eligible(*given)
    for one, other in zip(norms.backward(*back), extension.rmsnorm_bwd(*back), strict=True):
        assert near(one, other, 4e-3)


@pytest.mark.parametrize(("rows", "channels", "group"), [(1, 512, 256), (777, 4096, 512), (100, 3072, 1024)])
def test_gradients_of_grouped_norms_are_those_of_mamba_ssm(rows, channels, group):
    gated = pytest.importorskip("mamba_ssm.ops.triton.layernorm_gated")
    from nemotron_sft.train.kernels import norms

    x, gradient, weight = random(rows, channels), random(rows, channels), random(channels)
    scale = gated._layer_norm_fwd(x, weight, None, 1e-5, None, None, group, False, True)[2]
    given = (gradient, x, weight, None, 1e-5, None, scale, None, group, False, True)
    assert norms.eligible_grouped(*given)
    for one, other in zip(norms.backward_grouped(*given)[:2], gated._layer_norm_bwd(*given)[:2], strict=True):
        assert near(one, other, 4e-3)


@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 64), (2, 1000, 192), (1, 5000, 6144)])
@pytest.mark.parametrize("apart", [True, False])
def test_convolutions_are_those_of_causal_conv1d(batch, length, channels, apart):
    theirs = pytest.importorskip("causal_conv1d.cpp_functions")
    from nemotron_sft.train.kernels import convolution

    def wide():
        return random(batch, length, channels + 128)[:, :, 64:-64].transpose(1, 2)

    x, gradient = wide(), random(batch, length, channels).transpose(1, 2)
    weight, bias = random(channels, 4), random(channels)
    documents = (torch.arange(length, device="cuda", dtype=torch.int32) // 7).expand(batch, -1).contiguous()
    documents = documents if apart else None
    into = [wide(), wide()]
    assert convolution.eligible(x, weight, bias, documents, None, None, gradient, into[0])
    expected = theirs.causal_conv1d_fwd_function(x, weight, bias, documents, None, None, True)
    assert near(convolution.forward(x, weight, bias, documents, True), expected, 1e-3)
    ours = convolution.backward(x, weight, bias, gradient, documents, into[0], True)
    expected = theirs.causal_conv1d_bwd_function(x, weight, bias, gradient, documents, None, None, into[1], False, True)
    assert ours[0] is into[0]
    for one, other in zip(ours[:3], expected[:3], strict=True):
        assert near(one, other, 4e-3)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("out", "into"), [(64, 128), (1856, 2688), (1000, 520)])
def test_gradients_of_experts_are_those_of_grouped_products(out, into, dtype, first):
    from nemotron_sft.train.kernels import grouped

    ends = COUNTS.cumsum(0).int().cuda()
    gradient, tokens = random(int(COUNTS.sum()), out), random(int(COUNTS.sum()), into)
    whole = torch.randn(len(COUNTS), out * into + 64, device="cuda").to(dtype)
    buffer, before = whole[:, : out * into].view(-1, out, into), whole.clone()
    assert grouped.eligible_gradients(gradient, tokens, buffer)
    expected = torch._grouped_mm(gradient.t(), tokens, offs=ends).to(dtype)
    expected = expected if first else buffer + expected
    grouped.weight_gradients(gradient, tokens, ends, buffer, first)
    assert near(buffer, expected, 4e-3)
    assert first or torch.equal(buffer[COUNTS == 0], expected[COUNTS == 0])
    assert not first or not buffer[COUNTS == 0].any()
    assert torch.equal(whole[:, out * into :], before[:, out * into :])


def test_the_norm_of_gradients_is_that_of_transformer_engine():
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

    from nemotron_sft.train.kernels import squares

    wide = random(1 << 20)
    gradients = [random(3, 50_000), wide[1:], wide[:0], random(1).view(()), random(300).float()]
    assert squares.eligible(gradients)
    ours = multi_tensor_applier(squares.l2norm, None, [gradients], False)[0]
    flag = torch.zeros(1, dtype=torch.int, device="cuda")
    theirs = [multi_tensor_applier(multi_tensor_l2norm, flag, [[one]], False)[0] for one in gradients if one.numel()]
    assert near(ours, torch.stack(theirs).norm().view(1), 1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("out", "into"), [(64, 128), (1856, 2688), (1000, 520)])
def test_products_with_experts_weights_are_those_of_grouped_products(out, into, transposed):
    from nemotron_sft.train.kernels import grouped

    ends = COUNTS.cumsum(0).int().cuda()
    tokens = random(int(COUNTS.sum()), into)
    weights = random(len(COUNTS), *((into, out) if transposed else (out, into)))
    assert grouped.eligible(tokens, weights)
    expected = torch._grouped_mm(tokens, weights if transposed else weights.transpose(1, 2), offs=ends)
    assert near(grouped.multiply(tokens, weights, ends, transposed), expected, 4e-3)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"), [(1, 8, 3), (4000, 2688, 1000), (5000, 1000, 2), (999, 64, 1 << 17)]
)
def test_the_gradient_of_an_embedding_is_that_of_pytorch(tokens, hidden, vocabulary, dtype):
    from nemotron_sft.train.kernels import embedding

    gradient, ids = random(tokens, hidden), torch.randint(0, vocabulary, (tokens,), device="cuda")
    buffer = torch.randn(vocabulary, hidden, device="cuda").to(dtype)
    expected = buffer.double().index_add(0, ids, gradient.double())
    assert embedding.eligible(gradient, buffer)
    embedding.add_gradient(gradient, ids, buffer)
    assert near(buffer, expected.to(dtype), 4e-3)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1000, 32_003, 131_072])
def test_losses_and_their_gradient_are_those_of_transformer_engine(vocabulary, dtype):
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    from nemotron_sft.train.kernels import cross_entropy

    logits, labels = torch.randn(777, 1, vocabulary, device="cuda").mul(4).to(dtype), torch.arange(777).cuda()[:, None]
    labels[5] = -100
    results = []
    for of in (parallel_cross_entropy, cross_entropy.losses_of):
        for weight in (1.0, torch.rand(777, 1, generator=torch.Generator().manual_seed(0)).cuda()):
            leaf = logits.clone().requires_grad_()
            losses = of(leaf * 1, labels)
            (losses * weight).sum().backward()
            results.append((losses.detach(), leaf.grad))
    assert cross_entropy.eligible(logits, labels, None)
    for theirs, ours in zip(results[:2], results[2:], strict=True):
        assert near(ours[0], theirs[0], 1e-6) and near(ours[1], theirs[1], 3e-3 if dtype == BF16 else 1e-5)
    assert not cross_entropy.eligible(logits.half(), labels, None)
    assert not cross_entropy.eligible(logits[:, :, 1:], labels, None)
