"""The causal convolution in front of a Mamba layer, forward and backward, as Triton kernels for a GPU.

Each channel has four taps of its own (depthwise), and SiLU may follow:

    y[t] = bias + sum over k of weight[k] * x[t - 3 + k]        out[t] = silu(y[t])

Tokens before the sequence and tokens of another document count as zero. A program walks down a block of tokens, some
channels wide, four tokens a step: it keeps the last three rows in registers, so that each row is read once, and loads
the next four while it works on these. Arithmetic is in float32. Nothing is added atomically: gradients are the same to
the last bit in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens and channels of a program, a power of two each, and its warps: the fastest on an H100.
FORWARD_BLOCK, FORWARD_WARPS = (128, 512), 1
BACKWARD_BLOCK, BACKWARD_WARPS = (256, 512), 2

MOST_PROGRAMS = 65535  # along the second and the third axis of a grid
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, on a CPU


def eligible(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None,
    initial_states: Tensor | None = None, final_states: Tensor | None = None,
    dout: Tensor | None = None, dx: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether `forward` (with dout: `backward`) does what causal_conv1d does for these arguments.

    final_states: where the forward pass shall write them, or their gradient in the backward pass.
    """
    if initial_states is not None or final_states is not None or x.dim() != 3 or x.numel() == 0:
        return False
    batch, dim, seqlen = x.shape
    return (
        dim % 8 == 0
        and max(batch, triton.cdiv(seqlen, FORWARD_BLOCK[0]), triton.cdiv(seqlen, BACKWARD_BLOCK[0])) <= MOST_PROGRAMS
        and all(_is_channel_last(tensor, x.shape) for tensor in (x, dout, dx) if tensor is not None)
        and weight.dtype in (torch.bfloat16, torch.float32)
        and _is_plain(weight, (dim, 4), weight.dtype)
        and (bias is None or _is_plain(bias, (dim,), weight.dtype))
        and (seq_idx is None or _is_plain(seq_idx, (batch, seqlen), torch.int32))
    )


def _is_channel_last(tensor: Tensor, shape: tuple) -> bool:
    """Whether it is bf16 of this shape (batch, dim, seqlen), and 16 bytes of a token can be read at once."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.shape == shape
        and (tensor.is_cuda or INTERPRETED.value)
        and tensor.stride(1) == 1
        and tensor.stride(2) % 8 == 0
        and (len(tensor) == 1 or tensor.stride(0) % 8 == 0)
        and tensor.data_ptr() % 16 == 0
    )


def _is_plain(tensor: Tensor, shape: tuple, dtype: torch.dtype) -> bool:
    return tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool) -> Tensor:
    """The convolution of x (batch, dim, seqlen), bf16, channels next to each other; returns the like of it.

    weight (dim, 4) and bias (dim,) or None: bf16 or float32. seq_idx: the document of each token, (batch, seqlen)
    int32, or None; where it is negative (padding), the output is zero.
    """
    batch, dim, seqlen = x.shape
    out = torch.empty_like(x)
    tokens, channels = FORWARD_BLOCK
    _forward_kernel[(triton.cdiv(dim, channels), triton.cdiv(seqlen, tokens), batch)](
        x, weight, bias, seq_idx, out, seqlen, dim, x.stride(0), out.stride(0), x.stride(2), out.stride(2),
        SILU=silu, BLOCK_T=tokens, BLOCK_C=channels, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return out


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None, dx: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Gradients of `forward`, for dout, that of its output, of the same kind as x.

    dx, of that kind too, is written in place; None stands for a new one. Returns dx, dweight (dim, 4), dbias (dim,) or
    None, both in the dtype of what they belong to, and None for the initial states, which there are none of.
    """
    batch, dim, seqlen = x.shape
    if dx is None:
        dx = torch.empty_like(x)
    tokens, channels = BACKWARD_BLOCK
    grid = (triton.cdiv(dim, channels), triton.cdiv(seqlen, tokens), batch)
    parts = torch.empty(batch * grid[1], 5, dim, device=x.device, dtype=torch.float32)
    _backward_kernel[grid](
        x, weight, bias, seq_idx, dout, dx, parts, seqlen, dim,
        x.stride(0), dout.stride(0), dx.stride(0), x.stride(2), dout.stride(2), dx.stride(2),
        SILU=silu, BLOCK_T=tokens, BLOCK_C=channels, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    sums = parts.sum(0)
    dweight = torch.empty_like(weight).copy_(sums[:4].t())
    return dx, dweight, None if bias is None else sums[4].to(bias.dtype), None


# In the kernels, rows are counted from the first token of the program's block. A list holds rows (BLOCK_C channels
# each), or their documents, in order of time.


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, b_ptr, seq_ptr, out_ptr, seqlen, dim, stride_xb, stride_ob,
    stride_xt: tl.constexpr, stride_ot: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t0 = tl.program_id(1) * BLOCK_T
    batch = tl.program_id(2).to(tl.int64)
    end = tl.minimum(seqlen - t0, BLOCK_T)
    x_ptrs = _first_row(x_ptr, batch, t0, c, stride_xb, stride_xt)
    out_ptrs = _first_row(out_ptr, batch, t0, c, stride_ob, stride_ot)
    if seq_ptr is not None:
        seq_ptr += batch * seqlen + t0

    w, b = _load_weights(w_ptr, b_ptr, c, dim, BLOCK_C)
    before = _to_float(_load_four(x_ptrs, -4, stride_xt, -t0, 0, c < dim)[1:])
    rows = _load_four(x_ptrs, 0, stride_xt, 0, end, c < dim)
    docs = _documents(seq_ptr, -4, -t0, 0)[1:] + _documents(seq_ptr, 0, 0, end)
    for r in range(0, BLOCK_T, 4):
        next_rows = _load_four(x_ptrs, r + 4, stride_xt, 0, end, c < dim)
        next_docs = _documents(seq_ptr, r + 4, 0, end)
        x = before + _to_float(rows)
        # Few steps see two documents or padding; the others are spared the masks.
        if _is_one_document(docs):
            _forward_four(out_ptrs, r, stride_ot, end, c < dim, x, docs, w, b, False, SILU)
        else:
            _forward_four(out_ptrs, r, stride_ot, end, c < dim, x, docs, w, b, True, SILU)
        before, rows, docs = x[4:], next_rows, docs[4:] + next_docs


@triton.jit
def _forward_four(ptrs, r, stride, end, inside, x, docs, w, b, MASKED: tl.constexpr, SILU: tl.constexpr):
    """Write the output of rows r .. r + 3, from rows r - 3 .. r + 3 of x and their documents."""
    for i in tl.static_range(4):
        y = _convolve(_mask(x[i : i + 4], docs[i : i + 4], MASKED), w, b)
        if MASKED:
            y = tl.where(docs[i + 3] >= 0, y, 0.0)
        if SILU:
            y = y * _sigmoid(y)
        tl.store(ptrs + (r + i) * stride, y.to(tl.bfloat16), mask=_valid(r + i, 0, end, inside))


@triton.jit
def _backward_kernel(
    x_ptr, w_ptr, b_ptr, seq_ptr, dout_ptr, dx_ptr, parts_ptr, seqlen, dim, stride_xb, stride_gb, stride_db,
    stride_xt: tl.constexpr, stride_gt: tl.constexpr, stride_dt: tl.constexpr,
    SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts (batch * token blocks, 5, dim), float32: the program's share of dweight, four rows, and of dbias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t0 = tl.program_id(1) * BLOCK_T
    batch = tl.program_id(2).to(tl.int64)
    end = tl.minimum(seqlen - t0, BLOCK_T)
    load_end = tl.minimum(seqlen - t0, BLOCK_T + 3)  # the outputs of three rows more depend on the block's last rows
    x_ptrs = _first_row(x_ptr, batch, t0, c, stride_xb, stride_xt)
    g_ptrs = _first_row(dout_ptr, batch, t0, c, stride_gb, stride_gt)
    dx_ptrs = _first_row(dx_ptr, batch, t0, c, stride_db, stride_dt)
    if seq_ptr is not None:
        seq_ptr += batch * seqlen + t0

    w, b = _load_weights(w_ptr, b_ptr, c, dim, BLOCK_C)
    before = _to_float(_load_four(x_ptrs, -4, stride_xt, -t0, 0, c < dim)[1:])
    rows = _load_four(x_ptrs, 0, stride_xt, 0, load_end, c < dim)
    g = _load_four(g_ptrs, 0, stride_gt, 0, load_end, c < dim)
    docs = _documents(seq_ptr, -4, -t0, 0)[1:] + _documents(seq_ptr, 0, 0, load_end)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    sums = [zero, zero, zero, zero, zero]
    unfinished = [zero, zero, zero]  # dx of rows r - 3 .. r - 1, without what comes from rows r and later
    for r in range(0, BLOCK_T, 4):
        next_rows = _load_four(x_ptrs, r + 4, stride_xt, 0, load_end, c < dim)
        next_g = _load_four(g_ptrs, r + 4, stride_gt, 0, load_end, c < dim)
        next_docs = _documents(seq_ptr, r + 4, 0, load_end)
        x = before + _to_float(rows)
        if _is_one_document(docs):
            dx, sums = _backward_four(unfinished, sums, g, x, docs, w, b, False, SILU)
        else:
            dx, sums = _backward_four(unfinished, sums, g, x, docs, w, b, True, SILU)
        _store_four(dx_ptrs, r - 3, stride_dt, end, c < dim, dx)
        unfinished, before = dx[4:], x[4:]
        rows, g, docs = next_rows, next_g, docs[4:] + next_docs
    for k in tl.static_range(5):
        row = (batch * tl.num_programs(1) + tl.program_id(1)) * 5 + k
        tl.store(parts_ptr + row * dim + c, sums[k], mask=c < dim)
    dx, _ = _backward_four(unfinished, sums, g, before + _to_float(rows), docs, w, b, seq_ptr is not None, SILU)
    _store_four(dx_ptrs, BLOCK_T - 3, stride_dt, end, c < dim, dx)


@triton.jit
def _backward_four(unfinished, sums, g, x, docs, w, b, MASKED: tl.constexpr, SILU: tl.constexpr):
    """Add what comes from rows r .. r + 3 of dout (g), from rows r - 3 .. r + 3 of x and their documents.

    Returns dx of rows r - 3 .. r + 3, the first four of them finished, and the new sums.
    """
    dx = unfinished
    for i in tl.static_range(4):
        taps = _mask(x[i : i + 4], docs[i : i + 4], MASKED)
        dy = g[i].to(tl.float32)
        if SILU:
            y = _convolve(taps, w, b)
            s = _sigmoid(y)
            dy = dy * (s + (y * s) * (1.0 - s))
        sums = [sums[k] + dy * taps[k] for k in (0, 1, 2, 3)] + [sums[4] + dy]
        add = _mask([w[k] * dy for k in (0, 1, 2, 3)], docs[i : i + 4], MASKED)
        dx = dx[:i] + [dx[i + k] + add[k] for k in (0, 1, 2)] + add[3:]
    return dx, sums


@triton.jit
def _store_four(ptrs, r, stride, end, inside, rows):
    for i in tl.static_range(4):
        tl.store(ptrs + (r + i) * stride, rows[i].to(tl.bfloat16), mask=_valid(r + i, 0, end, inside))


@triton.jit
def _load_weights(w_ptr, b_ptr, c, dim, BLOCK_C: tl.constexpr):
    """A list of the four taps, and the bias, float32. Taps are read as they stand in memory, then told apart."""
    i = tl.program_id(0) * (BLOCK_C * 4) + tl.arange(0, BLOCK_C * 4)
    taps = tl.load(w_ptr + i, mask=i < dim * 4, other=0.0)
    even, odd = tl.split(tl.reshape(taps, (BLOCK_C, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if b_ptr is None:
        b = tl.zeros((BLOCK_C,), tl.float32)
    else:
        b = tl.load(b_ptr + c, mask=c < dim, other=0.0).to(tl.float32)
    return _to_float([w0, w1, w2, w3]), b


@triton.jit
def _first_row(ptr, batch, t0, c, stride_b, stride_t):
    """Pointers to channels c of token t0 of a sequence."""
    return ptr + batch * stride_b + t0.to(tl.int64) * stride_t + c


@triton.jit
def _load_four(ptrs, r, stride, begin, end, inside):
    """Rows r .. r + 3, zero before row `begin` and from row `end` on."""
    ptrs += r * stride
    return [tl.load(ptrs + i * stride, mask=_valid(r + i, begin, end, inside), other=0.0) for i in (0, 1, 2, 3)]


@triton.jit
def _valid(row, begin, end, inside):
    """The mask `inside` (BLOCK_C,), all False if the row is not one of `begin` .. `end` - 1."""
    row += tl.zeros(inside.shape, tl.int32)  # one number is enough, but not for the interpreter of Triton 3.9
    return (row >= begin) & (row < end) & inside


@triton.jit
def _documents(seq_ptr, r, begin, end):
    """Documents of rows r .. r + 3, -1 before row `begin` and from row `end` on."""
    if seq_ptr is None:
        return [0, 0, 0, 0]
    else:
        return [tl.load(seq_ptr + r + i, mask=(r + i >= begin) & (r + i < end), other=-1) for i in (0, 1, 2, 3)]


@triton.jit
def _is_one_document(docs):
    """Whether seven rows are of one document, and that is no padding."""
    same = docs[0] >= 0
    for i in tl.static_range(6):
        same = same & (docs[i] == docs[i + 1])
    return same


@triton.jit
def _to_float(rows):
    return [row.to(tl.float32) for row in rows]


@triton.jit
def _mask(rows, docs, MASKED: tl.constexpr):
    """Four rows; with MASKED, zero for those that are not of the last one's document."""
    if MASKED:
        rows = [tl.where(docs[k] == docs[3], rows[k], 0.0) for k in (0, 1, 2, 3)]
    return rows


@triton.jit
def _convolve(taps, w, b):
    return b + w[0] * taps[0] + w[1] * taps[1] + w[2] * taps[2] + w[3] * taps[3]


@triton.jit
def _sigmoid(y):
    """1 / (1 + exp(-y)) by the GPU's fast power of two and reciprocal; Triton's make the forward kernel 40 % longer."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-y))
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 e;
            mul.ftz.f32 e, $1, 0fBFB8AA3B; // -log2(e)
            ex2.approx.ftz.f32 e, e;
            add.ftz.f32 e, e, 0f3F800000;  // 1
            rcp.approx.ftz.f32 $0, e; }""",
            "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
