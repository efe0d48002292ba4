"""Divisions of a model over given GPUs that fit their memory, the fastest first."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemotron_sft.errors import UserError
from nemotron_sft.train.estimate import GIB, bytes_per_parameter, memory, precision
from nemotron_sft.train.sizes import Sizes, sizes
from nemotron_sft.train.speed import NODE, seconds_per_step
from nemotron_sft.train.topology import check_topology, layer_kinds

SHARE = 0.92  # of a GPU's memory that a proposal may fill: the estimate is good to a few percent
LONGEST_ROW = 32768  # tokens on one GPU; from there on longer rows are no faster
MOST_STAGES = 16
# Selective recomputation as NVIDIA's recipes for this family have it: experts again, and the norm before them.
SELECTIVE = ["moe", "layernorm"]
# What the optimizer keeps, and how much faster than with the container's own settings it must be to come first.
OPTIMIZERS = {"as given": 1.0, "bf16 moments": 1.15, "bf16 gradients and moments": 1.3}


@dataclass(frozen=True)
class Division:
    """One way to divide a model, with its estimated bytes on a GPU and seconds a step."""

    tensor: int
    pipeline: int
    context: int
    expert: int
    recompute: str | None = None  # None, "selective" or "full"
    optimizer: str = "as given"  # of OPTIMIZERS
    packs: int = 1  # in a row
    bytes: float = 0.0
    seconds: float = 0.0

    @property
    def cost(self) -> tuple:
        """What proposals are sorted by: time, then how little is divided."""
        parts = self.tensor * self.pipeline * self.context
        return self.seconds * OPTIMIZERS[self.optimizer], parts, self.expert


def propose(
    container, world_size: int, gpu_bytes: float, tflops: float, logits_share: float = 1.0, best: int = 3
) -> list[Division]:
    """The `best` fastest divisions that fit, no two of them with the same parallelism.

    gpu_bytes, tflops: memory and dense bf16 peak of one GPU. logits_share: see `estimate.tokens_with_logits`.
    """
    fastest = []
    for parallelism in _parallelisms(container, world_size):
        fitting = []
        for settings, parts in _settings(container, parallelism):
            fits = _longest_row(container, settings, parts, world_size, SHARE * gpu_bytes, logits_share)
            if fits is None and not fitting and settings.recompute == "full":
                break  # what needs least, and comes first
            if fits is not None:
                divided = divide(container, fits)
                seconds = seconds_per_step(divided, world_size, tflops, logits_share, parts)
                fitting.append(replace(fits, seconds=seconds))
        if fitting:
            fastest.append(min(fitting, key=lambda division: division.cost))
    return sorted(fastest, key=lambda division: division.cost)[:best]


def enough(container, world_size: int, gpu_bytes: float, tflops: float, logits_share: float = 1.0) -> int | None:
    """The smallest world_size x 2^n, up to 4,096 GPUs, that some division fits; None if none does."""
    while world_size <= 4096:
        if propose(container, world_size, gpu_bytes, tflops, logits_share, 1):
            return world_size
        world_size *= 2
    return None


# --- what is tried -----------------------------------------------------------------------------------------


def _parallelisms(container, world_size: int) -> Iterator[Division]:
    """Every parallelism that the rules of topology allow with rows of one pack, and that the batch can be cut for."""
    model = container.model
    powers = [2**n for n in range(12) if world_size % 2**n == 0]
    stages = [n for n in range(1, MOST_STAGES + 1) if world_size % n == 0]
    experts = powers if "moe" in layer_kinds(model) else [1]
    # Only a pack that is long for one GPU is worth cutting.
    contexts = [n for n in powers if n == 1 or 4 * model.seq_length // n >= LONGEST_ROW]
    for tensor, pipeline, context, expert in itertools.product(powers, stages, contexts, experts):
        group = tensor * pipeline * context
        # Tensor and context parallelism stay among GPUs with fast links between them.
        if tensor * context > NODE or world_size % group or container.train.global_batch_size % (world_size // group):
            continue
        division = Division(tensor, pipeline, context, expert)
        try:
            check_topology(divide(container, division).model, world_size, model.seq_length)
        except UserError:
            continue
        yield division


def _settings(container, parallelism: Division) -> Iterator[tuple[Division, Sizes]]:
    """Recomputation and optimizer for a parallelism, those that need least memory first."""
    # Adapters are too small for a narrow optimizer to matter.
    optimizers = [*reversed(OPTIMIZERS)] if container.peft is None else ["as given"]
    given = sum(bytes_per_parameter(container))
    for recompute in ("full", "selective", None):
        if recompute == "selective" and "moe" not in layer_kinds(container.model):
            continue
        parts = None
        for optimizer in optimizers:
            division = replace(parallelism, recompute=recompute, optimizer=optimizer)
            divided = divide(container, division)
            if optimizer != "as given" and sum(bytes_per_parameter(divided)) >= given:
                continue
            parts = parts or sizes(divided.model, divided.peft)
            if parts is None:
                return
            yield division, parts


def _longest_row(
    container, division: Division, parts: Sizes, world_size: int, most: float, logits_share: float
) -> Division | None:
    """The division with as many packs to a row as memory holds, as divide the batch, and as keep every stage busy."""
    model, train = container.model, container.train
    share = train.global_batch_size * division.tensor * division.pipeline * division.context // world_size
    longest = max(1, LONGEST_ROW * division.context // model.seq_length)
    for packs in range(min(share, longest), 0, -1):
        if share % packs or (packs > 1 and share // packs < division.pipeline):
            continue
        tried = replace(division, packs=packs)
        estimate = memory(divide(container, tried), world_size, logits_share, parts)
        if estimate["total"] <= most:
            return replace(tried, bytes=estimate["total"])
    return None


# --- a division as settings --------------------------------------------------------------------------------


def _keys(division: Division) -> dict[str, Any]:
    """The keys of a division and their values."""
    import torch

    keys = {
        "model.tensor_model_parallel_size": division.tensor,
        "model.sequence_parallel": division.tensor > 1,
        "model.pipeline_model_parallel_size": division.pipeline,
        "model.virtual_pipeline_model_parallel_size": None,
        "model.context_parallel_size": division.context,
        "model.expert_model_parallel_size": division.expert,
        "model.expert_tensor_parallel_size": 1,
        "model.recompute_granularity": division.recompute,
        "train.micro_batch_size": division.packs,
    }
    if division.recompute == "selective":
        keys |= {"model.recompute_modules": SELECTIVE}
    if division.recompute == "full":
        keys |= {"model.recompute_method": "uniform", "model.recompute_num_layers": 1}
    else:
        keys |= {"model.recompute_method": None, "model.recompute_num_layers": None}
    if division.optimizer != "as given":
        keys |= {f"optimizer.{name}_dtype": torch.bfloat16 for name in ("exp_avg", "exp_avg_sq")}
        keys |= {"optimizer.use_precision_aware_optimizer": True}
    if division.optimizer == "bf16 gradients and moments":
        keys |= {"optimizer.main_grads_dtype": torch.bfloat16, "mixed_precision.grad_reduce_in_fp32": False}
    return keys


def divide(container, division: Division):
    """A copy of the container, divided; its other sections are the container's own."""
    divided = copy.copy(container)
    for section in ("model", "train", "optimizer"):
        setattr(divided, section, copy.copy(getattr(container, section)))
    divided.mixed_precision = copy.copy(precision(container))
    for key, value in _keys(division).items():
        section, name = key.split(".")
        setattr(getattr(divided, section), name, value)
    return divided


def overrides(container, division: Division) -> list[str]:
    """The keys to type for a division: those that the container does not have that way already."""
    typed = []
    for key, value in _keys(division).items():
        section, name = key.split(".")
        present = getattr(precision(container) if section == "mixed_precision" else getattr(container, section), name)
        if name == "micro_batch_size":
            typed.append(f"train.packs_per_microbatch={value}")
        elif name == "expert_tensor_parallel_size" and not container.model.num_moe_experts:
            continue
        elif present != value:
            typed.append(f"{key}={_typed(value)}")
    return typed


def _typed(value: Any) -> str:
    """A value as it is typed: none, true, [a,b], bfloat16, 3."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).removeprefix("torch.").lower()  # no value of ours has capitals


def text(division: Division, pack_size: int) -> str:
    """A line about a proposal."""
    said = [f"{name} {n}" for name in ("tensor", "pipeline", "context") if (n := getattr(division, name)) > 1]
    if division.expert > 1:
        said.append(f"experts over {division.expert}")
    said.append(f"rows of {division.packs * pack_size:,} tokens")
    if division.recompute:
        said.append({"selective": "experts recomputed", "full": "everything recomputed"}[division.recompute])
    if division.optimizer != "as given":
        said.append(division.optimizer)
    return f"{', '.join(said)}: {division.bytes / GIB:.1f} GiB, about {duration(division.seconds)} a step"


def duration(seconds: float) -> str:
    """Seconds in words: 0.42 s, 13 s, 25 min, 7.5 h."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
