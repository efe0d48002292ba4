"""What the parts of a model hold: parameters, and the activations that one token leaves behind.

Everything is worked out from plain fields of Bridge's model provider, so it works for every model on any machine.
docs/models.md explains the formulas.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from nemotron_sft.train.topology import expert_width, kinds_of, layers_of, mamba_heads

BF16, FP32 = 2, 4  # bytes
CROSS_ENTROPY = {
    # Bytes per entry of the vocabulary and token: at most while the loss is computed, and kept for the backward pass.
    "native": (10, 4),  # logits in bf16, a copy in fp32, its exponentials in fp32; the last are kept
    "te": (4, 2),  # their gradient takes the place of the logits; as much again is there by measurement
    "unfused": (6, 4),
}


@dataclass
class Part:
    """Parameters of a layer, or of another part of the model, and bytes of activations per token on one GPU."""

    dense: int = 0  # parameters divided by tensor parallelism
    experts: int = 0  # parameters divided by expert parallelism
    active: int = 0  # parameters that one token passes through
    adapters: int = 0  # parameters that LoRA or DoRA trains beside them, outside of experts
    kept: float = 0.0  # activations kept for the backward pass
    whole: float = 0.0  # all activations that the backward pass reads, those that are recomputed included

    def __add__(self, other: Part) -> Part:
        return Part(*(getattr(self, name) + getattr(other, name) for name in FIELDS))


FIELDS = [field.name for field in fields(Part)]


def part(model, kind: str, peft=None) -> Part:
    """One sub-layer ("attention", "mlp", "mamba", "moe") with its norm."""
    parameters, experts, active = _parameters(model, kind)
    tensors, recomputed = _activations(model, kind), recomputed_pieces(model, kind)
    whole = sum(tensors.values())
    if model.recompute_granularity == "full":
        kept = tensors["input"] / (model.recompute_num_layers or 1)
    else:
        kept = sum(size for name, size in tensors.items() if name not in recomputed)
    low_rank, adapters = _adapters(model, kind, peft)
    return Part(parameters, experts, active, adapters, kept + (0 if _full(model) else low_rank), whole + low_rank)


def _full(model) -> bool:
    return model.recompute_granularity == "full"


def recomputed_pieces(model, kind: str) -> set[str]:
    """Names of the tensors of `_activations` that selective recomputation drops. Core ignores names that do not apply.

    Norms can be dropped only where they are modules of their own: before experts.
    """
    if model.recompute_granularity != "selective":
        return set()
    asked = set(model.recompute_modules or ())
    if kind == "mlp":
        return {"hidden", "activated"} if "mlp" in asked else set()
    if kind != "moe":
        return set()
    dropped = {"normed"} if "layernorm" in asked else set()
    if "moe" in asked:
        dropped |= {"router", "latent", "dispatched", "hidden", "activated", "shared"}
    if "moe_act" in asked:
        dropped |= {"activated"}
    if "shared_experts" in asked:
        dropped |= {"shared"}
    return dropped


def norm_size(model) -> int:
    """Parameters of one norm."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def attention_shape(model) -> tuple[int, int, int]:
    """Width of a head, number of query heads, number of key/value heads."""
    heads = model.num_attention_heads
    return model.kv_channels or model.hidden_size // heads, heads, model.num_query_groups or heads


def mamba_shape(model) -> tuple[int, int, int]:
    """Inner width, channels of the convolution (inner, B and C), heads."""
    inner = mamba_heads(model) * model.mamba_head_dim
    return inner, inner + 2 * model.mamba_num_groups * model.mamba_state_dim, mamba_heads(model)


def _matrices(model) -> int:
    """Matrices of a feed-forward layer."""
    return 3 if model.gated_linear_unit else 2


def _parameters(model, kind: str) -> tuple[int, int, int]:
    """Parameters outside of experts, in experts, and those that a token passes through."""
    hidden, norm, matrices = model.hidden_size, norm_size(model), _matrices(model)
    if kind == "attention":
        width, heads, groups = attention_shape(model)
        count = norm + hidden * width * (heads + 2 * groups) + heads * width * hidden
        count += 2 * width * (norm // hidden) if model.qk_layernorm else 0
        count += width * (heads + 2 * groups) if model.add_qkv_bias or model.add_bias_linear else 0
        count += hidden if model.add_bias_linear else 0
        return count, 0, count
    if kind == "mlp":
        width = model.ffn_hidden_size
        count = norm + matrices * hidden * width
        count += (matrices - 1) * width + hidden if model.add_bias_linear else 0
        return count, 0, count
    if kind == "mamba":
        inner, mixed, heads = mamba_shape(model)
        # In-projection, convolution of width 4 with bias, A and D and dt's bias, gated norm, out-projection.
        count = norm + hidden * (inner + mixed + heads) + 5 * mixed + 3 * heads + inner + inner * hidden
        return count, 0, count
    experts, outer = model.num_moe_experts, model.moe_latent_size or hidden
    expert = matrices * outer * expert_width(model)
    count = norm + hidden * experts + matrices * hidden * (model.moe_shared_expert_intermediate_size or 0)
    count += 2 * hidden * outer if model.moe_latent_size else 0
    return count, experts * expert, count + model.moe_router_topk * expert


def _activations(model, kind: str) -> dict[str, float]:
    """Bytes per token and GPU of each tensor that the backward pass of a sub-layer reads, in Transformer Engine."""
    hidden, tensor, matrices = model.hidden_size, model.tensor_model_parallel_size, _matrices(model)
    slices = tensor if model.sequence_parallel else 1  # sequence parallelism keeps a slice of what is not divided
    tensors = {"input": BF16 * hidden / slices, "normed": BF16 * hidden / slices}
    if kind == "attention":
        width, heads, groups = attention_shape(model)
        return tensors | {
            "qkv": BF16 * width * (heads + 2 * groups) / tensor,
            "context": BF16 * width * heads / tensor,
        }
    if kind == "mlp":
        width = model.ffn_hidden_size
        return tensors | {
            "hidden": BF16 * (matrices - 1) * width / tensor,
            "activated": BF16 * width / tensor,
        }
    if kind == "mamba":
        inner, mixed, heads = mamba_shape(model)
        return tensors | {
            "projected": BF16 * (inner + mixed + heads) / tensor,  # z, x, B, C, dt
            "scanned": BF16 * inner / tensor,  # before z gates it; states of chunks are computed again
            "gated": BF16 * inner / tensor,  # input of the grouped norm
            "gated_normed": BF16 * inner / tensor,
        }
    top, width, outer = model.moe_router_topk, expert_width(model), model.moe_latent_size or hidden
    copies = top * (model.expert_tensor_parallel_size or tensor) / tensor  # of a token, in one GPU's experts
    return tensors | {
        "router": (2 * FP32 + 1) * model.num_moe_experts / slices,  # logits, probabilities, map
        "latent": 2 * BF16 * outer / slices if model.moe_latent_size else 0,
        "dispatched": BF16 * outer * copies,
        "hidden": BF16 * (matrices - 1) * width * top / tensor,
        "activated": BF16 * width * top / tensor,
        "shared": BF16 * matrices * (model.moe_shared_expert_intermediate_size or 0) / tensor,
    }


# --- adapters ----------------------------------------------------------------------------------------------


def linear_layers(model, kind: str) -> list[tuple[str, int, int, float]]:
    """Name, input width, output width and tokens per token (copies in experts) of a sub-layer's matrices."""
    hidden, matrices = model.hidden_size, _matrices(model)
    if kind == "attention":
        width, heads, groups = attention_shape(model)
        return [("linear_qkv", hidden, width * (heads + 2 * groups), 1), ("linear_proj", heads * width, hidden, 1)]
    if kind == "mlp":
        width = model.ffn_hidden_size
        return [("linear_fc1", hidden, (matrices - 1) * width, 1), ("linear_fc2", width, hidden, 1)]
    if kind == "mamba":
        inner, mixed, heads = mamba_shape(model)
        return [("in_proj", hidden, inner + mixed + heads, 1), ("out_proj", inner, hidden, 1)]
    width, outer, top = expert_width(model), model.moe_latent_size or hidden, model.moe_router_topk
    layers = [("linear_fc1", outer, (matrices - 1) * width, top), ("linear_fc2", width, outer, top)]
    if shared := model.moe_shared_expert_intermediate_size:
        layers += [("linear_fc1", hidden, (matrices - 1) * shared, 1), ("linear_fc2", shared, hidden, 1)]
    return layers


def _adapters(model, kind: str, peft) -> tuple[float, int]:
    """Bytes per token of the low-rank activations of LoRA or DoRA in a sub-layer, and the adapters' parameters.

    Bridge gives all experts of a GPU one adapter together, unless share_expert_adapters is off.
    """
    if peft is None:
        return 0.0, 0
    targets = {target.rsplit(".", 1)[-1] for target in peft.target_modules}
    saved, count = 0.0, 0
    for name, inputs, outputs, copies in linear_layers(model, kind):
        if name not in targets:
            continue
        in_experts = copies > 1
        rank = peft.dim
        if in_experts and getattr(peft, "normalize_moe_lora", False):
            rank //= model.moe_router_topk
        alone = in_experts and not getattr(peft, "share_expert_adapters", True)
        sets = model.num_moe_experts // model.expert_model_parallel_size if alone else 1
        magnitude = outputs if type(peft).__name__ == "DoRA" else 0
        count += sets * (rank * (inputs + outputs) + magnitude)
        saved += copies * BF16 * (rank + (inputs if peft.dropout else 0))
    return saved, count


# --- the whole model ---------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """The model's parts; parameters shared between parts are counted once, in the first.

    layers names the kinds in each layer; parts holds a Part for each kind. logits: bytes per token while the loss is
    computed, the kept ones of multi-token prediction included. block: multi-token prediction's parts, in the last
    stage with a copy of the embedding, where the model is divided into stages.
    """

    embedding: Part
    layers: list[list[str]]
    parts: dict[str, Part]
    head: Part
    block: Part
    logits: float

    @property
    def total(self) -> Part:
        """Parameters of the whole model."""
        return self.stage(range(len(self.layers))) + self.embedding + self.head + self.block

    def stage(self, layers: range) -> Part:
        """The sum of some layers."""
        counts: dict[str, int] = {}
        for index in layers:
            for kind in self.layers[index]:
                counts[kind] = counts.get(kind, 0) + 1
        return Part(*(sum(getattr(self.parts[kind], name) * n for kind, n in counts.items()) for name in FIELDS))

    @functools.cached_property
    def largest(self) -> Part:
        """The layer with the most activations."""
        kinds = {tuple(layer): index for index, layer in enumerate(self.layers)}
        return max((self.stage(range(i, i + 1)) for i in kinds.values()), key=lambda layer: layer.whole)


def sizes(model, peft=None) -> Sizes | None:
    """The parts of the model; None for attention types that are not covered here."""
    if getattr(model, "multi_latent_attention", False):
        return None
    table, norm = model.vocab_size * model.hidden_size, norm_size(model)
    head = norm + (0 if model.share_embeddings_and_output_weights else table)
    layers, block_kinds = layers_of(model), mtp_kinds(model)
    parts = {kind: part(model, kind, peft) for kind in {k for layer in [*layers, block_kinds] for k in layer}}
    peak, kept = CROSS_ENTROPY[cross_entropy(model)]
    depth = model.mtp_num_layers or 0
    logits = (peak + depth * kept) * model.vocab_size / model.tensor_model_parallel_size
    return Sizes(
        Part(table, 0, table),
        layers,
        parts,
        Part(head, 0, head),
        mtp_block(model, parts),
        logits,
    )


def cross_entropy(model) -> str:
    """Which of CROSS_ENTROPY the model computes its loss with."""
    return model.cross_entropy_fusion_impl if model.cross_entropy_loss_fusion else "unfused"


def mtp_kinds(model) -> list[str]:
    """Kinds of sub-layers in a block of multi-token prediction; empty without it."""
    if not model.mtp_num_layers:
        return []
    pattern = getattr(model, "mtp_hybrid_override_pattern", None)
    return [kind for symbol in pattern for kind in kinds_of(symbol)] if pattern else layers_of(model)[-1]


def mtp_block(model, parts: dict[str, Part]) -> Part:
    """All blocks of multi-token prediction: sub-layers behind a matrix that joins hidden state and embedding, 2h -> h,
    with three norms. Where one block is used repeatedly, its activations are kept, and computed, every time."""
    hidden, norm, depth = model.hidden_size, norm_size(model), model.mtp_num_layers or 0
    if not depth:
        return Part()
    joint = 2 * hidden * hidden + 3 * norm
    slices = model.tensor_model_parallel_size if model.sequence_parallel else 1
    once = Part(joint, 0, joint, 0, 4 * BF16 * hidden / slices, 4 * BF16 * hidden / slices)
    for kind in mtp_kinds(model):
        once = once + parts[kind]
    copies = 1 if getattr(model, "mtp_use_repeated_layer", False) else depth
    return Part(
        copies * once.dense, copies * once.experts, copies * once.active, copies * once.adapters,
        depth * once.kept, depth * once.whole,
    )  # fmt: skip
