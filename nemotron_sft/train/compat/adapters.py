"""LoRA on a GPU: the adapter's output is added inside its second product, instead of in kernels of its own."""

from __future__ import annotations

import functools
from typing import Any

from nemotron_sft.train.compat.registry import patch


@patch(
    {
        "megatron.bridge.peft.lora_layers:LoRALinear.forward": "(self, x, *args, **kwargs)",
        "megatron.bridge.peft.lora_layers:LoRALinear.base_linear_forward": "(self, x, *args, **kwargs)",
        "megatron.bridge.peft.utils:ParallelLinearAdapter": "class",
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge's fused adapters (use_transformer_engine_op_fuser) take Mamba's projections and experts",
)
def add_adapters_inside_their_products() -> None:
    """Scaling an adapter's output and adding it are two passes over tensors as large as the layer's output.

    With experts that was a sixth of the GPU's time. A product can add to its result in place.
    """
    from megatron.bridge.peft.lora_layers import LoRALinear
    from megatron.core.extensions.transformer_engine import TEGroupedLinear

    reference = LoRALinear.forward

    def forward(self, x, *args, **kwargs):
        if not self._adapter_enabled or not _plain(self.adapter):
            return reference(self, x, *args, **kwargs)
        adapter = self.adapter
        factors = adapter.linear_in.weight, adapter.linear_out.weight, adapter.alpha / adapter.dim
        if isinstance(self.to_wrap, TEGroupedLinear):
            output, added = self.to_wrap.forward_with_adapter(x, *args, *factors)
            return (output, None) if added else (add_adapter().apply(output, x, *factors), None)
        output, bias, given = self.base_linear_forward(x, *args, **kwargs)
        return add_adapter().apply(output, given, *factors), bias

    LoRALinear.forward = forward


def _plain(adapter: Any) -> bool:
    """Whether an adapter is two products and a factor: no dropout, activation or communication between them."""
    import torch
    from megatron.bridge.peft.utils import ParallelLinearAdapter

    return (
        type(adapter) is ParallelLinearAdapter
        and isinstance(adapter.activation, torch.nn.Identity)
        and isinstance(adapter.dropout, torch.nn.Identity)
        and (adapter.tp_group is None or adapter.tp_group.size() == 1)
    )


@functools.cache
def add_adapter() -> Any:
    """The autograd function (output, given, A, B, scale) -> output + scale given A^T B^T, in the memory of `output`.

    output (..., out), which no one else may need; given (..., in); A (rank, in); B (out, rank).
    """
    import torch

    class AddAdapter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output, given, down, up, scale):
            rows = given.reshape(-1, given.shape[-1])
            inner = rows @ down.t()
            ctx.save_for_backward(rows, inner, down, up)
            ctx.scale, ctx.shape = scale, given.shape
            result = output.detach()
            result.view(-1, result.shape[-1]).addmm_(inner, up.t(), alpha=scale)
            return result

        @staticmethod
        def backward(ctx, gradient):
            rows, inner, down, up = ctx.saved_tensors
            to_inner, to_down, to_up = adapter_gradients(gradient, rows, inner, down, up, ctx.scale)
            return gradient, (to_inner @ down).view(ctx.shape), to_down, to_up, None

    return AddAdapter


def adapter_gradients(gradient: Any, rows: Any, inner: Any, down: Any, up: Any, scale: float) -> tuple:
    """Gradients of `inner` (t, rank), A and B from that of the output (..., out); rows (t, in), inner = rows A^T."""
    gradient = gradient.reshape(-1, gradient.shape[-1])
    to_inner = (gradient @ up).mul_(scale)
    return to_inner, to_inner.t() @ rows, (gradient.t() @ inner).mul_(scale)
