"""The norm of many tensors on a GPU, in one pass over the memory with wide accesses."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from nemotron_sft.train.kernels import PLAIN, in_triton

CHUNK = 1 << 14  # numbers of a program
BLOCK, WARPS = 2048, 4  # numbers that a program reads at a time, and warps that it runs on


def eligible(tensors: list) -> bool:
    """Whether `l2norm` can read these tensors."""
    return all(
        type(tensor) in PLAIN and tensor.dtype in (torch.bfloat16, torch.float32) and tensor.is_contiguous()
        for tensor in tensors
    )


def l2norm(chunk_size: int, noop_flag: Any, tensor_lists: list, per_tensor: bool = False) -> tuple:
    """Norm of all numbers, with the arguments and the result of Transformer Engine's multi_tensor_l2norm.

    tensor_lists: one list, of at least one tensor, bf16 or fp32; per_tensor: False. The chunk's size is the one above,
    and the flag is left as it is. Returns (sqrt(sum(x^2)) as (1,) float32, None). The same input gives the same bits.
    """
    together: dict[tuple, list] = {}
    for tensor in tensor_lists[0]:
        address = tensor.data_ptr()
        alignment = math.gcd(address, 16)  # it says how many numbers can be read at a time
        together.setdefault((tensor.dtype, alignment), []).append((address, tensor.numel()))
    sums = []
    for (dtype, alignment), places in together.items():
        table = _table(tuple(places), CHUNK, dtype.itemsize, tensor_lists[0][0].device)
        sums.append(torch.empty(len(table), dtype=torch.float32, device=table.device))
        _squares[(len(table),)](
            table, sums[-1], DTYPE=in_triton(dtype), ALIGNMENT=alignment, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return torch.cat(sums).sum(0, keepdim=True).sqrt_(), None


@functools.lru_cache(maxsize=16)
def _table(places: tuple[tuple[int, int], ...], chunk: int, itemsize: int, device: Any) -> torch.Tensor:
    """Address and number of numbers of each chunk, (chunks, 2) int64 on the GPU: they are the same in every step.

    places: address and number of numbers of each tensor.
    """
    chunks = []
    for address, number in places:
        start = torch.arange(0, number, chunk)
        chunks.append(torch.stack([address + start * itemsize, (number - start).clamp(max=chunk)], 1))
    return torch.cat(chunks).to(device)


@triton.jit
def _squares(table, sums, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of a chunk. Whole blocks are read without a mask, which would make the accesses narrow."""
    chunk = tl.program_id(0)
    numbers = tl.multiple_of(tl.load(table + 2 * chunk).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    number = tl.load(table + 2 * chunk + 1).to(tl.int32)
    whole = number // BLOCK * BLOCK
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, whole, BLOCK):
        value = tl.load(numbers + start + place).to(tl.float32)
        total += value * value
    if whole < number:
        value = tl.load(numbers + whole + place, mask=whole + place < number, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + chunk, tl.sum(total, 0))
