"""The loss of logits over a large vocabulary, and their gradient in the same launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemotron_sft.train.kernels import processors

THREADS, EACH, WARPS = 1024, 8, 32  # of a program: parts of a row that are added up apart, and numbers of one at a time
PROGRAMS = 2  # on each multiprocessor: of few rows under work much is still in the cache when they are read again
IGNORED = -100  # a label without a loss, as in PyTorch and Transformer Engine
LOWEST = tl.constexpr(-3.4028234e38)  # of fp32; -inf less -inf would be no number


def eligible(logits: Any, labels: Any, group: Any) -> bool:
    """Whether `losses_of` can run: one rank has the whole vocabulary."""
    return (
        logits.is_cuda
        and logits.dtype in (torch.bfloat16, torch.float32)
        and logits.is_contiguous()
        and labels.dtype == torch.int64
        and logits.numel() > 0
        and (group is None or group.size() == 1)
    )


def losses_of(logits: Any, labels: Any) -> Any:
    """-log softmax(logits)[label] of every token in fp32, 0 where the label is IGNORED; see `eligible`.

    logits (..., vocabulary), labels and losses (...). Where logits need a gradient, it takes their place: nobody may
    read them any more.
    """
    return _Losses.apply(logits, labels, logits.requires_grad and torch.is_grad_enabled())


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, needs_gradient):
        columns, labels = logits.shape[-1], labels.contiguous()
        losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        rows = labels.numel()
        programs = min(rows, PROGRAMS * processors(logits.device))
        _forward[(programs,)](
            logits, labels, losses, rows, columns, IGNORED,
            GRADIENT=needs_gradient, THREADS=THREADS, EACH=EACH, num_warps=WARPS,
        )  # fmt: skip
        if needs_gradient:
            ctx.save_for_backward(logits.detach())
        return losses

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        rows, columns = gradient.numel(), logits.shape[-1]
        _scale[(rows,)](logits, gradient.contiguous(), columns, BLOCK=THREADS * EACH, num_warps=WARPS)
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


@triton.jit
def _forward(
    logits, labels, losses, rows, columns, ignored,
    GRADIENT: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Row after row: the largest number and the sum of exponentials beside it, then the gradient.

    The second time a row is read from its end, which is what the cache surely still has.
    """
    lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        numbers = logits + tl.cast(row, tl.int64) * columns
        label = tl.load(labels + row)
        trained = label != ignored
        largest, total = tl.full((THREADS,), LOWEST, tl.float32), tl.zeros((THREADS,), tl.float32)
        for start in range(0, columns, THREADS * EACH):
            place = start + lane
            value = tl.load(numbers + place, mask=place < columns, other=-float("inf"), eviction_policy="evict_last")
            value = value.to(tl.float32)
            before, largest = largest, tl.maximum(largest, tl.max(value, 1))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest[:, None]), 1)
        top = tl.max(largest, 0)
        total = tl.sum(total * tl.exp(largest - top), 0)
        loss = tl.log(total) - (tl.load(numbers + label, mask=trained, other=0.0).to(tl.float32) - top)
        tl.store(losses + row, tl.where(trained, loss, 0.0))
        if GRADIENT:
            tl.debug_barrier()  # the label's logit has been read
            part = 1 / total
            for block in range(tl.cdiv(columns, THREADS * EACH) - 1, -1, -1):
                place = block * THREADS * EACH + lane
                value = tl.load(numbers + place, mask=place < columns, other=0.0, eviction_policy="evict_first")
                value = tl.exp(value.to(tl.float32) - top) * part - (place == label).to(tl.float32)
                value = tl.where(trained, value, 0.0).to(logits.dtype.element_ty)
                tl.store(numbers + place, value, mask=place < columns, eviction_policy="evict_first")


@triton.jit
def _scale(logits, factors, columns, BLOCK: tl.constexpr):
    """Multiply a row by its factor, which is one unless tokens are weighted: then nothing is read."""
    row = tl.program_id(0)
    factor = tl.load(factors + row)
    if factor != 1.0:
        numbers = logits + tl.cast(row, tl.int64) * columns
        for start in range(0, columns, BLOCK):
            place = start + tl.arange(0, BLOCK)
            value = tl.load(numbers + place, mask=place < columns, other=0.0).to(tl.float32) * factor
            tl.store(numbers + place, value.to(logits.dtype.element_ty), mask=place < columns)
