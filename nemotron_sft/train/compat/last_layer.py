"""The last layer's MLP, or its experts, for the tokens that have a loss: no later attention looks at the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nemotron_sft.train.compat.registry import patch

Kept = Callable[[], Any]  # positions of those tokens in the row, (k,) int64, while a forward pass with labels runs


@patch(
    {
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp": (
            "(self, hidden_states, inference_context, padding_mask, packed_seq_params)"
        ),
        "megatron.core.ssm.mlp_layer:MLPLayer._forward_mlp": (
            "(self, hidden_states, inference_context, padding_mask, packed_seq_params)"
        ),
        "megatron.core.transformer.transformer_layer:MoETransformerLayer._forward_post_mlp": (
            "(self, mlp_output_with_bias, residual)"
        ),
        "megatron.core.transformer.moe.moe_layer:MoELayer.route": "(self, hidden_states, padding_mask)",
        "megatron.core.transformer.moe.moe_layer:MoELayer.forward": (
            "(self, hidden_states, intermediate_tensors, padding_mask)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core takes the positions of the tokens that need logits",
)
def shorten_last_layer(layer: Any, kept: Kept) -> int:
    """Give the MLP or the experts of a model's last layer the kept tokens only.

    Returns the FLOPs that a token takes there, forward and backward; 0 where the layer stays as it is, since it is run
    again in the backward pass, by when the positions are those of another row, or is divided by sequence parallelism.
    """
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

    config = layer.config
    run_again = config.recompute_granularity == "full" or getattr(config, "cuda_graph_impl", "none") != "none"
    divided = config.sequence_parallel or config.mtp_num_layers
    if type(layer) not in (TransformerLayer, MLPLayer, MoETransformerLayer) or run_again or divided:
        return 0
    if isinstance(layer.mlp, MLP):
        _shorten_mlp(layer, kept)
        return 6 * _matrices(layer.mlp)
    if isinstance(layer.mlp, MoELayer) and _experts_take_any_tokens(config):
        _shorten_experts(layer, kept)
        experts = _matrices(layer.mlp.experts)
        active = experts * config.moe_router_topk // layer.mlp.num_local_experts
        return 6 * (_matrices(layer.mlp) - _matrices(layer.mlp.router) - experts + active)
    return 0


def _shorten_mlp(layer: Any, kept: Kept) -> None:
    whole = layer._forward_mlp

    def forward_mlp(hidden_states, *args, **kwargs):
        if kept() is not None:
            hidden_states = take(hidden_states, kept())
        return whole(hidden_states, *args, **kwargs)

    layer._forward_mlp = forward_mlp


def _shorten_experts(layer: Any, kept: Kept) -> None:
    """All tokens are routed, since the experts' balance counts every one; the kept ones go to their experts."""
    moe = layer.mlp
    whole, add = moe.forward, layer._forward_post_mlp

    def forward(hidden_states, *args, padding_mask=None, **kwargs):
        if kept() is None:
            return whole(hidden_states, *args, padding_mask=padding_mask, **kwargs)
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()  # as core turns it
        routed = [take(each, kept()) for each in moe.route(hidden_states, mask)]
        moe.route = lambda *given: routed
        try:
            return whole(take(hidden_states, kept()), *args, **kwargs)
        finally:
            del moe.route

    def add_to_residual(output, residual):
        if len(residual) != len(output[0]):
            residual = take(residual, kept())
        return add(output, residual)

    moe.forward, layer._forward_post_mlp = forward, add_to_residual


def _experts_take_any_tokens(config: Any) -> bool:
    """Whether experts may get some of a row's tokens and still do with each what they would do with all.

    Not where they drop tokens beyond a share of the row, where ranks exchange equally long rows, where fp8 wants
    lengths of its own, or where tokens are routed again in the backward pass.
    """
    return (
        config.moe_token_dispatcher_type == "alltoall"
        and config.moe_expert_capacity_factor is None
        and not config.fp8
        and not (config.recompute_granularity == "selective" and "moe" in config.recompute_modules)
    )


def _matrices(module: Any) -> int:
    """Numbers in a module's matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)


def take(values: Any, positions: Any) -> Any:
    """values (T, ...) at `positions` (k,), of which no two are the same: (k, ...)."""
    return _taking().apply(values, positions)


@functools.cache
def _taking() -> Any:
    """The autograd function: `index_select` with a gradient that is copied to its place, not added there."""
    import torch

    class Taking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, positions):
            ctx.save_for_backward(positions)
            ctx.shape = values.shape
            return values.index_select(0, positions)

        @staticmethod
        def backward(ctx, gradient):
            (positions,) = ctx.saved_tensors
            return gradient.new_zeros(ctx.shape).index_copy_(0, positions, gradient), None

    return Taking
