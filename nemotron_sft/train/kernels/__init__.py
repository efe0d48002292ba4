"""Triton kernels for a GPU: what other packages compute slowly, in as few passes over memory as it takes.

    adam.py         Adam's update of bf16 weights whose master weights are kept as remainders
    convolution.py  the causal convolution of Mamba layers, forward and backward
    cross_entropy.py  the loss of logits, and their gradient in the same pass
    embedding.py    the gradient of an embedding, added to its buffer
    grouped.py      tokens times the weights of all experts, and weight gradients written into their buffer
    norms.py        RMSNorm forward and backward, and RMSNorm of groups of channels backward
    squares.py      the norm of all gradients

`train/compat` puts their functions where others' were. Modules import torch and Triton at their top, as Triton's
functions need it, so import them inside the function that needs them. tests/train/kernels runs them in Triton's
interpreter, tests/gpu/test_kernels.py on a GPU beside what they stand in for, and bench/kernels.py times both.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl

PLAIN = (torch.Tensor, torch.nn.Parameter)  # other classes may hold quantized or distributed numbers


def in_triton(dtype: torch.dtype) -> Any:
    """Triton's name for a PyTorch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one of a CPU, whose programs Triton's interpreter runs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
