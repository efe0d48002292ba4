"""Kernels of other packages that reach a part of the GPU's memory bandwidth, and ours that reach most of it.

Each stands in only where its arguments are what it was made for; else the package's own runs as before.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

from nemotron_sft.train.compat.registry import patch


@patch(
    {
        # class: the stand-in of a machine without a GPU
        "transformer_engine.pytorch.cpp_extensions:rmsnorm_fwd": "compiled | class | missing",
        "transformer_engine_torch:rmsnorm_bwd": "compiled | class | missing",
        "transformer_engine.pytorch.ops.basic.rmsnorm:rmsnorm_fwd": "compiled | class | missing",
        "transformer_engine.pytorch.ops.basic.rmsnorm:rmsnorm_bwd": "compiled | class | missing",
        "mamba_ssm.ops.triton.layernorm_gated:_layer_norm_bwd": (
            "(dy, x, weight, bias, eps, mean, rstd, z, group_size, norm_before_gate, is_rms_norm, recompute_output, "
            "dz, out) | missing"
        ),
    },
    seen="transformer-engine 2.20, mamba-ssm 2.3.2",
    until="they read a row once, and several numbers at a time",
)
def normalise_in_one_pass() -> None:
    """RMSNorm of widths that Transformer Engine has no tuned kernel for (2,688), and of groups in Mamba layers.

    Its general kernels reach 35 and 60 % of an H100's bandwidth, mamba-ssm's backward one 30 %.
    """
    import transformer_engine.pytorch.cpp_extensions as functions
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.ops.basic import rmsnorm

    from nemotron_sft.train.kernels import norms

    their_forward, their_backward = extension.rmsnorm_fwd, extension.rmsnorm_bwd

    def forward(*args, **kwargs):
        ours = not kwargs and norms.eligible(*args)
        return norms.forward(*args) if ours else their_forward(*args, **kwargs)

    def backward(*args, **kwargs):
        ours = not kwargs and norms.eligible_backward(*args)
        return norms.backward(*args) if ours else their_backward(*args, **kwargs)

    functions.rmsnorm_fwd, extension.rmsnorm_bwd = forward, backward
    rmsnorm.rmsnorm_fwd, rmsnorm.rmsnorm_bwd = forward, backward
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton import layernorm_gated

        their_grouped = layernorm_gated._layer_norm_bwd

        def backward_grouped(*args, **kwargs):
            ours = norms.eligible_grouped(*args, **kwargs)
            return norms.backward_grouped(*args, **kwargs) if ours else their_grouped(*args, **kwargs)

        layernorm_gated._layer_norm_bwd = backward_grouped


@patch(
    {
        "mamba_ssm.ops.triton.ssd_combined:causal_conv1d_fwd_function": (
            "(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation) | NoneType | missing"
        ),
        "mamba_ssm.ops.triton.ssd_combined:causal_conv1d_bwd_function": (
            "(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, "
            "silu_activation) | NoneType | missing"
        ),
    },
    seen="mamba-ssm 2.3.2, causal-conv1d 1.7.0",
    until="causal-conv1d reads rows that know their documents as fast as others",
)
def convolve_in_one_pass() -> None:
    """The convolution of Mamba layers: causal-conv1d's reaches 60 % of an H100's bandwidth, and 35 % backward."""
    if not (importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("causal_conv1d")):
        return
    from mamba_ssm.ops.triton import ssd_combined

    from nemotron_sft.train.kernels import convolution

    their_forward, their_backward = ssd_combined.causal_conv1d_fwd_function, ssd_combined.causal_conv1d_bwd_function

    def forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
        if convolution.eligible(x, weight, bias, seq_idx, initial_states, final_states_out):
            return convolution.forward(x, weight, bias, seq_idx, silu_activation)
        return their_forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)

    def backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_initial, silu_activation):
        if convolution.eligible(x, weight, bias, seq_idx, initial_states, dfinal_states, dout, dx):
            return convolution.backward(x, weight, bias, dout, seq_idx, dx, silu_activation)
        return their_backward(
            x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_initial, silu_activation
        )

    ssd_combined.causal_conv1d_fwd_function, ssd_combined.causal_conv1d_bwd_function = forward, backward


@patch(
    {
        "megatron.core.optimizer.clip_grads:l2_norm_impl": (
            "compiled | (chunk_size, noop_flag, tensor_lists, per_tensor, *args)"
        )
    },
    seen="megatron-core 0.19.2, transformer-engine 2.20",
    until="Transformer Engine's multi_tensor_l2norm reads several numbers at a time, in fewer launches",
)
def sum_squares_in_one_launch() -> None:
    """The norm of gradients: Transformer Engine's takes a launch for every few tensors, and 60 % of the bandwidth."""
    from megatron.core.optimizer import clip_grads

    from nemotron_sft.train.kernels import squares

    theirs = clip_grads.l2_norm_impl

    def l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
        ours = not per_tensor and squares.eligible(tensor_lists[0])
        return (squares.l2norm if ours else theirs)(chunk_size, noop_flag, tensor_lists, per_tensor)

    clip_grads.l2_norm_impl = l2norm


@patch(
    {"megatron.core.tensor_parallel.layers:F": "module"},
    seen="megatron-core 0.19.2",
    until="core adds the gradient of an embedding to its buffer without making it a matrix first",
)
def add_up_embeddings_in_place() -> None:
    """PyTorch makes a matrix (vocabulary, hidden) of an embedding's gradient, and core adds it to its own one.

    With a vocabulary of 131,072 these are four passes over 0.7 GB for the rows of at most 32,768 tokens.
    """
    import torch
    from megatron.core.tensor_parallel import layers

    def embedding(ids, weight):
        # Of a weight that the output layer shares, core adds up two gradients itself.
        ours = hasattr(weight, "main_grad") and weight.requires_grad and not getattr(weight, "zero_out_wgrad", False)
        return _embedded().apply(ids, weight) if ours else torch.nn.functional.embedding(ids, weight)

    functions = ModuleType("functional")
    vars(functions).update(vars(torch.nn.functional) | {"embedding": embedding})
    layers.F = functions


@functools.cache
def _embedded() -> Any:
    """The autograd function: rows of a weight whose gradient goes to `main_grad`, and core is told so."""
    import torch

    class Embedded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, ids, weight):
            ctx.save_for_backward(ids)
            ctx.weight = weight
            return torch.nn.functional.embedding(ids, weight)

        @staticmethod
        def backward(ctx, gradient):
            from nemotron_sft.train.kernels import embedding

            (ids,), weight = ctx.saved_tensors, ctx.weight
            if not embedding.eligible(gradient, weight.main_grad):
                return None, torch.ops.aten.embedding_dense_backward(gradient, ids, len(weight), -1, False)
            embedding.add_gradient(gradient.flatten(0, -2), ids.flatten(), weight.main_grad)
            weight.grad_added_to_main_grad = True
            return None, torch.empty_like(weight)  # core's hook wants one, and does not read it

    return Embedded
