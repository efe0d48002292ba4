"""What a run will need, worked out from its config before anything is allocated: parameters, memory, steps.

`check_topology` refuses what cannot run; `describe` gives the figures that preflight=true prints. Both look at
plain fields of Bridge's model provider, so they work for every model on any machine. docs/models.md explains the
formulas.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemotron_sft.train.topology import expert_width, kinds_of, layers_of, mamba_heads

GIB = 2**30


@dataclass
class Part:
    """Parameters of a layer, or of another part of the model."""

    dense: int = 0  # divided by tensor parallelism
    experts: int = 0  # divided by expert parallelism
    active: int = 0  # that one token passes through
    saved: float = 0.0  # bytes of activations per token that the backward pass needs, in bf16, on one GPU

    def __add__(self, other: Part) -> Part:
        return Part(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def _part(model, kind: str) -> Part:
    """One sub-layer with its norm. Activation bytes: every tensor that the backward pass of a fused layer reads."""
    hidden, tensor = model.hidden_size, model.tensor_model_parallel_size
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    matrices = 3 if model.gated_linear_unit else 2
    # Inputs of norm and first matrix; sequence parallelism keeps only a slice of them.
    saved = 2 * 2 * hidden / (tensor if model.sequence_parallel else 1)
    if kind == "attention":
        width = model.kv_channels or hidden // model.num_attention_heads
        heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        parameters = norm + hidden * width * (heads + 2 * groups) + heads * width * hidden
        parameters += 2 * width * (norm // hidden) if model.qk_layernorm else 0
        parameters += width * (heads + 2 * groups) if model.add_qkv_bias or model.add_bias_linear else 0
        parameters += hidden if model.add_bias_linear else 0
        return Part(parameters, 0, parameters, saved + 2 * width * 2 * (heads + groups) / tensor)
    if kind == "mlp":
        width = model.ffn_hidden_size
        parameters = norm + matrices * hidden * width
        parameters += (matrices - 1) * width + hidden if model.add_bias_linear else 0
        return Part(parameters, 0, parameters, saved + 2 * matrices * width / tensor)
    if kind == "mamba":
        heads, state, groups = mamba_heads(model), model.mamba_state_dim, model.mamba_num_groups
        inner = heads * model.mamba_head_dim
        mixed = inner + 2 * groups * state  # channels of the convolution, of width 4, with bias
        parameters = norm + hidden * (inner + mixed + heads) + 5 * mixed + 3 * heads + inner + inner * hidden
        chunk = getattr(model, "mamba_chunk_size", 128) or 128
        states = 4 * inner * state / chunk  # fp32 state at the end of every chunk
        return Part(
            parameters, 0, parameters, saved + (2 * (inner + mixed + heads + mixed + 2 * inner) + states) / tensor
        )
    width, experts, top = expert_width(model), model.num_moe_experts, model.moe_router_topk
    outer = model.moe_latent_size or hidden
    expert = matrices * outer * width
    shared = matrices * hidden * (model.moe_shared_expert_intermediate_size or 0)
    always = norm + hidden * experts + shared + (2 * hidden * outer if model.moe_latent_size else 0)
    saved += 2 * top * (2 * outer + matrices * width) / (model.expert_tensor_parallel_size or tensor)
    saved += 4 * experts + 2 * matrices * (model.moe_shared_expert_intermediate_size or 0) / tensor
    return Part(always, experts * expert, always + top * expert, saved)


@dataclass
class Sizes:
    """Embedding, layers and head; parameters shared between parts are counted once, in the first."""

    embedding: Part
    layers: list[Part]
    head: Part

    @property
    def whole(self) -> Part:
        return sum(self.layers, self.embedding + self.head)


def sizes(model) -> Sizes | None:
    """Parameters of every part of the model; None for attention types that are not covered here."""
    if getattr(model, "multi_latent_attention", False):
        return None
    hidden, table = model.hidden_size, model.vocab_size * model.hidden_size
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    head = norm + (0 if model.share_embeddings_and_output_weights else table)
    layers = [sum((_part(model, kind) for kind in layer), Part()) for layer in layers_of(model)]
    # Logits in bf16, and in fp32 for the loss.
    output = Part(head, 0, head, 6 * model.vocab_size / model.tensor_model_parallel_size)
    if depth := model.mtp_num_layers or 0:  # multi-token prediction: blocks behind the last layer
        pattern = getattr(model, "mtp_hybrid_override_pattern", None)
        block = [kind for symbol in pattern for kind in kinds_of(symbol)] if pattern else layers_of(model)[-1]
        joint = Part(2 * hidden * hidden + 3 * norm, 0, 2 * hidden * hidden + 3 * norm, 8 * hidden)
        part = sum((_part(model, kind) for kind in block), joint)
        once = getattr(model, "mtp_use_repeated_layer", False)
        repeated = Part(0, 0, 0, part.saved + output.saved)
        output = output + part
        for _ in range(depth - 1):
            output = output + (repeated if once else part)
    return Sizes(Part(table, 0, table, 0), layers, output)


def memory(container, world_size: int) -> dict[str, float] | None:
    """Estimated bytes on the fullest GPU: weights, gradients, optimizer, activations, and their total."""
    model, parts = container.model, sizes(container.model)
    if parts is None:
        return None
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    expert_group = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or tensor)
    stages = _stages(parts, pipeline)
    weight, gradient, state = _bytes_per_parameter(container)
    sharded = container.ddp.use_distributed_optimizer or container.optimizer.use_distributed_optimizer
    dense_copies = world_size // (tensor * pipeline) if sharded else 1
    expert_copies = max(1, world_size // (expert_group * pipeline)) if sharded else 1
    row = container.train.micro_batch_size * model.seq_length / model.context_parallel_size
    trained = 1.0 if container.peft is None else 0.0  # adapters are small beside everything else
    estimates = []
    for index, (stage, (dense, experts)) in enumerate(zip(stages, _held(model, parts), strict=True)):
        in_flight = pipeline - index  # micro batches whose backward pass is still to come (1F1B schedule)
        saved = stage.saved
        if model.recompute_granularity == "full":  # the input of each layer, and one layer in full
            slice_ = tensor if model.sequence_parallel else 1
            saved = 2 * model.hidden_size * len(parts.layers) / pipeline / slice_
            saved += max(layer.saved for layer in parts.layers) / in_flight
        estimates.append(
            {
                "weights": weight * (dense + experts),
                "gradients": trained * gradient * (dense + experts),
                "optimizer": trained * state * (dense / dense_copies + experts / expert_copies),
                "activations": saved * row * in_flight,
            }
        )
    fullest = max(estimates, key=lambda estimate: sum(estimate.values()))
    return fullest | {"total": sum(fullest.values())}


def _stages(parts: Sizes, pipeline: int) -> list[Part]:
    """Layers in equal shares, with the embedding in the first stage and the head in the last."""
    share = -(-len(parts.layers) // pipeline)
    stages = [sum(parts.layers[i * share : (i + 1) * share], Part()) for i in range(pipeline)]
    stages[0] += parts.embedding  # one after the other: they may be the same stage
    stages[-1] += parts.head
    return stages


def _held(model, parts: Sizes) -> list[tuple[float, float]]:
    """Parameters outside of and in experts on a GPU of each pipeline stage."""
    tensor = model.tensor_model_parallel_size
    expert_group = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or tensor)
    stages = _stages(parts, model.pipeline_model_parallel_size)
    return [(stage.dense / tensor, stage.experts / expert_group) for stage in stages]


def _bytes_per_parameter(container) -> tuple[float, float, float]:
    """Bytes of a weight, of its gradient, and of its optimizer state: fp32 copy and two moments, unless narrower."""
    precision, optimizer = container.mixed_precision, container.optimizer
    if isinstance(precision, str):
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        precision = get_mixed_precision_config(precision)
    if precision is None or precision.fp32:
        return 4, 4, 8
    in_fp32 = precision.grad_reduce_in_fp32
    if not optimizer.use_precision_aware_optimizer:
        return 2, 4 if in_fp32 else 2, 12
    kept = (optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype)
    return 2, 4 if in_fp32 else 2, sum(dtype.itemsize for dtype in kept)


def describe(container, metadata: dict | None, world_size: int) -> dict[str, str]:
    """The rows that preflight=true prints, name -> text."""
    model, train = container.model, container.train
    parts = sizes(model)
    rows = {}
    if parts:
        whole = parts.whole
        rows["parameters"] = f"{whole.dense + whole.experts:,} total, {whole.active:,} active for a token"
        rows["on one GPU"] = f"at most {max(sum(held) for held in _held(model, parts)):,.0f} of the parameters"
    else:
        rows["parameters"] = "not counted: the model has multi-latent attention"
    replicas = world_size // (
        model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    )
    rows["processes"] = (
        f"{world_size} = {replicas} data x {model.tensor_model_parallel_size} tensor x "
        f"{model.pipeline_model_parallel_size} pipeline x {model.context_parallel_size} context; "
        f"experts over {model.expert_model_parallel_size}"
    )
    if estimate := memory(container, world_size):
        shares = ", ".join(f"{name} {size / GIB:.3g}" for name, size in estimate.items() if name != "total")
        rows["memory per GPU"] = f"about {estimate['total'] / GIB:.3g} GiB ({shares})"
    accumulated = train.global_batch_size // (train.micro_batch_size * replicas)
    rows["step"] = (
        f"{train.global_batch_size} packs of {model.seq_length:,} tokens: {replicas} data-parallel ranks x "
        f"{accumulated} micro batches x {train.micro_batch_size} packs"
    )
    rows["steps"] = f"{train.train_iters:,}"
    split = metadata["splits"]["training"] if metadata else None
    if split and split["packs"]:
        packs = train.train_iters * train.global_batch_size
        rows["tokens"] = f"{packs * split['tokens'] / split['packs']:,.0f}; the data has {split['tokens']:,}"
        rows["epochs"] = f"{packs / split['packs']:.2f}"
    else:
        rows["tokens"] = f"at most {train.train_iters * train.global_batch_size * model.seq_length:,}; no data yet"
    return rows
