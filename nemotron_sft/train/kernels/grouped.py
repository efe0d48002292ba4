"""Weight gradients of a mixture of experts, written straight into the buffer that core keeps for them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, WIDE, NARROW = 128, 256, 128  # a program's tile is (ROWS, WIDE + NARROW) of a weight's gradient
TOKENS = 64  # that a program multiplies at a time
STRIP = 8  # tiles above one another that follow each other, so that they find the same tokens in the cache
WARPS, STAGES = 8, 3


def eligible(gradient: Any, tokens: Any, buffer: Any) -> bool:
    """Whether `weight_gradients` can run: the GPU copies tiles in its own way (Hopper), in pieces of 16 bytes."""
    return (
        gradient.is_cuda
        and torch.cuda.get_device_capability(gradient.device)[0] == 9
        and buffer.dtype in (torch.bfloat16, torch.float32)
        and buffer.stride()[1:] == (buffer.shape[2], 1)
        and all(
            each.dtype == torch.bfloat16 and each.is_contiguous() and len(each) > 0 and each.shape[1] % 8 == 0
            for each in (gradient, tokens)
        )
    )


def weight_gradients(gradient: Any, tokens: Any, ends: Any, buffer: Any, first: bool) -> None:
    """buffer[e] = gradient_e^T tokens_e for every expert e, in fp32 inside; added to what is there unless `first`.

    gradient (T, out) and tokens (T, in), sorted by expert; ends (experts,) int32 on the GPU: where each expert's tokens
    end; buffer (experts, out, in), of which the experts may lie apart.
    """
    experts, rows, columns = buffer.shape
    tiles = experts * triton.cdiv(rows, ROWS) * triton.cdiv(columns, WIDE + NARROW)
    _multiply[(tiles,)](
        _by_expert(gradient, ROWS), _by_expert(tokens, WIDE), _by_expert(tokens, NARROW), ends, buffer,
        rows, columns, buffer.stride(0),
        FIRST=first, ROWS=ROWS, WIDE=WIDE, NARROW=NARROW, TOKENS=TOKENS, STRIP=STRIP,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def _by_expert(matrix: Any, columns: int) -> TensorDescriptor:
    """Tiles (TOKENS, columns) of a matrix (T, width), found by [first token of the expert, token of it, column].

    Tokens before the expert's first have negative numbers, for which the GPU's copy gives zeros.
    """
    total, width = matrix.shape
    return TensorDescriptor(matrix, [total, total, width], [width, width, 1], [1, TOKENS, columns])


@triton.jit
def _multiply(
    gradient, tokens, tokens_narrow, ends, buffer, rows, columns, stride,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    TOKENS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """One tile. The tokens are taken in blocks that end at the expert's last one, so only the first is not full.

    The tile's width is no power of two, as a tensor's has to be: so it is two, which share what is read of `gradient`.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, WIDE + NARROW)
    expert, tile = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    above = tile // (STRIP * across) * STRIP
    height = tl.minimum(down - above, STRIP)
    row = (above + tile % (STRIP * across) % height) * ROWS
    column = tile % (STRIP * across) // height * (WIDE + NARROW)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    count = tl.load(ends + expert) - start
    wide, narrow = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, NARROW), tl.float32)
    for block in range(tl.cdiv(count, TOKENS), 0, -1):
        token = count - block * TOKENS
        left = gradient.load([start, token, row]).reshape(TOKENS, ROWS).T
        wide = tl.dot(left, tokens.load([start, token, column]).reshape(TOKENS, WIDE), wide)
        narrow = tl.dot(left, tokens_narrow.load([start, token, column + WIDE]).reshape(TOKENS, NARROW), narrow)
    place = buffer + expert.to(tl.int64) * stride
    _write(place, wide, row, column, rows, columns, FIRST, ROWS, WIDE)
    _write(place, narrow, row, column + WIDE, rows, columns, FIRST, ROWS, NARROW)


@triton.jit
def _write(
    place, values, row, column, rows, columns, FIRST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Put values (HEIGHT, WIDTH) at a row and column of the matrix (rows, columns), or add them to what is there."""
    row = row + tl.arange(0, HEIGHT)[:, None]
    column = column + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    at = place + row * columns + column
    if not FIRST:
        values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, values.to(place.dtype.element_ty), mask=inside)
