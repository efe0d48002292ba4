"""Adam's update on a GPU, for weights in bf16 whose fp32 master copies are kept as the 16 bits that bf16 lacks."""

from __future__ import annotations

import functools
from typing import Any

from nemotron_sft.train.compat.registry import patch

LARGE = 1 << 16  # numbers from which a tensor is worth a launch of its own; smaller ones are left to one of theirs
BLOCK, WARPS = 2048, 4  # numbers of a program, and warps that it runs on


@patch(
    {"transformer_engine_torch:multi_tensor_adam_param_remainder": "compiled | missing"},  # missing without a GPU
    seen="transformer-engine 2.20",
    until="Transformer Engine's kernel reads several numbers at a time, and takes a factor for the gradients",
)
def read_memory_at_full_speed(factors: Factors) -> None:
    """Stand in for the kernel of Transformer Engine's FusedAdam that keeps remainders of master weights.

    It moves 28 bytes per parameter, one number per thread and access, at 60 % of an H100's memory bandwidth, and the
    factor of the gradients (clipping, and one over the number of tokens) takes a pass over them before. Here both are
    one pass over wide accesses. Call it before the optimizer is made. The state stays what it was.
    """
    import transformer_engine_torch as extension

    theirs = extension.multi_tensor_adam_param_remainder

    def adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
        corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        settings = (lr, beta1, 1 - beta1, beta2, 1 - beta2, *corrections, eps, decay)
        together: dict[tuple, list] = {}
        small = []
        for tensors in zip(*lists, strict=True):
            if not _is_large(tensors[0]):
                small.append(tensors)
                continue
            factor = factors.take(tensors[0])
            gradient, _, first, second, _ = tensors
            kind = (gradient.numel(), gradient.dtype, first.dtype, second.dtype, id(factor))
            together.setdefault(kind, [factor]).append(tensors)
        if small:
            theirs(chunk, overflow, list(map(list, zip(*small, strict=True))), lr, beta1, beta2, eps, step, mode,
                   bias_correction, decay)  # fmt: skip
        for factor, *several in together.values():
            launch(several, factor, settings, bool(mode))

    extension.multi_tensor_adam_param_remainder = adam


class Factors:
    """Which gradients wait for a factor until Adam reads them: {address: (1,) float32 on the GPU}."""

    def __init__(self) -> None:
        self._waiting: dict[int, Any] = {}

    def put(self, gradients: list, factor: Any) -> list:
        """Let large gradients wait for `factor`; returns the others, which have to be scaled now.

        Raises RuntimeError where one still waits for its factor of the step before: Adam did not run on it.
        """
        large = {gradient.data_ptr(): factor for gradient in gradients if _is_large(gradient)}
        if self._waiting.keys() & large.keys():
            raise RuntimeError("gradients of the last step were not scaled: Adam did not take their factor")
        self._waiting |= large
        return [gradient for gradient in gradients if not _is_large(gradient)]

    def take(self, gradient: Any) -> Any:
        """The factor of a gradient, None if none was put; it is there once."""
        return self._waiting.pop(gradient.data_ptr(), None)


def _is_large(gradient: Any) -> bool:
    return LARGE <= gradient.numel() < 1 << 31 and gradient.is_contiguous()  # no larger one was tried


def launch(several: list[tuple], factor: Any, settings: tuple, decoupled: bool) -> None:
    """Update tensors of one size in one launch.

    several: (gradient, weight in bf16, first moment, second moment, remainder) of each; factor: (1,) float32 of all
    gradients, or None; settings: lr, beta1, 1 - beta1, beta2, 1 - beta2, both moments' corrections, eps, weight decay.
    """
    gradient, _, first, second, _ = several[0]
    addresses = tuple(tensor.data_ptr() for tensors in several for tensor in tensors)
    table = _table(addresses, gradient.device)
    numbers = gradient.numel()
    blocks = (numbers + BLOCK - 1) // BLOCK
    kernel()[(blocks * len(several),)](
        table, table if factor is None else factor, *settings, numbers, blocks,
        GRADIENT=_in_triton(gradient.dtype), FIRST=_in_triton(first.dtype), SECOND=_in_triton(second.dtype),
        SCALED=factor is not None, DECOUPLED=decoupled, ALIGNED=not any(address % 16 for address in addresses),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _table(addresses: tuple[int, ...], device: Any) -> Any:
    """Addresses as (tensors, 5) int64 on the GPU: they are the same in every step."""
    import torch

    return torch.tensor(addresses, dtype=torch.int64).view(-1, 5).to(device)


def _in_triton(dtype: Any) -> Any:
    """Triton's name for a PyTorch dtype."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


@functools.cache
def kernel() -> Any:
    """The kernel, compiled by Triton when it is first launched.

    A master weight's upper 16 bits are the bf16 weight, rounded to nearest, its lower ones the remainder: where that is
    negative as an int16, the weight was rounded up. The formulas are those of Transformer Engine's adam.cu: with
    moments m and v, m' = m / (1 - beta1^step), v' likewise, the update is m' / (sqrt(v') + eps); weight decay is added
    to it (decoupled) or to the gradient.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def update(
        table, factor, lr, beta1, rest1, beta2, rest2, correction1, correction2, eps, decay, numbers, blocks,
        GRADIENT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
        SCALED: tl.constexpr, DECOUPLED: tl.constexpr,
        ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
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

    return update
