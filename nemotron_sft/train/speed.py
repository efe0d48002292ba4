"""How long a step takes, estimated: matrix products at the speed that was measured, or the host where it is slower.

The constants are fitted to measured steps (docs/models.md) of an H100 and hold within a fifth there. Not counted:
attention's and Mamba's work beyond their matrices, and gradients and weights that travel between data-parallel ranks
while others are computed.
"""

from __future__ import annotations

from nemotron_sft.train.estimate import bytes_per_parameter, held, shares
from nemotron_sft.train.sizes import BF16, Sizes, linear_layers, mtp_kinds, sizes

# Share of the GPU's bf16 peak that a kind's matrices reach in long rows, what lies between the products included.
# Experts reach it with many tokens each, and half of it with EXPERT_TOKENS.
EFFICIENCY = {"attention": 0.49, "mlp": 0.49, "head": 0.49, "mamba": 0.35, "moe": 0.5}
EXPERT_TOKENS = 400
# Milliseconds in which the host launches one pass through a sub-layer, and through an adapter. Passes: forward, input
# gradients, weight gradients, and forward again where activations are recomputed.
HOST_MS = {"attention": 1.0, "mlp": 1.0, "head": 1.0, "mamba": 1.5, "moe": 4.3}
ADAPTER_MS = 0.5
MEMORY_RATE = 2.3e12  # bytes per second that the optimizer's kernel moves
# Bytes per second of a GPU's links, within a node of eight and beyond it.
NEAR, FAR = 3e11, 4e10
NODE = 8


def seconds_per_step(
    container, world_size: int, tflops: float, logits_share: float = 1.0, parts: Sizes | None = None
) -> float | None:
    """Estimated seconds of a step; tflops: dense bf16 peak of a GPU. The rest is as in `memory`."""
    model, train = container.model, container.train
    parts = parts or sizes(model, container.peft)
    if parts is None:
        return None
    pipeline = model.pipeline_model_parallel_size
    replicas = world_size // (model.tensor_model_parallel_size * pipeline * model.context_parallel_size)
    micro_batches = train.global_batch_size / (train.micro_batch_size * replicas)
    slowest = max(_stage_seconds(container, parts, stage, tflops, logits_share) for stage in range(pipeline))
    # The first stage starts, and ends, before and after all others: pipeline - 1 micro batches of waiting.
    return (micro_batches + pipeline - 1) * slowest + _optimizer_seconds(container, parts, world_size)


def flops_per_token(model, parts: Sizes, passes: int, logits_share: float = 1.0) -> float:
    """FLOPs of a token in all matrices: 2 per parameter and pass."""
    depth = model.mtp_num_layers or 0
    head = model.vocab_size * model.hidden_size * (1 + depth) * logits_share
    layers = sum(parts.parts[kind].active for layer in parts.layers for kind in layer)
    return 2 * passes * (layers + head + depth * parts.block.active)


def _passes(container) -> int:
    """Passes through a layer: forward, input gradients, and weight gradients where weights are trained."""
    return 3 if container.peft is None else 2


def _stage_seconds(container, parts: Sizes, stage: int, tflops: float, logits_share: float) -> float:
    """One micro batch in one pipeline stage: on the GPU with its links, or on the host, whichever takes longer."""
    model, passes = container.model, _passes(container)
    pipeline, depth = model.pipeline_model_parallel_size, model.mtp_num_layers or 0
    tokens = container.train.micro_batch_size * model.seq_length / model.context_parallel_size
    layers = [kind for index in shares(len(parts.layers), pipeline)[stage] for kind in parts.layers[index]]
    layers += mtp_kinds(model) * depth if stage == pipeline - 1 else []
    gpu = host = 0.0
    for kind in set(layers):
        number, again = layers.count(kind), _again(model, kind)
        flops = 2 * (passes + again) * parts.parts[kind].active * tokens / model.tensor_model_parallel_size
        gpu += number * flops / (tflops * 1e12 * _efficiency(model, kind, tokens))
        gpu += number * (1 + 0.5 * again) * tokens * _sending(model, kind)
        launching = HOST_MS[kind] + ADAPTER_MS * _adapted(model, kind, container.peft)
        host += number * (passes + again) * launching / 1000
    if stage == pipeline - 1:
        head = model.vocab_size * model.hidden_size * (1 + depth) * logits_share
        gpu += 2 * passes * head * tokens / model.tensor_model_parallel_size / (tflops * 1e12 * EFFICIENCY["head"])
        host += passes * (1 + depth) * HOST_MS["head"] / 1000
    return max(gpu, host)


def _efficiency(model, kind: str, tokens: float) -> float:
    """Share of the peak that a sub-layer reaches with so many tokens in a row."""
    if kind != "moe":
        return EFFICIENCY[kind]
    # A GPU's experts get the tokens of all GPUs among which the experts are spread.
    rows = model.expert_model_parallel_size / model.tensor_model_parallel_size
    each = tokens * rows * model.moe_router_topk / model.num_moe_experts
    return EFFICIENCY[kind] * each / (each + EXPERT_TOKENS)


def _again(model, kind: str) -> int:
    """Whether a sub-layer's forward pass runs again during the backward pass."""
    asked = set(model.recompute_modules or ())
    return int(
        model.recompute_granularity == "full"
        or (model.recompute_granularity == "selective" and (kind in asked) and kind in ("moe", "mlp"))
    )


def _adapted(model, kind: str, peft) -> int:
    """Matrices of a sub-layer that have an adapter."""
    targets = {target.rsplit(".", 1)[-1] for target in peft.target_modules} if peft else set()
    return sum(name in targets for name, *_ in linear_layers(model, kind))


def _sending(model, kind: str) -> float:
    """Seconds per token that a sub-layer's exchanges take, forward and backward.

    Tensor parallelism gathers and scatters the row, expert parallelism sends each token to its experts and back,
    context parallelism passes keys and values around.
    """
    tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
    expert = model.expert_model_parallel_size
    row, sent = BF16 * model.hidden_size, 0.0
    if kind != "moe" or model.moe_shared_expert_intermediate_size:
        sent += 4 * row * (tensor - 1) / tensor / NEAR
    if kind == "attention" and context > 1:
        width = model.kv_channels or model.hidden_size // model.num_attention_heads
        keys = 2 * BF16 * width * (model.num_query_groups or model.num_attention_heads) / tensor
        sent += 3 * (context - 1) * keys / NEAR
    if kind == "mamba" and context > 1:  # the row is exchanged for heads, and back
        sent += 4 * row * (context - 1) / context / NEAR
    if kind == "moe" and expert > 1:
        outer = BF16 * (model.moe_latent_size or model.hidden_size) * model.moe_router_topk / tensor
        near = min(expert, NODE) - 1
        sent += 4 * outer / expert * (near / NEAR + (expert - 1 - near) / FAR)
    return sent


def _optimizer_seconds(container, parts: Sizes, world_size: int) -> float:
    """Reading and writing gradients, states and weights once."""
    model = container.model
    weight, gradient, state = bytes_per_parameter(container)
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    dense, experts, adapters = max(held(model, parts), key=sum)
    if container.peft is not None:
        dense, experts = adapters, 0
    group = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or model.tensor_model_parallel_size)
    own = dense * ranks / world_size
    own += experts * group * model.pipeline_model_parallel_size / world_size
    return own * (weight + gradient + 2 * state) / MEMORY_RATE
