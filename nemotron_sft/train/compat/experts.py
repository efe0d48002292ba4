"""Mixture of experts on a GPU: the products of all experts of a layer in one kernel, and no wait for the host.

Why: Transformer Engine's grouped linear layer calls cuBLAS once for each expert, three times for each of its two
products (768 launches a layer with 128 experts), and core reads the number of tokens of every expert back to the
host, which stops launching meanwhile. PyTorch's grouped product, and ours on Hopper (kernels/grouped.py), take those
numbers on the GPU.
"""

from __future__ import annotations

import functools
from typing import Any

from nemotron_sft.train.compat.adapters import adapter_gradients
from nemotron_sft.train.compat.registry import patch


class OnDevice:
    """Tokens of each expert, (experts,) int64 on the GPU, in the place of the list that core makes of them."""

    def __init__(self, counts: Any):
        self.counts = counts

    def tolist(self) -> OnDevice:
        """Core asks for a list before it hands the numbers to the products; this is where it would wait."""
        return self

    @functools.cached_property
    def ends(self) -> Any:
        """Where each expert's tokens end, (experts,) int32 on the GPU."""
        import torch

        return self.counts.cumsum(0, dtype=torch.int32)


@patch(
    {
        "megatron.core.extensions.transformer_engine:TEGroupedLinear": "class | NoneType",
        "megatron.core.transformer.moe.moe_layer:MoEAlltoAllTokenDispatcher": "class",
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess": "(self, routing_map)",
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": (
            "(self, point, tokens_per_expert)"
        ),
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.dispatch_postprocess": (
            "(self, global_input_tokens, global_probs)"
        ),
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.combine_preprocess": (
            "(self, hidden_states)"
        ),
    },
    seen="transformer-engine 2.20, megatron-core 0.19.2",
    until="Transformer Engine's grouped tensors (use_grouped_tensor) run on Hopper in bf16",
)
def use_grouped_products() -> None:
    """Give core's grouped linear layers and its dispatcher the forms below. Call before a model is built."""
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.transformer.moe import moe_layer

    _patch_grouped_linear(extension.TEGroupedLinear)
    moe_layer.MoEAlltoAllTokenDispatcher = _local_dispatcher(moe_layer.MoEAlltoAllTokenDispatcher)


def _patch_grouped_linear(layer: type) -> None:
    build, reference = layer.__init__, layer.forward

    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        _lay_side_by_side(self)

    def forward_with_adapter(self, x, m_splits, *adapter):
        """The layer's output, and whether that of the adapter (A, B, scale) is in it."""
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        if _eligible(self, x) and _stacked(weights) is not None:
            ends = _ends(m_splits, x.device)
            return _product().apply(x, ends, self.fuse_wgrad_accumulation, *(adapter or (None,) * 3), *weights), True
        output, _ = reference(self, x, m_splits.counts.tolist() if isinstance(m_splits, OnDevice) else m_splits)
        return output, False

    def forward(self, x, m_splits):
        return forward_with_adapter(self, x, m_splits)[0], None

    layer.__init__, layer.forward, layer.forward_with_adapter = init, forward, forward_with_adapter


def _ends(m_splits: Any, device: Any) -> Any:
    """Where each expert's tokens end, (experts,) int32 on the GPU, from core's list or from `OnDevice`."""
    import torch

    if isinstance(m_splits, OnDevice):
        return m_splits.ends
    ends = torch.tensor(m_splits, dtype=torch.int64).cumsum(0, dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True)


def _eligible(layer: Any, x: Any) -> bool:
    import torch
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return (
        x.dtype == torch.bfloat16
        and len(x) > 0
        and not layer.use_bias
        and not layer.single_grouped_weight
        and not layer.delay_wgrad_compute
        and not FP8GlobalStateManager.is_fp8_enabled()
    )


def _lay_side_by_side(layer: Any) -> None:
    """Move the experts' weights into one tensor (experts, out, in), and register them last to first.

    Core fills its buffers from the last parameter to the first: in there, too, they then stand in ascending order.
    """
    import torch

    if layer.single_grouped_weight or layer.weight0.is_meta or type(layer.weight0.data) is not torch.Tensor:
        return
    names = [f"weight{i}" for i in range(layer.num_gemms)]
    whole = torch.stack([layer._parameters[name].data for name in names])
    for name, place in zip(names, whole, strict=True):
        layer._parameters[name].data = place
    for name in reversed(names):
        layer._parameters[name] = layer._parameters.pop(name)


def _stacked(tensors: list) -> Any:
    """Tensors (out, in) that stand side by side in memory, as a view (experts, out, in); None where they do not."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    step = tensors[1].data_ptr() - first.data_ptr()
    rows, columns = first.shape
    if step % first.element_size() or step < rows * columns * first.element_size():
        return None
    if any(t.data_ptr() != first.data_ptr() + i * step for i, t in enumerate(tensors)) or not first.is_contiguous():
        return None
    return first.detach().as_strided((len(tensors), rows, columns), (step // first.element_size(), columns, 1))


@functools.cache
def _product() -> Any:
    """The autograd function: tokens (T, in) sorted by expert, ends (experts,), weights (out, in) -> (T, out).

    down (rank, in), up (out, rank) and scale are those of an adapter that all experts share, or None.
    """
    import torch
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    class GroupedProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tokens, ends, accumulate, down, up, scale, *weights):
            output = _multiplied(tokens, _stacked(weights), ends, False)
            inner = None
            if down is not None:
                inner = tokens @ down.t()
                output.addmm_(inner, up.t(), alpha=scale)
            ctx.save_for_backward(tokens, ends, inner, down, up)
            ctx.weights, ctx.accumulate, ctx.scale = weights, accumulate, scale
            return output

        @staticmethod
        def backward(ctx, gradient):
            tokens, ends, inner, down, up = ctx.saved_tensors
            weights, gradient = ctx.weights, gradient.contiguous()
            to_tokens = _multiplied(gradient, _stacked(weights), ends, True) if ctx.needs_input_grad[0] else None
            to_down = to_up = None
            if down is not None:
                to_inner, to_down, to_up = adapter_gradients(gradient, tokens, inner, down, up, ctx.scale)
                to_tokens = None if to_tokens is None else to_tokens.addmm_(to_inner, down)
            if not ctx.needs_input_grad[6]:
                return to_tokens, None, None, to_down, to_up, None, *[None] * len(weights)
            if not ctx.accumulate:
                to_weights = _gradients_of_weights(gradient, tokens, ends)
                return to_tokens, None, None, to_down, to_up, None, *to_weights.unbind()
            _add_to_main_grads(weights, gradient, tokens, ends)
            dummies = [get_dummy_wgrad(list(weight.shape), weight.dtype) for weight in weights]
            return to_tokens, None, None, to_down, to_up, None, *dummies

    return GroupedProduct


def _multiplied(tokens: Any, weights: Any, ends: Any, transposed: bool) -> Any:
    """(T, out) from tokens (T, in), sorted by expert, and weights (experts, out, in), or (experts, in, out)."""
    import torch

    if tokens.is_cuda:
        from nemotron_sft.train.kernels import grouped

        if grouped.eligible(tokens, weights):
            return grouped.multiply(tokens, weights, ends, transposed)
    return torch._grouped_mm(tokens, weights if transposed else weights.transpose(1, 2), offs=ends)


def _gradients_of_weights(gradient: Any, tokens: Any, ends: Any) -> Any:
    """(experts, out, in) from gradient (T, out) and tokens (T, in), sorted by expert; ends: (experts,).

    For experts without a token PyTorch's product leaves what was in the memory, on GPUs other than Hopper
    (pytorch/pytorch#172439): their gradients are zero.
    """
    import torch

    gradients = torch._grouped_mm(gradient.t(), tokens, offs=ends)
    idle = ends == torch.cat([ends.new_zeros(1), ends[:-1]])
    return gradients.masked_fill_(idle[:, None, None], 0)


def _add_to_main_grads(weights: tuple, gradient: Any, tokens: Any, ends: Any) -> None:
    """Add the experts' gradients to the buffers that core keeps, and tell core so, as Transformer Engine does.

    The first of a step finds zeros there and need not read them; core takes back its mark when it clears the buffers.
    """
    buffers = [weight.main_grad for weight in weights]
    whole = _stacked(buffers)
    first = not any(getattr(weight, "grad_added_to_main_grad", True) for weight in weights)
    if whole is None or not _added_in_place(gradient, tokens, ends, whole, first):
        gradients = _gradients_of_weights(gradient, tokens, ends)
        pairs = zip(buffers, gradients, strict=True) if whole is None else [(whole, gradients)]
        for buffer, one in pairs:
            buffer.copy_(one) if first else buffer.add_(one)
    for weight in weights:
        weight.grad_added_to_main_grad = True


def _added_in_place(gradient: Any, tokens: Any, ends: Any, buffer: Any, first: bool) -> bool:
    """Multiply straight into the buffer (experts, out, in), where the GPU can."""
    if not gradient.is_cuda:
        return False
    from nemotron_sft.train.kernels import grouped

    if not grouped.eligible_gradients(gradient, tokens, buffer):
        return False
    grouped.weight_gradients(gradient, tokens, ends, buffer, first)
    return True


def _local_dispatcher(base: type) -> type:
    """Core's all-to-all dispatcher, for a rank that holds all experts: nothing to exchange, nothing to sort again."""

    class LocalDispatcher(base):
        @functools.cached_property
        def _local(self) -> bool:
            config = self.config
            return (
                self.ep_size == 1
                and self.tp_size == 1
                and config.moe_grouped_gemm
                and not (self.drop_and_pad or config.moe_expert_capacity_factor is not None)
                and not (config.moe_router_padding_for_quantization or config.fp8 or config.fp4)
                and not config.use_transformer_engine_op_fuser
                and config.cuda_graph_impl == "none"
            )

        def preprocess(self, routing_map):
            if not self._local:
                return super().preprocess(routing_map)
            self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk
            return routing_map.sum(dim=0)

        def _maybe_dtoh_and_synchronize(self, point, tokens_per_expert=None):
            return tokens_per_expert if self._local else super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

        def dispatch_postprocess(self, global_input_tokens, global_probs):
            if not self._local:
                return super().dispatch_postprocess(global_input_tokens, global_probs)
            counts, self.tokens_per_expert = self.tokens_per_expert, None
            return global_input_tokens, OnDevice(counts), global_probs

        def combine_preprocess(self, hidden_states):
            return hidden_states if self._local else super().combine_preprocess(hidden_states)

    return LocalDispatcher
