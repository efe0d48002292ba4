"""The optimizer: gradients are scaled in one pass a step; a resumed run may have another learning rate."""

from __future__ import annotations

import math
from typing import Any

from nemotron_sft.train.compat.adam import Factors, read_memory_at_full_speed
from nemotron_sft.train.compat.registry import patch


@patch(
    {
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.scale_gradients": (
            "(self, scaling_factor)"
        ),
        "megatron.core.optimizer.optimizer:get_grad_norm_fp32": (
            "(grads_for_norm, norm_type, grad_stats_parallel_group)"
        ),
        "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32": (
            "(parameters, max_norm, total_norm, use_decoupled_grad)"
        ),
        "megatron.core.optimizer.clip_grads:multi_tensor_applier": "(op, noop_flag_buffer, tensor_lists, *args)",
    },
    seen="megatron-core 0.19.2, transformer-engine 2.20",
    until="core folds the two factors into one",
)
def scale_gradients_once(factors: Factors | None = None) -> None:
    """Core multiplies all gradients by 1 / trained tokens, and then again by what clipping makes of their norm.

    Each is a pass over 4 bytes per parameter, read and written. The first factor waits for the second, and where Adam
    multiplies by both itself, `factors` takes them. Only for optimizers that clip (clip_grad > 0).
    """
    from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
    from megatron.core.optimizer import clip_grads, optimizer

    norm_of, waiting = optimizer.get_grad_norm_fp32, {}

    def scale_gradients(self, scaling_factor):
        waiting["factor"] = scaling_factor

    def get_grad_norm(grads_for_norm, norm_type=2, grad_stats_parallel_group=None):
        return norm_of(grads_for_norm, norm_type, grad_stats_parallel_group) * waiting.get("factor", 1.0)

    def clip(parameters, max_norm, total_norm, use_decoupled_grad=False):
        import torch

        name = "decoupled_grad" if use_decoupled_grad else "grad"
        clipped = torch.as_tensor(max_norm / (total_norm + 1.0e-6), device="cuda").clamp(max=1.0)
        factor = (clipped * waiting.get("factor", 1.0)).float().view(1)
        gradients, fused = [], []
        for parameter in parameters:
            if (gradient := getattr(parameter, name, None)) is not None:
                by_adam = factors is not None and use_decoupled_grad and parameter.dtype == torch.bfloat16
                (fused if by_adam else gradients).append(clip_grads.to_local_if_dtensor(gradient).detach())
        if fused:
            gradients += factors.put(fused, factor)
        if not gradients:
            return
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        clip_grads.multi_tensor_applier(
            clip_grads.multi_tensor_scale_tensor_impl, overflow, [gradients, gradients], factor
        )

    if clip_grads.multi_tensor_scale_tensor_impl is None:
        return
    DistributedDataParallel.scale_gradients = scale_gradients
    optimizer.get_grad_norm_fp32, optimizer.clip_grad_by_total_norm_fp32 = get_grad_norm, clip


def shorten_the_optimizers_step(config: Any) -> None:
    """Fewer passes over weights and gradients on a GPU. config: core's OptimizerConfig, with all settings made."""
    factors = Factors()
    if adam := adam_keeps_remainders(config):
        read_memory_at_full_speed(factors)
    if config.clip_grad > 0 and "muon" not in config.optimizer:  # Muon clips by a norm that it imports itself
        # A step that core may skip must not leave factors behind.
        scale_gradients_once(factors if adam and math.isinf(config.grad_norm_skip_threshold) else None)


def adam_keeps_remainders(config: Any) -> bool:
    """Whether all bf16 weights go through the kernel that `adam` stands in for. config: core's OptimizerConfig."""
    return (
        config.optimizer == "adam"
        and config.use_precision_aware_optimizer
        and config.store_param_remainders
        and str(config.main_params_dtype) == "torch.float32"
        and not config.optimizer_cpu_offload
    )


RATES = ("max_lr", "min_lr")


@patch(
    {
        "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups": (
            "(current_groups, state_dict_groups)"
        ),
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict": "(self, state_dict)",
        "megatron.core.optimizer.optimizer:param_group_identifier_keys": "tuple",
    },
    seen="megatron-core 0.19.2",
    until="core finds a saved parameter group whose learning rate was another",
)
def resume_at_another_rate() -> None:
    """Core recognises a saved parameter group by its settings, learning rates among them.

    So a run that is resumed with another optimizer.lr ends with a ValueError, and where core took the group, the
    schedule would go on with the old rate, which is a part of it.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

    reorder, load = MegatronOptimizer._filter_and_reorder_param_groups, DistributedOptimizer.load_state_dict
    keys = [key for key in param_group_identifier_keys if key not in RATES]

    def reorder_groups(current_groups: list[dict], state_dict_groups: list[dict]) -> list[dict]:
        take_rates(current_groups, state_dict_groups, keys)
        return reorder(current_groups, state_dict_groups)

    def load_state_dict(self: Any, state_dict: dict) -> Any:
        take_rates(self.optimizer.param_groups, state_dict.get("optimizer", {}).get("param_groups", []), keys)
        return load(self, state_dict)

    MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(reorder_groups)
    DistributedOptimizer.load_state_dict = load_state_dict


def take_rates(current: list[dict], saved: list[dict], keys: list[str]) -> None:
    """Give each saved parameter group the learning rates of the current one with the same `keys`, if there is one."""

    def identity(group: dict) -> tuple:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)

    for group in saved:
        same = [each for each in current if identity(each) == identity(group)]
        if len(same) == 1:
            group.update({rate: same[0][rate] for rate in RATES if rate in same[0]})
