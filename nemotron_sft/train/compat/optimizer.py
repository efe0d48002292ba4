"""Gradients are scaled once a step: by the number of trained tokens and by clipping, in one pass."""

from __future__ import annotations

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
def scale_gradients_once() -> None:
    """Core multiplies all gradients by 1 / trained tokens, and then again by what clipping makes of their norm.

    Each is a pass over 4 bytes per parameter, read and written. The first factor waits for the second. Only for
    optimizers that clip (clip_grad > 0).
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
        gradients = [getattr(parameter, name, None) for parameter in parameters]
        gradients = [clip_grads.to_local_if_dtensor(each).detach() for each in gradients if each is not None]
        clipped = torch.as_tensor(max_norm / (total_norm + 1.0e-6), device="cuda").clamp(max=1.0)
        factor = (clipped * waiting.get("factor", 1.0)).float().view(1)
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        clip_grads.multi_tensor_applier(
            clip_grads.multi_tensor_scale_tensor_impl, overflow, [gradients, gradients], factor
        )

    if clip_grads.multi_tensor_scale_tensor_impl is None:
        return
    DistributedDataParallel.scale_gradients = scale_gradients
    optimizer.get_grad_norm_fp32, optimizer.clip_grad_by_total_norm_fp32 = get_grad_norm, clip
