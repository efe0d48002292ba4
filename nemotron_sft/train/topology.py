"""The division of a model over GPUs: what can work, and what cannot."""

from __future__ import annotations

from nemotron_sft.errors import UserError


def check_topology(model, world_size: int, row: int) -> None:
    """Raise UserError, one line, if the model cannot be divided over the GPUs as the config asks.

    model: Bridge's model provider; row: tokens of a forward pass, all packs of a micro batch together.
    """
    for key in ("tensor", "pipeline", "context", "expert"):
        name = f"{key}_model_parallel_size" if key != "context" else "context_parallel_size"
        if getattr(model, name) < 1:
            raise UserError(f"model.{name}={getattr(model, name)}: at least 1")
    _check_widths(model)
    _check_layers(model)
    _check_experts(model)
    _check_row(model, row)
    _check_processes(model, world_size)


def _divides(divisor: int, key: str, number: int | None, what: str) -> None:
    """Raise UserError unless the value of model.`key` divides the number, where there is one."""
    if number and number % divisor:
        options = [n for n in range(1, min(number, 64) + 1) if number % n == 0]
        raise UserError(f"model.{key}={divisor} does not divide the {number} {what}: choose one of {listed(options)}")


def _check_widths(model) -> None:
    """What tensor parallelism cuts: heads, vocabulary, hidden units."""
    tensor, key, parts = model.tensor_model_parallel_size, "tensor_model_parallel_size", layer_kinds(model)
    _divides(tensor, key, model.num_attention_heads, "attention heads")
    groups = model.num_query_groups or model.num_attention_heads
    if groups % tensor and tensor % groups:
        raise UserError(
            f"model.tensor_model_parallel_size={tensor} is neither a divisor nor a multiple of the {groups} query "
            f"groups (key/value heads): choose one of {listed([n for n in range(1, groups + 1) if groups % n == 0])}"
        )
    _divides(tensor, key, model.vocab_size, "entries of the vocabulary")
    if "mlp" in parts:
        _divides(tensor, key, model.ffn_hidden_size, "hidden units of the feed-forward layers")
    if "mamba" in parts:
        _divides(tensor, key, mamba_heads(model), "Mamba heads")
        _divides(tensor, key, model.mamba_num_groups, "Mamba groups")


def _check_layers(model) -> None:
    """Pipeline stages of equal length, unless the user divides the layers."""
    if model.num_layers_in_first_pipeline_stage or model.num_layers_in_last_pipeline_stage or layout(model):
        return
    stages = model.pipeline_model_parallel_size * (model.virtual_pipeline_model_parallel_size or 1)
    _divides(stages, "pipeline_model_parallel_size", len(layers_of(model)), "layers")


def _check_experts(model) -> None:
    """Experts over GPUs, and within them; and what core demands of tensor parallelism beside them."""
    tensor, expert = model.tensor_model_parallel_size, model.expert_model_parallel_size
    expert_tensor = model.expert_tensor_parallel_size or tensor
    if "moe" in layer_kinds(model):
        _divides(expert, "expert_model_parallel_size", model.num_moe_experts, "experts")
        _divides(expert_tensor, "expert_tensor_parallel_size", expert_width(model), "hidden units of an expert")
    elif expert > 1:
        raise UserError(f"model.expert_model_parallel_size={expert}, but the model has no experts: set it to 1")
    if model.sequence_parallel and tensor == 1:
        raise UserError(
            "model.sequence_parallel=true needs tensor parallelism: set it to false, or raise "
            "model.tensor_model_parallel_size"
        )
    if "moe" in layer_kinds(model) and tensor > 1 and not model.sequence_parallel:
        raise UserError("a model with experts and tensor parallelism needs model.sequence_parallel=true")


def _check_row(model, row: int) -> None:
    """The tokens of a row over context- and sequence-parallel ranks."""
    tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
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
    if "mamba" in layer_kinds(model):
        _check_mamba_shares(mamba_heads(model) // tensor, model.mamba_num_groups // tensor, context)


def _check_mamba_shares(heads: int, groups: int, context: int) -> None:
    """Context parallelism gives every rank whole rows of some heads of a Mamba layer, and their groups.

    heads, groups: those of one tensor-parallel rank.
    """
    if heads % context or max(groups, context) % min(groups, context):
        options = [n for n in range(1, heads + 1) if heads % n == 0 and max(groups, n) % min(groups, n) == 0]
        raise UserError(
            f"model.context_parallel_size={context} does not divide the {heads} heads in {groups} groups that a "
            f"tensor-parallel rank has of a Mamba layer: choose one of {listed(options)}"
        )


def _check_processes(model, world_size: int) -> None:
    """Processes over the groups that hold one copy of the model."""
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context, expert = model.context_parallel_size, model.expert_model_parallel_size
    expert_tensor = model.expert_tensor_parallel_size or tensor
    for group, formula in (
        (tensor * pipeline * context, f"tensor {tensor} x pipeline {pipeline} x context {context}"),
        (expert * expert_tensor * pipeline, f"expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline}"),
    ):
        if world_size % group and (expert > 1 or group == tensor * pipeline * context):
            raise UserError(
                f"{world_size} processes cannot be divided into model-parallel groups of {group} ({formula}): "
                f"start a multiple of {group}"
            )


def listed(numbers: list[int]) -> str:
    """Numbers for a message."""
    return ", ".join(map(str, numbers))


def layout(model) -> str | None:
    """The user's own division of layers over pipeline stages, if any."""
    pattern = getattr(model, "hybrid_layer_pattern", None) or ""
    return getattr(model, "pipeline_model_parallel_layout", None) or (pattern if "|" in pattern else None)


def layers_of(model) -> list[list[str]]:
    """What each layer is made of: lists of "attention", "mlp", "moe", "mamba"."""
    pattern = getattr(model, "hybrid_layer_pattern", None)
    if pattern:
        return [kinds_of(symbol) for symbol in pattern.split("/")[0].replace("|", "")]
    if not model.num_moe_experts:
        return [["attention", "mlp"]] * model.num_layers
    every = model.moe_layer_freq
    sparse = every if isinstance(every, list) else [i % every == 0 for i in range(model.num_layers)]
    return [["attention", "moe" if is_sparse else "mlp"] for is_sparse in sparse]


def kinds_of(symbol: str) -> list[str]:
    """What a layer of a hybrid pattern's symbol is made of. Raises UserError for an unknown symbol."""
    kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if symbol not in kinds:
        raise UserError(f"model.hybrid_layer_pattern: layers of type {symbol!r} are not known; known: {listed(kinds)}")
    return [kinds[symbol]]


def layer_kinds(model) -> set[str]:
    """What the model's layers are made of."""
    return {kind for layer in layers_of(model) for kind in layer}


def mamba_heads(model) -> int:
    """Mamba's heads, as given or as the width implies."""
    return model.mamba_num_heads or 2 * model.hidden_size // model.mamba_head_dim


def expert_width(model) -> int:
    """Hidden units of one expert."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size
