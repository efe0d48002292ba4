"""Our Triton kernels on a GPU, each beside what it stands in for and beside what the GPU can do at all.

    python bench/kernels.py            one table, about a minute

Sizes are those of a row of 32,768 tokens of Nemotron 3 Nano. The limit is the time that a plain copy of as many bytes
takes, or a dense matrix product of as many operations.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator

import torch

TOKENS, HIDDEN, EXPERTS, WIDTH, VOCABULARY = 32_768, 2_688, 128, 1_856, 131_072
INNER, CONVOLVED, PROJECTED, GROUP = 4_096, 6_144, 10_304, 512
BF16 = torch.bfloat16


def milliseconds(call: Callable, times: int = 10) -> float:
    """Median on the GPU's clock; a pause before each call lets the host run ahead."""
    for _ in range(2):
        call()
    found = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def random(*shape: int) -> torch.Tensor:
    """Normal numbers in bf16."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


def copying(size: int) -> float:
    """Milliseconds to read and write `size` bytes altogether."""
    source = torch.empty(size // 2, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def multiplying(operations: int) -> float:
    """Milliseconds for so many floating-point operations of a large square product."""
    side = 8192
    one, other = random(side, side), random(side, side)
    return milliseconds(lambda: one @ other) * operations / (2 * side**3)


def norms() -> Iterator[tuple]:
    """RMSNorm of hidden states, and of groups of channels."""
    import transformer_engine.pytorch  # noqa: F401 -- loads the extension
    import transformer_engine_torch as extension
    from mamba_ssm.ops.triton import layernorm_gated
    from transformer_engine.pytorch.constants import TE_DType

    from nemotron_sft.train.kernels import norms as ours

    x, gradient, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    size = x.numel() * 2
    given = (x, weight, 1e-5, None, None, TE_DType[BF16], 0, False)
    yield "RMSNorm", lambda: extension.rmsnorm_fwd(*given), lambda: ours.forward(*given), copying(2 * size)
    scale = extension.rmsnorm_fwd(*given)[2]
    back = (gradient, x, scale, weight, 0, False)
    yield "RMSNorm, backward", lambda: extension.rmsnorm_bwd(*back), lambda: ours.backward(*back), copying(3 * size)
    x, gradient, weight = random(TOKENS, INNER), random(TOKENS, INNER), random(INNER)
    scale = layernorm_gated._layer_norm_fwd(x, weight, None, 1e-5, None, None, GROUP, False, True)[2]
    grouped = (gradient, x, weight, None, 1e-5, None, scale, None, GROUP, False, True)
    theirs = layernorm_gated._layer_norm_bwd
    limit = copying(3 * x.numel() * 2)
    yield "RMSNorm of groups, backward", lambda: theirs(*grouped), lambda: ours.backward_grouped(*grouped), limit


def convolution() -> Iterator[tuple]:
    """The causal convolution of a Mamba layer, on a row of documents."""
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function

    from nemotron_sft.train.kernels import convolution as ours

    def channels(width: int) -> torch.Tensor:
        return random(1, TOKENS, width)[:, :, -CONVOLVED:].transpose(1, 2)

    x, gradient, into = channels(PROJECTED), channels(CONVOLVED), channels(PROJECTED)
    weight, bias = random(CONVOLVED, 4), random(CONVOLVED)
    documents = (torch.arange(TOKENS, device="cuda", dtype=torch.int32) // 400)[None].contiguous()
    size = TOKENS * CONVOLVED * 2
    yield (
        "convolution",
        lambda: causal_conv1d_fwd_function(x, weight, bias, documents, None, None, True),
        lambda: ours.forward(x, weight, bias, documents, True),
        copying(2 * size),
    )
    yield (
        "convolution, backward",
        lambda: causal_conv1d_bwd_function(x, weight, bias, gradient, documents, None, None, into, False, True),
        lambda: ours.backward(x, weight, bias, gradient, documents, into, True),
        copying(3 * size),
    )


def experts() -> Iterator[tuple]:
    """Products of a layer's experts, unevenly used, and their weight gradients, put into buffers of both kinds."""
    from nemotron_sft.train.kernels import grouped

    torch.manual_seed(0)
    used = torch.distributions.Gamma(3.0, 1.0).sample((EXPERTS,))
    counts = (used / used.sum() * 6 * TOKENS).long()
    ends = counts.cumsum(0).int().cuda()
    for out, into, transposed in ((WIDTH, HIDDEN, False), (HIDDEN, WIDTH, False), (WIDTH, HIDDEN, True)):
        tokens, weights = random(int(ends[-1]), into), random(EXPERTS, *((into, out) if transposed else (out, into)))
        yield (
            f"experts, {into} to {out}{', back' if transposed else ''}",
            functools.partial(torch._grouped_mm, tokens, weights if transposed else weights.mT, offs=ends),
            functools.partial(grouped.multiply, tokens, weights, ends, transposed),
            multiplying(2 * len(tokens) * out * into),
        )
    for out, into, dtype in ((WIDTH, HIDDEN, BF16), (HIDDEN, WIDTH, BF16), (WIDTH, HIDDEN, torch.float32)):
        gradient, tokens = random(int(ends[-1]), out), random(int(ends[-1]), into)
        buffer = torch.empty(EXPERTS, out, into, device="cuda", dtype=dtype)

        def theirs(gradient=gradient, tokens=tokens, buffer=buffer):
            buffer.copy_(torch._grouped_mm(gradient.t(), tokens, offs=ends))

        ours = functools.partial(grouped.weight_gradients, gradient, tokens, ends, buffer, True)
        name = f"experts' gradients, {out} x {into}, {str(dtype)[6:]}"
        yield name, theirs, ours, multiplying(2 * len(tokens) * out * into)


def embedding() -> Iterator[tuple]:
    """The gradient of an embedding; as in real text, some tokens are frequent."""
    from nemotron_sft.train.kernels import embedding as ours

    ids = (torch.rand(TOKENS, device="cuda") ** 4 * VOCABULARY).long()
    gradient, buffer = random(TOKENS, HIDDEN), torch.zeros(VOCABULARY, HIDDEN, device="cuda", dtype=BF16)

    def theirs():
        buffer.add_(torch.ops.aten.embedding_dense_backward(gradient, ids, VOCABULARY, -1, False))

    yield "embedding, backward", theirs, lambda: ours.add_gradient(gradient, ids, buffer), copying(6 * TOKENS * HIDDEN)


def losses() -> Iterator[tuple]:
    """Losses of half of the tokens, and the gradient of their logits."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    from nemotron_sft.train.kernels import cross_entropy

    logits = random(TOKENS // 2, 1, VOCABULARY).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS // 2, 1), device="cuda")
    ones = torch.ones(TOKENS // 2, 1, device="cuda")

    def theirs():
        torch.autograd.grad(parallel_cross_entropy(logits, labels, overwrite_input=True), logits, ones)

    def ours():
        torch.autograd.grad(cross_entropy.losses_of(logits, labels), logits, ones)

    yield "losses and gradient of logits", theirs, ours, copying(2 * logits.numel() * 2)


def squares() -> Iterator[tuple]:
    """The norm of 3.2 billion gradients."""
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

    from nemotron_sft.train.kernels import squares as ours

    gradients = list(torch.empty(640, WIDTH * HIDDEN, device="cuda", dtype=BF16).normal_())
    flag = torch.zeros(1, dtype=torch.int, device="cuda")
    limit = copying(640 * WIDTH * HIDDEN * 2)
    yield (
        "norm of gradients",
        lambda: multi_tensor_applier(multi_tensor_l2norm, flag, [gradients], False),
        lambda: multi_tensor_applier(ours.l2norm, flag, [gradients], False),
        limit,
    )


def main() -> None:
    """Print the table, a line as soon as it is known."""
    print(torch.cuda.get_device_name())
    print(f"{'':40}{'theirs, ms':>12}{'ours, ms':>12}{'ratio':>8}{'of the limit':>14}")
    for group in (norms, convolution, experts, embedding, losses, squares):
        for name, theirs, ours, limit in group():
            before, now = milliseconds(theirs), milliseconds(ours)
            print(f"{name:40}{before:12.3f}{now:12.3f}{before / now:7.2f}x{limit / now:13.0%}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
