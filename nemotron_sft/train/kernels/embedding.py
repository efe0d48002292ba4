"""The gradient of an embedding, added straight into the buffer that core keeps for it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS, WIDTH, WARPS = 8, 1024, 4  # tokens that a program reads at a time, and columns


def eligible(gradient: Any, buffer: Any) -> bool:
    """Whether `add_gradient` can run."""
    return (
        gradient.is_cuda
        and gradient.dtype == torch.bfloat16
        and buffer.dtype in (torch.bfloat16, torch.float32)
        and buffer.is_contiguous()
        and gradient.numel() > 0
    )


def add_gradient(gradient: Any, ids: Any, buffer: Any) -> None:
    """buffer[ids[t]] += gradient[t] for every token t; each row of the buffer is summed up in fp32 and written once.

    gradient (T, hidden) bf16; ids (T,) int64; buffer (vocabulary, hidden) bf16 or fp32. Nothing is added atomically:
    the same input gives the same bits.
    """
    gradient = gradient.contiguous()
    total, hidden = gradient.shape
    ids, order = ids.sort(stable=True)
    ends = torch.searchsorted(ids, ids, right=True, out_int32=True)
    _add_rows[(total, triton.cdiv(hidden, WIDTH))](
        gradient, ids, order, ends, buffer, hidden, ROWS=ROWS, WIDTH=WIDTH, num_warps=WARPS
    )


@triton.jit
def _add_rows(gradient, ids, order, ends, buffer, hidden, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Some columns of all tokens with one id: the program of the first one adds them up, the others have nothing to do.

    ids, in ascending order; order: the token of each; ends: where the tokens with this id end, in that order.
    """
    first = tl.program_id(0)
    one = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if before != one:
        end = tl.load(ends + first)
        column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
        total = tl.zeros((1, WIDTH), tl.float32)
        for start in range(first, end, ROWS):
            place = start + tl.arange(0, ROWS)
            token = tl.load(order + place, mask=place < end, other=0)[:, None]
            inside = (place < end)[:, None] & (column < hidden)
            total += tl.sum(tl.load(gradient + token * hidden + column, mask=inside, other=0.0).to(tl.float32), 0, True)
        at = buffer + one * hidden + column
        total += tl.load(at, mask=column < hidden, other=0.0).to(tl.float32)
        tl.store(at, total.to(buffer.dtype.element_ty), mask=column < hidden)
