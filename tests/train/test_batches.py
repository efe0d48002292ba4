"""The model sees what the data says: isolation between documents, exact losses, label shift, resumable order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data.packed import PackWriter, empty_packs, pack_dtype
from nemotron_sft.train.batches import PackedDataset, collate

PACK = 64
VOCABULARY = 256


def make_packs(lengths_per_pack, seed=0):
    """Packs of random tokens with documents of the given lengths; the second half of each document is trained."""
    rng = np.random.default_rng(seed)
    records = empty_packs(len(lengths_per_pack), pack_dtype(PACK, max(map(len, lengths_per_pack))))
    for record, lengths in zip(records, lengths_per_pack, strict=True):
        ends = np.cumsum([0, *lengths])
        record["cu_seqlens"] = ends[-1]
        record["cu_seqlens"][: len(ends)] = ends
        record["input_ids"][: ends[-1]] = rng.integers(1, VOCABULARY, ends[-1])
        for start, end in pairwise(ends):
            record["loss_mask"][(start + end) // 2 : end] = 1
    return records


packs_of_documents = st.lists(
    st.lists(st.integers(1, PACK), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) <= PACK),
    min_size=1,
    max_size=4,
)


@given(packs_of_documents)
@settings(max_examples=100)
def test_collate_agrees_with_a_loop_over_documents(lengths_per_pack):
    records = make_packs(lengths_per_pack)
    batch = collate(records)
    total = len(records) * PACK
    labels, loss_mask, positions, boundaries = [0] * total, [0.0] * total, [0] * total, [0]
    for p, record in enumerate(records):
        ends = sorted({*record["cu_seqlens"].tolist(), PACK})
        for start, end in pairwise(ends):
            boundaries.append(p * PACK + end)
            for i in range(start, end):
                positions[p * PACK + i] = i - start
                if i + 1 < end:
                    labels[p * PACK + i] = int(record["input_ids"][i + 1])
                    loss_mask[p * PACK + i] = float(record["loss_mask"][i + 1])
    assert batch["tokens"][0].tolist() == records["input_ids"].reshape(-1).tolist()
    assert batch["loss_mask"][0].tolist() == loss_mask
    trained = np.array(loss_mask) > 0
    assert (batch["labels"][0].numpy()[trained] == np.array(labels)[trained]).all()
    assert batch["position_ids"][0].tolist() == positions
    assert batch["cu_seqlens_q"][0].tolist() == boundaries
    assert int(batch["max_seqlen_q"]) == max(np.diff(boundaries))


@pytest.fixture
def split(tmp_path):
    records = make_packs([[20, 30]] * 7)
    records["input_ids"][:, 0] = np.arange(7)  # names the pack
    with PackWriter(tmp_path / "training.npy", len(records), records.dtype) as writer:
        writer.write(records)
    return tmp_path / "training.npy"


def test_every_epoch_holds_every_pack_once_in_a_new_order(split):
    dataset = PackedDataset(split, 21, seed=3)
    orders = [[int(dataset[i]["input_ids"][0, 0]) for i in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    again = PackedDataset(split, 21, seed=3)  # a resumed run starts in the middle
    assert [int(again[i]["input_ids"][0, 0]) for i in range(9, 21)] == [*orders[1], *orders[2]][2:]
    assert [PackedDataset(split, 21, seed=4).pack_number(i) for i in range(7)] != orders[0]


def test_validation_holds_every_pack_once_and_then_padding(split):
    dataset = PackedDataset(split, 1000, seed=3, once_in=10)
    for again in (0, 10):
        batch = dataset.__getitems__(list(range(again, again + 10)))
        assert batch["input_ids"][:7, 0].tolist() == list(range(7))
        assert batch["loss_mask"][7:].sum() == 0


@pytest.fixture(scope="module")
def model(bridge):
    """A small Megatron-Core GPT on the CPU, in Bridge's distributed set-up of one process (tests/gpu: on a GPU)."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with temporary_distributed_context("gloo"):
        provider = GPTModelProvider(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            normalization="RMSNorm",
            position_embedding_type="rope",
            gated_linear_unit=True,
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            vocab_size=VOCABULARY,
            seq_length=PACK,
            transformer_layer_spec=local_layer_spec,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            cross_entropy_loss_fusion=False,
            gradient_accumulation_fusion=False,
            params_dtype=torch.float32,
        )
        provider.finalize()
        yield provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)[0].eval()


def token_losses(model, records):
    """Loss of every position (T,) and the batch it belongs to, through the batch a training step would get."""
    import torch
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    batch = collate(records)
    packed = {k: v for k, v in batch.items() if "seqlen" in k} | {"total_tokens": batch["tokens"].shape[1]}
    packed = get_packed_seq_params(packed)
    with torch.no_grad():
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses[0], batch


def test_changing_one_document_leaves_the_losses_of_the_others(model):
    records = make_packs([[10, 20, 30], [33, 31]])
    before, _ = token_losses(model, records)
    changed = records.copy()
    changed["input_ids"][0, 10:30] = (changed["input_ids"][0, 10:30] + 7) % VOCABULARY
    after, _ = token_losses(model, changed)
    difference = (after - before).abs()
    inside = np.zeros(len(before), bool)
    inside[10:30] = True
    assert difference[inside].max() > 0.01
    # Position 9 ends document 0: its label lies in document 1 but its loss mask is 0, so it trains nothing.
    inside[9] = True
    assert difference[~inside].max() == 0


def test_packed_loss_is_the_loss_of_the_documents_alone(model):
    import torch

    lengths = [[10, 20, 30], [33, 31], [64], [1, 2, 3, 50]]
    records = make_packs(lengths)
    losses, batch = token_losses(model, records)
    mask = batch["loss_mask"][0]
    packed = float((losses * mask).sum() / mask.sum())

    total = count = 0.0
    for record, sizes in zip(records, lengths, strict=True):
        ends = np.cumsum([0, *sizes])
        for start, end in pairwise(ends):
            tokens = torch.from_numpy(record["input_ids"][start:end].astype(np.int64))[None]
            if end - start < 2:
                continue
            with torch.no_grad():  # core's own dense causal attention
                alone = model(tokens[:, :-1], torch.arange(end - start - 1)[None], None, labels=tokens[:, 1:])
            weight = torch.from_numpy(record["loss_mask"][start + 1 : end].astype(np.float32))
            total, count = total + float((alone[0] * weight).sum()), count + float(weight.sum())
    assert packed == pytest.approx(total / count, abs=1e-4)
    assert count == float(mask.sum())


def test_what_trained_tokens_alone_need_gives_the_same_loss_and_gradients(model):
    import torch
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    from nemotron_sft.train.step import ForwardStep

    batch = collate(make_packs([[10, 20, 30], [33, 31]]))
    packed = get_packed_seq_params({k: v for k, v in batch.items() if "seqlen" in k})
    step = ForwardStep()
    step._hook(model)
    rows = []
    model.decoder.layers[-1].mlp.register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    results, all_kept = [], batch["trained_positions"]
    few_kept = torch.cat([torch.nonzero(batch["loss_mask"][0])[:, 0], torch.tensor([127])])
    assert len(all_kept) == 128
    for positions in (None, all_kept, few_kept):
        step._positions = positions
        model.zero_grad()
        losses = model(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            labels=batch["labels"],
            packed_seq_params=packed,
        )
        (losses * batch["loss_mask"]).sum().backward()
        results.append((losses.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    step._positions = None
    assert rows == [128, 128, len(few_kept)]  # of the last layer's MLP
    every, every_gradients = results[0]
    mask = batch["loss_mask"]
    for kept, (few, few_gradients) in zip((all_kept, few_kept), results[1:], strict=True):
        assert torch.allclose(every * mask, few * mask, atol=1e-5)
        assert (few == 0).sum() == few.numel() - len(kept)
        for one, other in zip(every_gradients, few_gradients, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
