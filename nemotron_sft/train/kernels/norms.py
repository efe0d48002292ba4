"""RMSNorm on a GPU in one pass over the memory: forward and backward, and the backward over groups of channels.

Numbers are read 16 bytes at a time and computed in fp32. Nothing is added by atomics: the same input gives the same
bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nemotron_sft.train.kernels import PLAIN, processors


class Settings(NamedTuple):
    """How a kernel is launched."""

    rows: int  # rows of a step
    width: int  # channels of a piece: a step reads its rows in as many pieces as it takes
    warps: int
    programs: int = 0  # per multiprocessor, where a program has many steps; forward, it has one
    stages: int = 1  # steps whose reads are under way at a time
    registers: int | None = None  # of a thread, at most: so that all programs run at once


FORWARD = Settings(rows=1, width=1024, warps=4)
BACKWARD = Settings(rows=1, width=1024, warps=4, programs=4, stages=2, registers=128)
GROUPED = Settings(rows=1, width=256, warps=4, programs=5, stages=2)  # a group per warp, which then sums alone
LONGEST = 3072  # channels that these settings keep in registers; for longer rows there are more warps

HIDDEN = range(1024, 8192)  # shorter rows leave threads idle, longer ones do not fit in the registers
GROUP = (256, 512, 1024)


def eligible(inp, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma) -> bool:
    """Whether `forward` can do what these arguments ask of Transformer Engine's rmsnorm_fwd."""
    return (
        quantizer is None
        and getattr(otype, "name", None) == "kBFloat16"
        and _are_matrices(inp, inp if ln_out is None else ln_out)
        and _is_weight(weight)
        and _is_untuned(inp.shape[1])
    )


def eligible_backward(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma) -> bool:
    """Whether `backward` can do what these arguments ask of Transformer Engine's rmsnorm_bwd."""
    return _are_matrices(x, dz) and _is_weight(gamma) and _is_untuned(x.shape[1])


def eligible_grouped(
    dy, x, weight, bias, eps, mean, rstd, z=None, group_size=None,
    norm_before_gate=True, is_rms_norm=False, recompute_output=False, dz=None, out=None,
) -> bool:  # fmt: skip
    """Whether `backward_grouped` can do what these arguments ask of mamba_ssm's _layer_norm_bwd."""
    return (
        is_rms_norm
        and all(each is None for each in (bias, z, dz, out))
        and not recompute_output
        and _are_matrices(x, dy)
        and _is_weight(weight)
        and (group_size or x.shape[1]) in GROUP
    )


def _is_untuned(hidden: int) -> bool:
    """Whether Transformer Engine has only a general kernel: those for powers of two are as fast as the ones here."""
    return hidden in HIDDEN and hidden & (hidden - 1) != 0


def _are_matrices(*several: Any) -> bool:
    """Whether all are contiguous bf16 matrices of one shape, with at least one row."""
    return all(
        type(each) in PLAIN
        and each.dtype == torch.bfloat16
        and each.is_contiguous()
        and each.dim() == 2
        and len(each) > 0
        and each.shape == several[0].shape
        for each in several
    )


def _is_weight(weight: Any) -> bool:
    return type(weight) in PLAIN and weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()


def forward(inp, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma) -> list:
    """RMSNorm of rows, with the arguments and the result of Transformer Engine's rmsnorm_fwd.

    inp: (rows, hidden) bf16; weight: (hidden,) bf16 or fp32, one less than the factor where zero_centered_gamma is set;
    ln_out: where to write the output, or None. Returns [output, None, rsigma], (rows, hidden) bf16 and (rows,) float32:
    rsigma = 1 / sqrt(mean(inp^2) + eps), output = inp * rsigma * factor.
    """
    rows, hidden = inp.shape
    out = torch.empty_like(inp) if ln_out is None else ln_out
    rsigma = torch.empty(rows, dtype=torch.float32, device=inp.device)
    wider = _wider(hidden)
    _forward[(triton.cdiv(rows, FORWARD.rows),)](
        inp, weight, out, rsigma, rows, eps,
        HIDDEN=hidden, ROWS=FORWARD.rows, WIDTH=FORWARD.width * wider, CENTERED=bool(zero_centered_gamma),
        num_warps=FORWARD.warps * wider,
    )  # fmt: skip
    return [out, None, rsigma]


def backward(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma) -> list:
    """Gradients of RMSNorm, with the arguments and the result of Transformer Engine's rmsnorm_bwd.

    dz, x: (rows, hidden) bf16; rsigma: (rows,) float32, from the forward; gamma: (hidden,) bf16 or fp32, the weight.
    Returns [dx, dgamma], like x and gamma: with h = x * rsigma and g = dz * factor, dx = rsigma * (g - h * mean(g * h))
    and dgamma = dz * h, summed over rows.
    """
    hidden = x.shape[1]
    wider = _wider(hidden)
    programs = max(processors(x.device) - sm_margin, 1) * max(BACKWARD.programs // wider, 1)
    settings = BACKWARD._replace(width=BACKWARD.width * wider, warps=BACKWARD.warps * wider)
    return _launch_backward(dz, x, rsigma, gamma, bool(zero_centered_gamma), hidden, 1, programs, settings)


def backward_grouped(
    dy, x, weight, bias, eps, mean, rstd, z=None, group_size=None,
    norm_before_gate=True, is_rms_norm=False, recompute_output=False, dz=None, out=None,
) -> tuple:  # fmt: skip
    """Gradients of RMSNorm over groups of channels, with the arguments and the result of mamba_ssm's _layer_norm_bwd.

    dy, x: (rows, channels) bf16; weight: (channels,) bf16 or fp32; rstd: (groups * rows,) float32, the rows of one
    group after those of the other; bias, z, dz and out: None. Returns (dx, dweight, None, None), by `backward`'s
    formulas.
    """
    size = group_size or x.shape[1]
    count = x.shape[1] // size
    groups = min(GROUPED.warps, count & -count)  # of a program: a power of two that divides their number
    programs = triton.cdiv(processors(x.device) * GROUPED.programs, count // groups)
    settings = GROUPED._replace(warps=groups)
    dx, dweight = _launch_backward(dy, x, rstd, weight, False, size, groups, programs, settings)
    return dx, dweight, None, None


def _launch_backward(
    dy, x, rsigma, weight, centered: bool, size: int, groups: int, programs: int, settings: Settings
) -> list:
    """Gradients of x and weight; `programs` take turns on the rows of each `groups` groups of `size` channels."""
    rows, channels = x.shape
    programs = min(programs, triton.cdiv(rows, settings.rows))
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    partial = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
    _backward[(channels // size // groups, programs)](
        dy, x, rsigma, weight, dx, partial, rows,
        CHANNELS=channels, SIZE=size, GROUPS=groups, ROWS=settings.rows, WIDTH=settings.width, CENTERED=centered,
        STAGES=settings.stages, num_warps=settings.warps, maxnreg=settings.registers,
    )  # fmt: skip
    _sum_rows[(triton.cdiv(channels, 16),)](partial, dweight, programs, channels, ROWS=128, COLUMNS=16)
    return [dx, dweight]


def _wider(hidden: int) -> int:
    """How many times as many warps a row needs as the settings say."""
    return triton.next_power_of_2(triton.cdiv(hidden, LONGEST))


@triton.jit
def _read(x, at, exists, column, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Pieces of rows in float32: x[at], x[at + WIDTH] and so on, for `column` below SIZE; 0 where there is nothing."""
    pieces = ()
    for start in tl.static_range(0, SIZE, WIDTH):
        inside = exists & (column < SIZE - start)
        pieces += (tl.load(x + at + start, mask=inside, other=0.0).to(tl.float32),)
    return pieces


@triton.jit
def _forward(
    x, weight, out, rsigma, rows, eps,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (HIDDEN + WIDTH - 1) // WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    at = row[:, None] * HIDDEN + column
    exists = (row < rows)[:, None]
    values = _read(x, at, exists, column, HIDDEN, WIDTH)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for piece in tl.static_range(PIECES):
        squares += values[piece] * values[piece]
    scale = tl.rsqrt(tl.sum(squares, 1) / HIDDEN + eps)
    tl.store(rsigma + row, scale, mask=row < rows)
    gammas = _read(weight, column, True, column, HIDDEN, WIDTH)
    for piece in tl.static_range(PIECES):
        gamma = gammas[piece] + 1.0 if CENTERED else gammas[piece]
        inside = exists & (column < HIDDEN - piece * WIDTH)
        tl.store(out + at + piece * WIDTH, values[piece] * scale[:, None] * gamma, mask=inside)


@triton.jit
def _backward(
    dy, x, rsigma, weight, dx, partial, rows,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CENTERED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Works on pieces of (GROUPS, ROWS, WIDTH). A program's sums for the weight become a row of `partial`."""
    PIECES: tl.constexpr = (SIZE + WIDTH - 1) // WIDTH
    program, programs = tl.program_id(1), tl.num_programs(1)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, WIDTH)[None, None, :]
    channel = group[:, :, None] * SIZE + column
    gammas = _read(weight, channel, True, column, SIZE, WIDTH)
    sums = ()
    for _ in tl.static_range(PIECES):
        sums += (tl.zeros((GROUPS, 1, WIDTH), tl.float32),)
    for step in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :]
        scale = tl.load(rsigma + group * rows + row, mask=row < rows, other=0.0)[:, :, None]
        exists = (row < rows)[:, :, None]
        at = row[:, :, None] * CHANNELS + channel
        values = _read(x, at, exists, column, SIZE, WIDTH)
        grads = _read(dy, at, exists, column, SIZE, WIDTH)
        dot = tl.zeros((GROUPS, ROWS, WIDTH), tl.float32)
        added = ()
        for piece in tl.static_range(PIECES):
            gamma = gammas[piece] + 1.0 if CENTERED else gammas[piece]
            product = grads[piece] * values[piece] * scale
            dot += product * gamma
            added += (sums[piece] + tl.sum(product, 1, keep_dims=True),)
        sums = added
        mean = tl.sum(dot, 2, keep_dims=True) / SIZE * scale
        for piece in tl.static_range(PIECES):
            gamma = gammas[piece] + 1.0 if CENTERED else gammas[piece]
            inside = exists & (column < SIZE - piece * WIDTH)
            tl.store(dx + at + piece * WIDTH, (grads[piece] * gamma - values[piece] * mean) * scale, mask=inside)
    for piece in tl.static_range(PIECES):
        at = program * CHANNELS + channel + piece * WIDTH
        tl.store(partial + at, sums[piece], mask=column < SIZE - piece * WIDTH)


@triton.jit
def _sum_rows(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of a (rows, columns) float32 matrix over its rows."""
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        total += tl.load(x + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
    tl.store(out + column, tl.sum(total, 0, keep_dims=True), mask=column < columns)
