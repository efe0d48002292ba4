"""A mixture of experts: tokens times their experts' weights, and weight gradients written into core's buffer."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, WIDE, NARROW = 128, 256, 128  # a program's tile is (ROWS, WIDE + NARROW) of the result
STEP = 64  # tokens, or numbers of a token, that a program multiplies at a time
STRIP = 8  # tiles above one another that follow each other, so that they find the same columns in the cache
WARPS, STAGES = 8, 3


def eligible(tokens: Any, weights: Any) -> bool:
    """Whether `multiply` can run: the GPU copies tiles in its own way (Hopper), in pieces of 16 bytes."""
    return (
        _is_hopper(tokens)
        and _are_rows(tokens)
        and weights.dtype == torch.bfloat16
        and weights.stride(2) == 1
        and all(size % 8 == 0 for size in (*weights.stride()[:2], *weights.shape[1:]))
        and weights.data_ptr() % 16 == 0
    )


def multiply(tokens: Any, weights: Any, ends: Any, transposed: bool) -> Any:
    """tokens_e weights_e^T for every expert e, or tokens_e weights_e where `transposed`; fp32 inside.

    tokens (T, in), sorted by expert; weights (experts, out, in), or (experts, in, out); ends (experts,) int32 on the
    GPU: where each expert's tokens end, the last of them T. Returns (T, out).
    """
    experts, columns = len(weights), weights.shape[2 if transposed else 1]
    total, inner = tokens.shape
    out = torch.empty(total, columns, dtype=tokens.dtype, device=tokens.device)

    def of_experts(width: int) -> TensorDescriptor:
        block = [1, STEP, width] if transposed else [1, width, STEP]
        return TensorDescriptor(weights, list(weights.shape), list(weights.stride()), block)

    rows = TensorDescriptor(tokens, [total, inner], [inner, 1], [ROWS, STEP])
    tiles = (total // ROWS + experts) * triton.cdiv(columns, WIDE + NARROW)  # at most: an expert's last may not be full
    _multiply[(tiles,)](
        rows, of_experts(WIDE), of_experts(NARROW), ends, out, columns, inner, experts,
        TRANSPOSED=transposed, EXPERTS=triton.next_power_of_2(experts), ROWS=ROWS, WIDE=WIDE, NARROW=NARROW, STEP=STEP,
        STRIP=STRIP, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def eligible_gradients(gradient: Any, tokens: Any, buffer: Any) -> bool:
    """Whether `weight_gradients` can run, see `eligible`."""
    return (
        _is_hopper(gradient)
        and buffer.dtype in (torch.bfloat16, torch.float32)
        and buffer.stride()[1:] == (buffer.shape[2], 1)
        and _are_rows(gradient, tokens)
    )


def _is_hopper(tensor: Any) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def _are_rows(*matrices: Any) -> bool:
    return all(
        each.dtype == torch.bfloat16 and each.is_contiguous() and len(each) > 0 and each.shape[1] % 8 == 0
        for each in matrices
    )


def weight_gradients(gradient: Any, tokens: Any, ends: Any, buffer: Any, first: bool) -> None:
    """buffer[e] = gradient_e^T tokens_e for every expert e, in fp32 inside; added to what is there unless `first`.

    gradient (T, out) and tokens (T, in), sorted by expert; ends (experts,) int32 on the GPU: where each expert's tokens
    end; buffer (experts, out, in), of which the experts may lie apart.
    """
    experts, rows, columns = buffer.shape
    tiles = experts * triton.cdiv(rows, ROWS) * triton.cdiv(columns, WIDE + NARROW)
    _multiply_gradients[(tiles,)](
        _by_expert(gradient, ROWS), _by_expert(tokens, WIDE), _by_expert(tokens, NARROW), ends, buffer,
        rows, columns, buffer.stride(0),
        FIRST=first, ROWS=ROWS, WIDE=WIDE, NARROW=NARROW, STEP=STEP, STRIP=STRIP,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def _by_expert(matrix: Any, columns: int) -> TensorDescriptor:
    """Tiles (STEP, columns) of a matrix (T, width), found by [first token of the expert, token of it, column].

    Tokens before the expert's first have negative numbers, for which the GPU's copy gives zeros.
    """
    total, width = matrix.shape
    return TensorDescriptor(matrix, [total, total, width], [width, width, 1], [1, STEP, columns])


@triton.jit
def _multiply_gradients(
    gradient, tokens, tokens_narrow, ends, buffer, rows, columns, stride,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    STEP: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """One tile. The tokens are taken in blocks that end at the expert's last one, so only the first is not full.

    The tile's width is no power of two, as a tensor's has to be: so it is two, which share what is read of `gradient`.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, WIDE + NARROW)
    expert = tl.program_id(0) // (down * across)
    row, column = _place(tl.program_id(0) % (down * across), down, across, ROWS, WIDE + NARROW, STRIP)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    count = tl.load(ends + expert) - start
    wide, narrow = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, NARROW), tl.float32)
    for block in range(tl.cdiv(count, STEP), 0, -1):
        token = count - block * STEP
        left = gradient.load([start, token, row]).reshape(STEP, ROWS).T
        wide = tl.dot(left, tokens.load([start, token, column]).reshape(STEP, WIDE), wide)
        narrow = tl.dot(left, tokens_narrow.load([start, token, column + WIDE]).reshape(STEP, NARROW), narrow)
    place = buffer + expert.to(tl.int64) * stride
    _write(place, wide, row, column, rows, columns, FIRST, ROWS, WIDE)
    _write(place, narrow, row, column + WIDE, rows, columns, FIRST, ROWS, NARROW)


@triton.jit
def _multiply(
    tokens, weights, weights_narrow, ends, out, columns, inner, experts,
    TRANSPOSED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    STEP: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """One tile, two products wide as in `_multiply_gradients`. EXPERTS: a power of two, not less than `experts`.

    Rows beyond the expert's last token are multiplied, too, but not written.
    """
    across = tl.cdiv(columns, WIDE + NARROW)
    ids = tl.arange(0, EXPERTS)
    end = tl.load(ends + ids, mask=ids < experts, other=0)
    start = tl.load(ends + ids - 1, mask=(ids > 0) & (ids < experts), other=0)
    tiles = tl.cdiv(end - start, ROWS)  # of each expert, one above the other
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= tl.program_id(0) // across).to(tl.int32), 0)
    if expert < experts:
        mine = ids == expert
        tile = tl.program_id(0) - tl.sum(tl.where(mine, after - tiles, 0), 0) * across
        row, column = _place(tile, tl.sum(tl.where(mine, tiles, 0), 0), across, ROWS, WIDE + NARROW, STRIP)
        row += tl.sum(tl.where(mine, start, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        wide, narrow = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, NARROW), tl.float32)
        for k in range(0, inner, STEP):
            left = tokens.load([row, k])
            wide = tl.dot(left, _weight(weights, expert, k, column, TRANSPOSED, STEP, WIDE), wide)
            narrow = tl.dot(left, _weight(weights_narrow, expert, k, column + WIDE, TRANSPOSED, STEP, NARROW), narrow)
        _write(out, wide, row, column, last, columns, True, ROWS, WIDE)
        _write(out, narrow, row, column + WIDE, last, columns, True, ROWS, NARROW)


@triton.jit
def _weight(weights, expert, k, column, TRANSPOSED: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """(STEP, WIDTH) of an expert's weight."""
    if TRANSPOSED:
        return weights.load([expert, k, column]).reshape(STEP, WIDTH)
    else:
        return weights.load([expert, column, k]).reshape(WIDTH, STEP).T


@triton.jit
def _place(tile, down, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr):
    """Row and column of a tile of a matrix that is `down` tiles high and `across` wide, in strips of STRIP tiles."""
    above = tile // (STRIP * across) * STRIP
    height = tl.minimum(down - above, STRIP)
    return (above + tile % (STRIP * across) % height) * HEIGHT, tile % (STRIP * across) // height * WIDTH


@triton.jit
def _write(
    place, values, row, column, rows, columns, FIRST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Put values (HEIGHT, WIDTH) at a row and column of the matrix (rows, columns), or add them to what is there."""
    row = row + tl.arange(0, HEIGHT)[:, None]
    column = column + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    at = place + row.to(tl.int64) * columns + column
    if not FIRST:
        values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, values.to(place.dtype.element_ty), mask=inside)
