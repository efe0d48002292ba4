"""Every property a bin assignment must have, against a plain first-fit decreasing as the yardstick."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data.packing import members, pack


def first_fit_decreasing(lengths, pack_size):
    """The number of bins of textbook first-fit decreasing."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        for bin, room in enumerate(rooms):
            if room >= length:
                rooms[bin] -= length
                break
        else:
            rooms.append(pack_size - length)
    return len(rooms)


@st.composite
def problems(draw):
    pack_size = draw(st.integers(1, 200))
    return draw(st.lists(st.integers(1, pack_size), max_size=120)), pack_size


@settings(max_examples=300)
@given(problems(), st.integers(0, 3))
def test_every_item_is_placed_and_no_bin_overflows(problem, seed):
    lengths, pack_size = problem
    bins = pack(lengths, pack_size, seed)
    n_bins = len(set(bins.tolist()))
    assert bins.shape == (len(lengths),)
    assert sorted(set(bins.tolist())) == list(range(n_bins))  # every item has a bin, every number is used
    assert (np.bincount(bins, weights=lengths) <= pack_size).all()
    assert -(-sum(lengths) // pack_size) <= n_bins <= first_fit_decreasing(lengths, pack_size)
    assert (bins == pack(lengths, pack_size, seed)).all()
    assert len(set(pack(lengths, pack_size, seed + 1).tolist())) == n_bins


def test_first_fit_is_used_where_it_beats_best_fit():
    lengths, pack_size = [50, 49, 43, 36, 19, 19, 10, 7, 7, 5, 3], 50
    assert (first_fit_decreasing(lengths, pack_size), best_fit_decreasing(lengths, pack_size)) == (5, 6)
    assert pack(lengths, pack_size).max() + 1 == 5


def best_fit_decreasing(lengths, pack_size):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(pack_size - length)
    return len(rooms)


@settings(max_examples=100)
@given(problems())
def test_never_worse_than_textbook_best_fit(problem):
    lengths, pack_size = problem
    assert len(set(pack(lengths, pack_size).tolist())) <= best_fit_decreasing(lengths, pack_size)


def test_seed_changes_the_order_but_not_the_number_of_bins():
    lengths = np.random.default_rng(0).integers(1, 512, 5000)
    bins = [pack(lengths, 1024, seed) for seed in range(3)]
    assert len({b.max() for b in bins}) == 1
    assert (bins[0] != bins[1]).any() and (bins[1] != bins[2]).any()
    # Packs come shuffled: without that, bin 0 would hold the longest sequence.
    longest = np.flatnonzero(lengths == lengths.max())
    assert any(0 not in b[longest] for b in bins)


def test_edge_cases():
    assert pack([], 8).tolist() == []
    assert pack([3], 8).tolist() == [0]
    assert sorted(pack([8, 8, 8], 8).tolist()) == [0, 1, 2]
    assert pack([1] * 8, 8).tolist() == [0] * 8
    assert sorted(pack([1, 1], 1).tolist()) == [0, 1]
    assert pack(np.array([5, 5, 3, 3], np.uint16), 8).dtype == np.int32


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4, 9], "sequence 1 has 9 tokens, above pack_size 8"),
        ([4, 0], "sequence 1 has 0 tokens, below 1"),
        ([2**40], "above pack_size"),
        ([1.5], "whole numbers"),
        ([[1, 2]], "flat list"),
    ],
)
def test_bad_lengths_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, 8)
    with pytest.raises(ValueError, match="pack_size"):
        pack([1], 0)


@given(problems())
def test_members_list_every_bin_in_input_order(problem):
    bins = pack(*problem)
    order, bounds = members(bins)
    assert bounds[0] == 0 and bounds[-1] == len(bins)
    assert sorted(order.tolist()) == list(range(len(bins)))
    for b in range(len(bounds) - 1):
        assert order[bounds[b] : bounds[b + 1]].tolist() == np.flatnonzero(bins == b).tolist()


def test_short_sequences_fill_the_packs():
    """100,000 lognormal lengths (median 400 tokens) at 4096: the usual shape of chat data."""
    lengths = np.random.default_rng(0).lognormal(6, 1, 100_000).clip(1, 4096).astype(np.int32)
    bins = pack(lengths, 4096)
    assert lengths.sum(dtype=np.int64) / (4096 * (bins.max() + 1)) > 0.999
