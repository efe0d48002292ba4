"""Lengths -> bins: which sequences share a pack.

Offline bin packing, longest sequence first, each into the fullest bin that still has room for it (best-fit
decreasing). Sequences of equal length are interchangeable, and so are bins with equal room, so the work is
done on counts: for every room there is a stack of the bins with that much room left, and a binary tree over
the rooms finds the smallest one that fits. That is O(N log pack_size) whatever the lengths are.

Best fit and first fit both stay within 11/9 of the optimum (Johnson 1973), and there are inputs on which
either beats the other. When best fit misses the lower bound ceil(total / pack_size), first fit is tried too
and the smaller result kept, so the count is never above that of first-fit decreasing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.typing import ArrayLike


def pack(lengths: ArrayLike, pack_size: int, seed: int = 0) -> np.ndarray:
    """Assign every sequence to a bin.

    lengths: (N,) whole numbers of tokens, each in 1..pack_size.
    Returns (N,) int32 bin numbers 0..n_bins-1, every number used; a bin's lengths sum to at most pack_size.

    The same arguments give the same answer. The seed decides how the bins are numbered (packs come out
    shuffled) and which of several equally long sequences goes where; it never changes the number of bins.
    A bin's members have no order here: `members` lists them in input order, and so do packs.

    Raises ValueError for a length below 1 or above pack_size.
    """
    lengths = _whole_numbers(lengths)
    if pack_size < 1:
        raise ValueError(f"pack_size must be at least 1, not {pack_size}")
    if lengths.size == 0:
        return np.empty(0, np.int32)
    if lengths.min() < 1:
        raise ValueError(f"sequence {lengths.argmin()} has {lengths.min()} tokens, below 1")
    if lengths.max() > pack_size:
        raise ValueError(f"sequence {lengths.argmax()} has {lengths.max()} tokens, above pack_size {pack_size}")
    lengths = lengths.astype(np.int32, copy=False)

    # Grouping a shuffled list by length shuffles the sequences of each length, so that neighbours in the
    # input (often near-duplicates) do not fill a bin together. The histogram, and so the count, is unchanged.
    random = np.random.default_rng(seed)
    shuffled = random.permutation(np.arange(lengths.size, dtype=np.int32))
    grouped, starts = compiled(_group)(lengths[shuffled], pack_size + 1)
    by_length = shuffled[grouped]
    bins = np.empty(lengths.size, np.int32)
    n_bins = compiled(_best_fit)(by_length, starts, pack_size, bins)
    if n_bins > -(-int(lengths.sum(dtype=np.int64)) // pack_size):
        other = np.empty_like(bins)
        if fewer := compiled(_first_fit)(by_length, starts, pack_size, n_bins - 1, other):
            bins, n_bins = other, fewer
    return random.permutation(np.arange(n_bins, dtype=np.int32))[bins]


def members(bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of every bin: bin b holds `order[bounds[b]:bounds[b + 1]]`, in input order.

    bins: (N,) int, as `pack` returns them. Returns order (N,) int32 and bounds (n_bins + 1,) int64.

    >>> order, bounds = members(np.array([1, 0, 1]))
    >>> order.tolist(), bounds.tolist()
    ([1, 0, 2], [0, 1, 3])
    """
    n_bins = int(bins.max()) + 1 if len(bins) else 0
    return compiled(_group)(np.asarray(bins, np.int32), n_bins)


@cache
def compiled(function: Callable) -> Callable:
    """The function compiled by Numba, from its on-disk cache when there is one."""
    with _without_scipy():
        import numba.np.arraymath  # noqa: F401 -- which looks for SciPy
        from numba import njit

    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(nogil=True)(function)


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Let Numba not find SciPy, half of whose modules it would import for linear algebra that nothing here needs."""
    hidden = "scipy" not in sys.modules
    if hidden:
        sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["scipy"]


def _whole_numbers(lengths: ArrayLike) -> np.ndarray:
    """`lengths` as a flat integer array; a list may be empty, floats are refused rather than cut."""
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"lengths must be a flat list of whole numbers, not {array.dtype} of shape {array.shape}")
    return array


# The rest is compiled by Numba. A tree over n leaves (n a power of two) is an array of 2 n: node i has the
# children 2 i and 2 i + 1, the root is 1, leaf k is n + k.


def _group(keys: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Stable counting sort: order (N,) such that keys[order] ascends, and where each of the n keys starts."""
    starts = np.zeros(n + 1, np.int64)
    for key in keys:
        starts[key + 1] += 1
    for key in range(n):
        starts[key + 1] += starts[key]
    order = np.empty(keys.size, np.int32)
    place = starts[:-1].copy()
    for item in range(keys.size):
        key = keys[item]
        order[place[key]] = item
        place[key] += 1
    return order, starts


def _best_fit(  # noqa: C901 -- one loop, which Numba compiles
    by_length: np.ndarray, starts: np.ndarray, pack_size: int, bins: np.ndarray
) -> int:
    """Fill `bins` by best-fit decreasing and return the number of bins.

    by_length (N,): items grouped by ascending length; length l is by_length[starts[l]:starts[l + 1]].
    """
    leaves = 1
    while leaves <= pack_size:
        leaves *= 2
    filled = np.zeros(2 * leaves, np.uint8)  # leaf r: is there a bin with room r? inner node: is there one below?
    top = np.full(pack_size + 1, -1, np.int32)  # the stack of the bins with room r: top[r], below[top[r]], ...
    below = np.empty(by_length.size, np.int32)
    n_bins = 0
    for length in range(pack_size, 0, -1):
        first, last = starts[length], starts[length + 1]
        while first < last:
            # Smallest room >= length: climb while there is nothing to the right, step across, and go down.
            node = leaves + length
            while node > 1 and not filled[node]:
                while node & 1 and node > 1:
                    node >>= 1
                if node > 1:
                    node += 1
            if node > 1:
                while node < leaves:
                    node = 2 * node + (0 if filled[2 * node] else 1)
                room = node - leaves
                chosen = top[room]
                top[room] = below[chosen]
                if top[room] < 0:
                    filled[node] = 0
                    while node > 1 and not (filled[node] or filled[node ^ 1]):
                        node >>= 1
                        filled[node] = 0
            else:
                room, chosen = pack_size, n_bins
                n_bins += 1
            # Having become the fullest that fits, this bin takes all it can of this length.
            while room >= length and first < last:
                bins[by_length[first]] = chosen
                first += 1
                room -= length
            below[chosen] = top[room]
            top[room] = chosen
            node = leaves + room
            while node and not filled[node]:
                filled[node] = 1
                node >>= 1
    return n_bins


def _first_fit(by_length: np.ndarray, starts: np.ndarray, pack_size: int, limit: int, bins: np.ndarray) -> int:
    """Fill `bins` by first-fit decreasing and return the number of bins, or 0 where it exceeds `limit`."""
    leaves = 1
    while leaves < limit:
        leaves *= 2
    room = np.zeros(2 * leaves, np.int32)  # leaf b: room in bin b; inner node: the most room in any bin below it
    room[leaves : leaves + limit] = pack_size
    for node in range(leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    n_bins = 0
    for length in range(pack_size, 0, -1):
        first, last = starts[length], starts[length + 1]
        while first < last:
            if room[1] < length:
                return 0
            node = 1
            while node < leaves:
                node = 2 * node + (0 if room[2 * node] >= length else 1)
            chosen = node - leaves
            n_bins = max(n_bins, chosen + 1)
            while room[node] >= length and first < last:
                bins[by_length[first]] = chosen
                first += 1
                room[node] -= length
            node >>= 1
            while node:
                most = max(room[2 * node], room[2 * node + 1])
                if room[node] == most:
                    break
                room[node] = most
                node >>= 1
    return n_bins
