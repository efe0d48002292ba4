"""What a run will need, worked out from its config before anything is allocated: parameters, memory, steps.

`check_topology` refuses what cannot run; `describe` gives the figures that preflight=true prints. Both look at
plain fields of Bridge's model provider, so they work for every model on any machine. docs/models.md explains the
formulas.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemotron_sft.errors import UserError

GIB = 2**30


# --- topology ----------------------------------------------------------------------------------------------


def check_topology(model, world_size: int, row: int) -> None:
    """Raise UserError with one line for a division of the model over GPUs that cannot work.

    model: Bridge's model provider; row: tokens of a forward pass, all packs of a micro batch together.
    """
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context, expert = model.context_parallel_size, model.expert_model_parallel_size
    expert_tensor = model.expert_tensor_parallel_size or tensor
    parts = layer_kinds(model)

    def divides(divisor: int, key: str, number: int | None, what: str) -> None:
        if number and number % divisor:
            options = [n for n in range(1, min(number, 64) + 1) if number % n == 0]
            raise UserError(
                f"model.{key}={divisor} does not divide the {number} {what}: choose one of {_listed(options)}"
            )

    for key in ("tensor", "pipeline", "context", "expert"):
        name = f"{key}_model_parallel_size" if key != "context" else "context_parallel_size"
        if getattr(model, name) < 1:
            raise UserError(f"model.{name}={getattr(model, name)}: at least 1")
    divides(tensor, "tensor_model_parallel_size", model.num_attention_heads, "attention heads")
    groups = model.num_query_groups or model.num_attention_heads
    if groups % tensor and tensor % groups:
        raise UserError(
            f"model.tensor_model_parallel_size={tensor} is neither a divisor nor a multiple of the {groups} query "
            f"groups (key/value heads): choose one of {_listed([n for n in range(1, groups + 1) if groups % n == 0])}"
        )
    divides(tensor, "tensor_model_parallel_size", model.vocab_size, "entries of the vocabulary")
    if "mlp" in parts:
        divides(tensor, "tensor_model_parallel_size", model.ffn_hidden_size, "hidden units of the feed-forward layers")
    if "mamba" in parts:
        divides(tensor, "tensor_model_parallel_size", _mamba_heads(model), "Mamba heads")
        divides(tensor, "tensor_model_parallel_size", model.mamba_num_groups, "Mamba groups")
    if not (model.num_layers_in_first_pipeline_stage or model.num_layers_in_last_pipeline_stage or _layout(model)):
        virtual = model.virtual_pipeline_model_parallel_size or 1
        divides(pipeline * virtual, "pipeline_model_parallel_size", len(_layers(model)), "layers")
    if "moe" in parts:
        divides(expert, "expert_model_parallel_size", model.num_moe_experts, "experts")
        divides(expert_tensor, "expert_tensor_parallel_size", _expert_width(model), "hidden units of an expert")
    elif expert > 1:
        raise UserError(f"model.expert_model_parallel_size={expert}, but the model has no experts: set it to 1")
    if model.sequence_parallel and tensor == 1:
        raise UserError(
            "model.sequence_parallel=true needs tensor parallelism: set it to false, or raise "
            "model.tensor_model_parallel_size"
        )
    if expert > 1 and tensor > 1 and not model.sequence_parallel:
        raise UserError("experts spread over GPUs with tensor parallelism need model.sequence_parallel=true")
    if context > 1 and row % (2 * context):
        raise UserError(
            f"rows of {row} tokens do not divide into 2 x {context} pieces (model.context_parallel_size={context}): "
            f"prepare the data with a pack_size that is a multiple of {2 * context}"
        )
    if model.sequence_parallel and row // context % tensor:
        raise UserError(
            f"sequence parallelism splits the {row // context} tokens of a row over {tensor} GPUs "
            f"(model.tensor_model_parallel_size), which does not divide them: choose another pack_size"
        )
    for group, formula in (
        (tensor * pipeline * context, f"tensor {tensor} x pipeline {pipeline} x context {context}"),
        (expert * expert_tensor * pipeline, f"expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline}"),
    ):
        if world_size % group and (expert > 1 or group == tensor * pipeline * context):
            raise UserError(
                f"{world_size} processes cannot be divided into model-parallel groups of {group} ({formula}): "
                f"start a multiple of {group}"
            )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


# --- parameters --------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Parameters of a layer, or of another part of the model."""

    dense: int = 0  # divided by tensor parallelism
    experts: int = 0  # divided by expert parallelism
    active: int = 0  # that one token passes through
    saved: float = 0.0  # bytes of activations per token that the backward pass needs, in bf16, on one GPU

    def __add__(self, other: Part) -> Part:
        return Part(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def _layout(model) -> str | None:
    """The user's own division of layers over pipeline stages, if any."""
    pattern = getattr(model, "hybrid_layer_pattern", None) or ""
    return getattr(model, "pipeline_model_parallel_layout", None) or (pattern if "|" in pattern else None)


def _layers(model) -> list[list[str]]:
    """What each layer is made of: lists of "attention", "mlp", "moe", "mamba"."""
    pattern = getattr(model, "hybrid_layer_pattern", None)
    if pattern:
        return [_symbols(symbol) for symbol in pattern.split("/")[0].replace("|", "")]
    if not model.num_moe_experts:
        return [["attention", "mlp"]] * model.num_layers
    every = model.moe_layer_freq
    sparse = every if isinstance(every, list) else [i % every == 0 for i in range(model.num_layers)]
    return [["attention", "moe" if is_sparse else "mlp"] for is_sparse in sparse]


def _symbols(symbol: str) -> list[str]:
    kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if symbol not in kinds:
        raise UserError(f"model.hybrid_layer_pattern: layers of type {symbol!r} are not known; known: {_listed(kinds)}")
    return [kinds[symbol]]


def layer_kinds(model) -> set[str]:
    return {kind for layer in _layers(model) for kind in layer}


def _mamba_heads(model) -> int:
    return model.mamba_num_heads or 2 * model.hidden_size // model.mamba_head_dim


def _expert_width(model) -> int:
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


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
        heads, state, groups = _mamba_heads(model), model.mamba_state_dim, model.mamba_num_groups
        inner = heads * model.mamba_head_dim
        mixed = inner + 2 * groups * state  # channels of the convolution, of width 4, with bias
        parameters = norm + hidden * (inner + mixed + heads) + 5 * mixed + 3 * heads + inner + inner * hidden
        chunk = getattr(model, "mamba_chunk_size", 128) or 128
        states = 4 * inner * state / chunk  # fp32 state at the end of every chunk
        return Part(
            parameters, 0, parameters, saved + (2 * (inner + mixed + heads + mixed + 2 * inner) + states) / tensor
        )
    width, experts, top = _expert_width(model), model.num_moe_experts, model.moe_router_topk
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
    layers = [sum((_part(model, kind) for kind in layer), Part()) for layer in _layers(model)]
    # Logits in bf16, and in fp32 for the loss.
    output = Part(head, 0, head, 6 * model.vocab_size / model.tensor_model_parallel_size)
    if depth := model.mtp_num_layers or 0:  # multi-token prediction: blocks behind the last layer
        pattern = getattr(model, "mtp_hybrid_override_pattern", None)
        block = [kind for symbol in pattern for kind in _symbols(symbol)] if pattern else _layers(model)[-1]
        joint = Part(2 * hidden * hidden + 3 * norm, 0, 2 * hidden * hidden + 3 * norm, 8 * hidden)
        part = sum((_part(model, kind) for kind in block), joint)
        once = getattr(model, "mtp_use_repeated_layer", False)
        repeated = Part(0, 0, 0, part.saved + output.saved)
        output = output + part
        for _ in range(depth - 1):
            output = output + (repeated if once else part)
    return Sizes(Part(table, 0, table, 0), layers, output)


# --- memory ------------------------------------------------------------------------------------------------


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


# --- the report --------------------------------------------------------------------------------------------


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
