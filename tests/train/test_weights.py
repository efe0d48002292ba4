"""What a token counts: weights of sequences, loss per sequence, losses by dataset, equal to what a hand computes."""

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import SMALL, TORCHRUN, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import PACK, make_packs, packs_of_documents

from nemotron_sft.data import packed
from nemotron_sft.errors import UserError
from nemotron_sft.train.batches import PLAIN, Weighting, collate, dataset_names, weighting


def marked(records, seed=0):
    """The packs with a source and a weight (some 0) for every sequence."""
    rng = np.random.default_rng(seed)
    records["source"] = rng.integers(0, 5, records["source"].shape)
    records["weight"] = rng.choice([0, 0.25, 1, 3], records["weight"].shape)
    return records


@given(packs_of_documents, st.sampled_from(["token", "sequence"]), st.sampled_from([1, 2, 4]))
@settings(max_examples=100)
def test_loss_mask_and_sources_agree_with_a_loop_over_sequences(lengths_per_pack, per, context):
    records = marked(make_packs(lengths_per_pack))
    batch = collate(records, context, 1, Weighting(per, 2.0, True))
    factors, sources = [], []
    for record in records:
        for k, (start, end) in enumerate(pairwise(record["cu_seqlens"].tolist())):
            targets = record["loss_mask"][start + 1 : end].astype(float)
            share = 2.0 * record["weight"][k] / (max(1, targets.sum()) if per == "sequence" else 1)
            factors += [*(targets * share), 0.0][: end - start]
            sources += [int(record["source"][k])] * (end - start)
        if context == 1:
            factors += [0.0] * (PACK - record["cu_seqlens"][-1])
            sources += [0] * (PACK - record["cu_seqlens"][-1])
    mask, found = batch["loss_mask"][0].numpy(), batch["sources"][0].numpy()
    if context > 1:  # padding between documents
        real, places = (batch[name][0].numpy() for name in ("cu_seqlens_q", "cu_seqlens_q_padded"))
        at = [p + i for (a, b), p in zip(pairwise(real), places, strict=False) for i in range(b - a)]
        assert np.delete(mask, at).sum() == 0
        mask, found = mask[at], found[at]
    assert mask == pytest.approx(np.array(factors), rel=1e-6)
    assert found.tolist() == sources
    assert batch["counts"]["trained"] == np.count_nonzero(factors)


def test_version_1_counts_every_token_once():
    records = make_packs([[20, 30], [10]])
    old = np.zeros(len(records), packed.pack_dtype(PACK, 2, version=1))
    for name in old.dtype.names:
        old[name] = records[name]
    new = collate(records)
    for name, values in collate(old).items():
        if name != "counts" and values is not None:
            assert (values == new[name]).all()


def metadata_of(records, directory, like):
    """Commit `records` as training and validation packs of an output that is otherwise like the prep output `like`."""
    metadata = packed.read_metadata(like)
    datasets = int(records["source"].max()) + 1
    entry = metadata["blend"]["datasets"][0]
    metadata["blend"]["datasets"] = [entry | {"name": f"s{number}"} for number in range(datasets)]
    metadata["pack_size"] = PACK
    for name in ("training", "validation"):
        metadata["splits"][name] = packed.write_packs(
            directory / f"{name}.npy", [records], len(records), datasets=datasets
        )
    metadata["splits"]["test"] |= {"packs": 0, "file": None}
    packed.write_metadata(directory, metadata)
    return metadata


def test_the_mean_over_a_split_is_1(tmp_path, tiny_data):
    records = marked(make_packs([[20, 30], [10, 40, 5], [64]]))
    metadata = metadata_of(records, tmp_path, tiny_data)
    for per in ("token", "sequence"):
        chosen = weighting(metadata, per)
        assert chosen.weighted
        mask, source = (collate(records, 1, 1, chosen)[name] for name in ("loss_mask", "sources"))
        *_, trained = packed.sequences_of(records)
        assert mask.sum() == pytest.approx(trained.sum(), rel=0.1)  # a sequence's first token is never a target
    records["weight"] = 1
    assert weighting(metadata_of(records, tmp_path, tiny_data), "token") == PLAIN
    assert dataset_names(metadata) == [f"s{number}" for number in range(int(source.max()) + 1)]
    assert dataset_names(metadata | {"version": 1}) == []
    old = {**metadata, "version": 1}
    del old["splits"]["training"]["weights"]
    assert weighting(old, "token") == PLAIN and weighting(old, "sequence").weighted
    with pytest.raises(UserError, match="choose token or sequence"):
        weighting(metadata, "word")
    records["weight"] = 0
    with pytest.raises(UserError, match="weight 0"):
        weighting(metadata_of(records, tmp_path, tiny_data), "token")


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def by_dataset(line, name):
    return {key.partition("/")[2]: value for key, value in line.items() if key.startswith(f"{name}/")}


@pytest.mark.slow
def test_losses_equal_what_a_hand_computes_on_any_division(tmp_path, tiny_data):
    """Every sequence is a dataset of its own here, so that a first run tells the mean loss of each; the loss per
    sequence follows by hand. Two data-parallel ranks and two context-parallel ones agree with it."""
    records = make_packs([[20, 30], [10, 40, 5], [64], [3, 61]])
    records["source"] = np.arange(records["source"].size).reshape(records["source"].shape)
    records["weight"] = np.array([[1, 0.5, 9], [2, 0, 1], [1, 9, 9], [1, 0.125, 9]])  # 9: of no sequence
    (tmp_path / "data").mkdir()
    metadata_of(records, tmp_path / "data", tiny_data)

    def train(name, *overrides, launcher=(sys.executable,)):
        done = run(*launcher, "recipes/train.py", f"data={tmp_path}/data", f"run_dir={tmp_path / name}", *SMALL,
                   "train.train_iters=3", "validation.eval_interval=3", "train.packs_per_microbatch=1",
                   "model.num_query_groups=2", *overrides)  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return lines_of(tmp_path / name)

    tokens = train("tokens")
    first = tokens[0]
    means, counts = by_dataset(first, "loss"), by_dataset(first, "trained_tokens")
    source, weight, _, trained = packed.sequences_of(records)
    of = {f"s{s}": (float(w), int(n)) for s, w, n in zip(source, weight, trained, strict=True) if w}
    assert counts == {name: n for name, (_, n) in of.items()}  # each pack once in this step, weight 0 not at all
    wanted = sum(w * n * means[name] for name, (w, n) in of.items()) / sum(w * n for w, n in of.values())
    assert first["loss"] == pytest.approx(wanted, rel=1e-6)

    runs = {
        "DP": train("DP", "train.loss_per=sequence", launcher=TORCHRUN),
        "CP": train("CP", "train.loss_per=sequence", "model.context_parallel_size=2", launcher=TORCHRUN),
    }
    wanted = sum(w * means[name] for name, (w, _) in of.items()) / sum(w for w, _ in of.values())
    assert abs(wanted - first["loss"]) > 1e-4
    for lines in runs.values():
        assert len(lines) == len(tokens) and lines[0]["loss"] == pytest.approx(wanted, rel=1e-6)
        for line, other in zip(lines, runs["DP"], strict=True):
            for key in {"loss", "grad_norm", "validation_loss"} & line.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-5)
            kind = "loss" if "loss" in line else "validation_loss"
            shares = by_dataset(line, "loss_share" if kind == "loss" else "validation_share")
            losses = by_dataset(line, kind)
            assert math.fsum(shares.values()) == pytest.approx(1)
            assert math.fsum(shares[name] * losses[name] for name in shares) == pytest.approx(line[kind], rel=1e-5)


@pytest.mark.slow
def test_a_weight_of_two_is_the_sequence_twice(tmp_path, tiny_data):
    """Losses and the size of the gradient, which Adam would hide."""
    once = make_packs([[30, 34], [64]])
    twice = np.concatenate([once, once[:1], once[:1]])
    weighted = np.concatenate([once, once])
    weighted["weight"][[0, 2]] = 1.5  # 3 of 2 times: as often as above
    weighted["weight"][[1, 3]] = 0.5
    results = []
    for name, records in (("twice", twice), ("weighted", weighted)):
        (tmp_path / name).mkdir()
        metadata_of(records, tmp_path / name, tiny_data)
        done = run(sys.executable, "recipes/train.py", f"data={tmp_path}/{name}", f"run_dir={tmp_path}/run-{name}",
                   *SMALL, "train.train_iters=2", "validation.eval_interval=2")  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(
            [(line["loss"], line["grad_norm"]) for line in lines_of(tmp_path / f"run-{name}") if "lr" in line]
        )
    assert np.array(results[0]) == pytest.approx(np.array(results[1]), rel=1e-5)
