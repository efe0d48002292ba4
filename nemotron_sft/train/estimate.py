"""How much memory a run needs on a GPU, before anything is allocated.

docs/models.md explains the formulas, and what they were compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemotron_sft.train.sizes import BF16, FP32, Part, Sizes, sizes

GIB = 2**30
WORKSPACE = 1 * GIB  # of matrix products and kernels, and gradients' padding; 0.4 to 2.8 GiB were measured


def memory(
    container, world_size: int, logits_share: float = 1.0, parts: Sizes | None = None
) -> dict[str, float] | None:
    """Estimated bytes on the fullest GPU: weights, gradients, optimizer, activations, workspace, and their total.

    logits_share: the part of a row's tokens whose logits are computed, see `tokens_with_logits`. parts: `sizes` of the
    model as it is divided, if the caller has them. None for models that `sizes` does not cover.
    """
    parts = parts or sizes(container.model, container.peft)
    if parts is None:
        return None
    stages = _stages(container, parts, world_size, logits_share)
    return max(stages, key=lambda stage: stage["total"])


def tokens_with_logits(model, metadata: dict | None) -> float:
    """Share of the tokens whose logits are computed: the trained ones (`step.py` leaves out the others), and with
    multi-token prediction as many before every answer as it looks ahead. Without data, all."""
    split = metadata["splits"]["training"] if metadata else {}
    if not split.get("tokens"):
        return 1.0
    ahead = (model.mtp_num_layers or 0) * split["sequences"]
    return min(1.0, (split["trained_tokens"] + ahead) / split["tokens"])


def held(model, parts: Sizes) -> list[tuple[float, float, float]]:
    """Parameters outside of experts, in experts, and in adapters, on a GPU of each pipeline stage."""
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    expert_group = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or tensor)
    stages = stage_parts(parts, pipeline)
    return [(stage.dense / tensor, stage.experts / expert_group, stage.adapters / tensor) for stage in stages]


def stage_parts(parts: Sizes, pipeline: int) -> list[Part]:
    """Layers in equal shares; the embedding in the first stage, the head and multi-token prediction in the last."""
    stages = [parts.stage(layers) for layers in shares(len(parts.layers), pipeline)]
    stages[0] += parts.embedding  # one after the other: they may be the same stage
    stages[-1] += parts.head + parts.block
    if pipeline > 1 and parts.block.dense:  # which reads the next token's embedding
        stages[-1] += Part(parts.embedding.dense)
    return stages


def shares(layers: int, pipeline: int) -> list[range]:
    share = math.ceil(layers / pipeline)
    return [range(first, min(first + share, layers)) for first in range(0, share * pipeline, share)]


def _stages(container, parts: Sizes, world_size: int, logits_share: float) -> Iterator[dict[str, float]]:
    """The memory of a GPU in each pipeline stage."""
    model = container.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    expert_group = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or tensor)
    weight, gradient, state = bytes_per_parameter(container)
    sharded = container.ddp.use_distributed_optimizer or container.optimizer.use_distributed_optimizer
    copies = max(1, world_size // (tensor * pipeline)) if sharded else 1  # of everything outside of experts
    expert_copies = max(1, world_size // (expert_group * pipeline)) if sharded else 1
    row = container.train.micro_batch_size * model.seq_length / model.context_parallel_size
    split = zip(stage_parts(parts, pipeline), held(model, parts), strict=True)
    for index, (stage, (dense, experts, adapters)) in enumerate(split):
        trained, in_experts = (dense, experts) if container.peft is None else (adapters, 0)
        # Micro batches whose backward pass is still to come (the 1F1B schedule) keep theirs; one is being computed.
        kept = stage.kept * (pipeline - index)
        last = index == pipeline - 1
        working = max(parts.logits * logits_share if last else 0, 2 * parts.largest.whole - parts.largest.kept)
        estimate = {
            "weights": weight * (dense + experts + (adapters if container.peft else 0)),
            "gradients": gradient * (trained + in_experts),
            "optimizer": state * (trained / copies + in_experts / expert_copies),
            "activations": (kept + working) * row,
            "workspace": WORKSPACE,
        }
        yield estimate | {"total": sum(estimate.values())}


def precision(container):
    """Bridge's MixedPrecisionConfig of the run, or None."""
    name = container.mixed_precision
    if not isinstance(name, str):
        return name
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    return get_mixed_precision_config(name)


def bytes_per_parameter(container) -> tuple[float, float, float]:
    """Bytes of a weight, of its gradient, and of its optimizer state: fp32 copy and two moments, unless narrower.

    The precision-aware optimizer keeps only those bits of the fp32 copy that the bf16 weight does not hold.
    """
    numbers, optimizer = precision(container), container.optimizer
    if numbers is None or numbers.fp32:
        return FP32, FP32, 2 * FP32
    gradient = FP32 if numbers.grad_reduce_in_fp32 else BF16
    if not optimizer.use_precision_aware_optimizer:
        return BF16, gradient, 3 * FP32
    copy = optimizer.main_params_dtype.itemsize
    copy -= BF16 if optimizer.store_param_remainders and copy == FP32 else 0
    return BF16, gradient, copy + optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
