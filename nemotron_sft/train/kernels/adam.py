"""Adam's update of weights in bf16 whose fp32 master copies are kept as the 16 bits that bf16 lacks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from nemotron_sft.train.kernels import in_triton

BLOCK, WARPS = 2048, 4  # numbers of a program, and warps that it runs on


def update_together(several: list[tuple], factor: Any, settings: tuple, decoupled: bool) -> None:
    """Update tensors of one size in one launch.

    several: (gradient, weight in bf16, first moment, second moment, remainder) of each; factor: (1,) float32 of all
    gradients, or None; settings: lr, beta1, 1 - beta1, beta2, 1 - beta2, both moments' corrections, eps, weight decay.
    """
    gradient, _, first, second, _ = several[0]
    addresses = tuple(tensor.data_ptr() for tensors in several for tensor in tensors)
    table = _table(addresses, gradient.device)
    numbers = gradient.numel()
    blocks = triton.cdiv(numbers, BLOCK)
    _update[(blocks * len(several),)](
        table, table if factor is None else factor, *settings, numbers, blocks,
        GRADIENT=in_triton(gradient.dtype), FIRST=in_triton(first.dtype), SECOND=in_triton(second.dtype),
        SCALED=factor is not None, DECOUPLED=decoupled, ALIGNED=not any(address % 16 for address in addresses),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _table(addresses: tuple[int, ...], device: Any) -> Any:
    """Addresses as (tensors, 5) int64 on the GPU: they are the same in every step."""
    return torch.tensor(addresses, dtype=torch.int64).view(-1, 5).to(device)


@triton.jit
def _update(
    table, factor, lr, beta1, rest1, beta2, rest2, correction1, correction2, eps, decay, numbers, blocks,
    GRADIENT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    SCALED: tl.constexpr, DECOUPLED: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a tensor; a row of `table` has the addresses of its five.

    A master weight's upper 16 bits are the bf16 weight, rounded to nearest, its lower ones the remainder: where that is
    negative as an int16, the weight was rounded up. The formulas are those of Transformer Engine's adam.cu: with
    moments m and v, m' = m / (1 - beta1^step), v' likewise, the update is m' / (sqrt(v') + eps); weight decay is added
    to it (decoupled) or to the gradient.
    """
    row = table + (tl.program_id(0) // blocks) * 5
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    gradients = tl.load(row).to(tl.pointer_type(GRADIENT))
    weights = tl.load(row + 1).to(tl.pointer_type(tl.int16))
    firsts = tl.load(row + 2).to(tl.pointer_type(FIRST))
    seconds = tl.load(row + 3).to(tl.pointer_type(SECOND))
    remainders = tl.load(row + 4).to(tl.pointer_type(tl.int16))
    if ALIGNED:  # then several numbers are read at a time
        gradients, weights = tl.multiple_of(gradients, 16), tl.multiple_of(weights, 16)
        firsts, seconds = tl.multiple_of(firsts, 16), tl.multiple_of(seconds, 16)
        remainders = tl.multiple_of(remainders, 16)
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        gradient = gradient * tl.load(factor)
    upper = tl.load(weights + at, mask=inside, other=0).to(tl.int32)
    lower = tl.load(remainders + at, mask=inside, other=0).to(tl.int32)
    master = (((upper - (lower < 0).to(tl.int32)) << 16) | (lower & 0xFFFF)).to(tl.float32, bitcast=True)
    if not DECOUPLED:
        gradient = gradient + decay * master
    first = beta1 * tl.load(firsts + at, mask=inside, other=0.0).to(tl.float32) + rest1 * gradient
    second = beta2 * tl.load(seconds + at, mask=inside, other=0.0).to(tl.float32) + rest2 * gradient * gradient
    change = (first / correction1) / (tl.sqrt(second / correction2) + eps)
    if DECOUPLED:
        change = change + decay * master
    bits = (master - lr * change).to(tl.int32, bitcast=True)
    lower = bits.to(tl.int16)
    upper = (bits >> 16) + (lower < 0).to(tl.int32)
    tl.store(weights + at, upper.to(tl.int16), mask=inside)
    tl.store(remainders + at, lower, mask=inside)
    tl.store(firsts + at, first.to(FIRST), mask=inside)
    tl.store(seconds + at, second.to(SECOND), mask=inside)
