"""Rows for context parallelism, and the positions whose logits are computed."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import PACK, make_packs, packs_of_documents

from nemotron_sft.train.batches import collate


@given(packs_of_documents, st.integers(2, 4), st.sampled_from([1, 2, 4]))
@settings(max_examples=100)
def test_context_parallel_rows_hold_every_document_at_a_multiple(lengths_per_pack, context, tensor):
    records = make_packs(lengths_per_pack)
    plain, padded = collate(records), collate(records, context, tensor)
    real, places = (padded[name][0].numpy() for name in ("cu_seqlens_q", "cu_seqlens_q_padded"))
    lengths = [length for lengths in lengths_per_pack for length in lengths]
    assert np.diff(real).tolist() == lengths
    assert (places % (2 * context) == 0).all()
    assert places[-1] == padded["tokens"].shape[1] == padded["counts"]["tokens"]
    assert places[-1] % (2 * context * tensor) == 0
    assert (np.diff(places) - lengths < 2 * context * (tensor if len(lengths) else 1)).all()
    starts = [p * PACK + start for p, sizes in enumerate(lengths_per_pack) for start in np.cumsum([0, *sizes[:-1]])]
    covered = np.zeros(places[-1], bool)
    for start, place, length in zip(starts, places, lengths, strict=False):
        covered[place : place + length] = True
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            expected = plain[name][0][start : start + length]
            assert padded[name][0][place : place + length].tolist() == expected.tolist()
    assert padded["loss_mask"][0].numpy()[~covered].sum() == 0
    assert padded["counts"]["trained"] == plain["counts"]["trained"]
    assert padded["counts"]["squares"] == sum(length**2 for length in lengths)
    for a, b in itertools.pairwise(places):  # positions restart with every document, in its padding they go on
        assert padded["position_ids"][0][a:b].tolist() == list(range(b - a))


@given(packs_of_documents)
@settings(max_examples=50)
def test_trained_positions_ascend_and_cover_every_loss(lengths_per_pack):
    batch = collate(make_packs(lengths_per_pack))
    mask, positions = batch["loss_mask"][0].numpy(), batch["trained_positions"].numpy()
    assert (np.diff(positions) > 0).all()  # in another order a row whose positions are all kept meets wrong labels
    assert mask[positions].sum() == mask.sum()
    assert len(positions) % 128 == 0 or len(positions) == len(mask)


@given(packs_of_documents, st.integers(2, 4))
@settings(max_examples=50)
def test_every_rank_keeps_the_trained_positions_of_its_own_pieces(lengths_per_pack, context):
    batch = collate(make_packs(lengths_per_pack * 16), context)  # so long that not all positions are kept
    mask, places = batch["loss_mask"][0].numpy(), batch["cu_seqlens_q_padded"][0].numpy()
    ends = np.cumsum(batch["counts"]["kept"])
    for rank, kept in enumerate(np.split(batch["trained_positions"].numpy(), ends[:-1])):
        pieces = [np.split(mask[a:b], 2 * context) for a, b in itertools.pairwise(places)]
        own = np.concatenate([half for each in pieces for half in (each[rank], each[-1 - rank])])
        assert own[kept].sum() == own.sum()


def test_a_row_of_padding_only_still_has_a_sequence():
    records = make_packs([[10], [20]])
    for name in ("loss_mask", "cu_seqlens"):
        records[name] = 0
    batch = collate(records, 2, 2)
    assert batch["tokens"].shape[1] % 8 == 0
    assert batch["tokens"].shape[1] > 0
    assert batch["counts"]["trained"] == 0
