"""What is decided after tokenizing: pack size, shares of the datasets; and what a record's tokens count."""

import json
from collections import Counter

import numpy as np
import pytest
from test_prep import chat, configured, expected, hashes, jsonl, records, unpacked  # noqa: F401 -- a fixture

from nemotron_sft.data import packed, prep, tokens
from nemotron_sft.data import plan as plans
from nemotron_sft.errors import UserError


def test_another_pack_size_needs_no_tokenizing(configured, tmp_path, monkeypatch):  # noqa: F811
    """Whatever follows the tokens: the output is the same to the byte as of a preparation from the start."""
    monkeypatch.setattr(plans, "UNIT_BYTES", 5000)
    rows = [*records(200), chat("q " * 300, "a " * 30), chat("q", "a " * 200), *records(30), chat("Say 3 please.", "!")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    prep.run(configured(path, "max_drop_ratio=0.1"))
    settings = [s.split() for s in ("pack_size=64", "pack_size=64 over_long=drop", "pack_size=1024")]
    settings += [["pack_size=100", "dedup=true"], ["split={training: 0.5, validation: 0.5, test: 0}"]]
    fresh = [prep.run(configured(path, "max_drop_ratio=0.1", *s, output=f"fresh{n}")) for n, s in enumerate(settings)]
    monkeypatch.setattr(prep, "run_unit", None)  # not called
    for number, (change, wanted) in enumerate(zip(settings, fresh, strict=True)):
        metadata = prep.run(configured(path, "max_drop_ratio=0.1", *change))
        assert not metadata["unchanged"] and hashes(tmp_path / "out") == hashes(tmp_path / f"fresh{number}")
        apart = {"directory", "wall_seconds", "tokens_per_second"}
        assert {k: v for k, v in metadata.items() if k not in apart} == {
            k: v for k, v in wanted.items() if k not in apart
        }
        if "dedup=true" not in change:
            (mix,) = metadata["blend"]["datasets"]
            pack_size = metadata["pack_size"]
            assert unpacked(tmp_path / "out") == (
                expected(rows, pack_size) if metadata["over_long"] == "truncate" else
                Counter({key: n for key, n in expected(rows, 10**6).items() if len(key[0]) <= pack_size})
            )  # fmt: skip
            assert mix["sequences"] + sum(drop["count"] for drop in mix["dropped"].values()) == len(rows)


def test_repacking_opens_no_encoder_and_starts_no_worker(configured, tmp_path, monkeypatch):  # noqa: F811
    """They take seconds. Which encoder made the tokens is known from the spool."""
    monkeypatch.setattr(plans, "UNIT_BYTES", 5000)
    path = jsonl(tmp_path / "a.jsonl", records(200))
    first = prep.run(configured(path, "workers=1"))

    def refuse(*about):
        raise RuntimeError("not needed")

    for module, name in ((tokens, "_open_fastokens"), (tokens, "_difference"), (prep, "start_workers")):
        monkeypatch.setattr(module, name, refuse)
    again = prep.run(configured(path, "workers=2", "pack_size=128"))
    assert not again["unchanged"] and again["splits"]["training"]["packs"] > first["splits"]["training"]["packs"]
    assert again["tokenizer"] == first["tokenizer"] and again["tokenizer"]["backend"] == "fastokens"
    next((tmp_path / "out/spool").iterdir()).unlink()
    with pytest.raises(RuntimeError, match="not needed"):
        prep.run(configured(path, "workers=1", "pack_size=64"))


def test_the_spool_is_kept_only_if_wanted(configured, tmp_path):  # noqa: F811
    path = jsonl(tmp_path / "a.jsonl", records(30))
    prep.run(configured(path, "keep_spool=false"))
    assert not (tmp_path / "out/spool").exists()
    prep.run(configured(path, "pack_size=128"))
    assert len(list((tmp_path / "out/spool").iterdir())) == 1
    prep.run(configured(jsonl(tmp_path / "a.jsonl", records(31))))  # what nothing can use any more goes
    assert len(list((tmp_path / "out/spool").iterdir())) == 1


def blend(tmp_path, counts, weights, **more):
    """Datasets of so many records each, with these weights."""
    return [{"name": f"d{n}", "path": str(jsonl(tmp_path / f"{n}.jsonl", records(count, 1000 * n))), "weight": weight,
             **more} for n, (count, weight) in enumerate(zip(counts, weights, strict=True))]  # fmt: skip


def proportioned(configured, tmp_path, entries, *overrides, output="out"):  # noqa: F811
    cfg = configured(entries, *overrides, output=output)
    (tmp_path / "mix.json").write_text(json.dumps({"mix": "proportions", "datasets": entries}))
    return prep.run(cfg)


@pytest.mark.parametrize("unit_bytes", [2000, 1 << 20])
def test_weights_as_proportions(configured, tmp_path, monkeypatch, unit_bytes):  # noqa: F811
    monkeypatch.setattr(plans, "UNIT_BYTES", unit_bytes)
    entries = blend(tmp_path, (300, 100, 80), (30, 20, 10))
    metadata = proportioned(configured, tmp_path, entries)
    mix = metadata["blend"]["datasets"]
    assert [d["passes"] for d in mix] == [150, 100, 50] == [d["sequences"] for d in mix]  # the second is the scarcest
    assert [d["realised_share"] for d in mix] == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert [d["requested_share"] for d in mix] == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert max(unpacked(tmp_path / "out").values()) == 1
    again = proportioned(configured, tmp_path, entries, output="again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out") and again["fingerprint"] == metadata["fingerprint"]
    monkeypatch.setattr(prep, "run_unit", None)  # other proportions need no tokenizing
    entries[0]["weight"] = 60
    more = proportioned(configured, tmp_path, entries)
    assert [d["passes"] for d in more["blend"]["datasets"]] == [300, 100, 50]
    assert not unpacked(tmp_path / "again") - unpacked(tmp_path / "out")  # what was taken stays


def test_proportions_count_what_is_usable(configured, tmp_path):  # noqa: F811
    entries = blend(tmp_path, (60, 40), (1, 1))
    (tmp_path / "2.jsonl").write_text("".join((tmp_path / f"{n}.jsonl").read_text() for n in (0, 0)))
    entries[0]["path"] = str(tmp_path / "2.jsonl")
    mix = proportioned(configured, tmp_path, entries, "dedup=true")["blend"]["datasets"]
    assert [d["passes"] for d in mix] == [40, 40]
    entries[1]["path"] = str(jsonl(tmp_path / "none.jsonl", []))
    with pytest.raises(UserError, match="dataset d1: no records"):
        proportioned(configured, tmp_path, entries)
    entries[1] |= {"path": str(tmp_path / "1.jsonl"), "weight": 0.001}
    with pytest.raises(UserError, match=r"dataset d1: weight=0\.001 takes none of 40 records"):
        proportioned(configured, tmp_path, entries)


def weights_on_disk(directory):
    """{text of a sequence's tokens: weight} of the training packs."""
    packs = packed.open_packs(directory / "training.npy")
    found = {}
    for ids, _, cu, _, weight in packs:
        for k in np.flatnonzero(np.diff(cu)):
            found[tuple(ids[cu[k] : cu[k + 1]].tolist())] = float(weight[k])
    return found


def test_weights_of_records_reach_the_packs(configured, tmp_path):  # noqa: F811
    given = [None, 0, 0.5, 2, 1]
    rows = [chat(f"q{n}", f"a{n}", **({} if w is None else {"weight": w, "w": 10})) for n, w in enumerate(given)]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    whole = "split={training: 1, validation: 0, test: 0}"
    metadata = prep.run(configured([{"name": "a", "path": path, "loss_weight": 3}], whole))
    ids = [next(iter(expected([row])))[0] for row in rows]
    assert weights_on_disk(tmp_path / "out") == {
        i: 3 * (1 if w is None else w) for i, w in zip(ids, given, strict=True)
    }
    assert metadata["blend"]["datasets"][0]["flags"] == {"weight of the record": 3}
    assert metadata["splits"]["training"]["weights"]["sequences"] == 3 * 4.5
    prep.run(configured([{"name": "a", "path": path, "weight_field": "w"}], whole))
    assert sorted(weights_on_disk(tmp_path / "out").values()) == [1, 10, 10, 10, 10]
    with pytest.raises(UserError, match="format=parquet has no place for weights"):
        prep.run(configured(path, "format=parquet"))


@pytest.mark.parametrize("weight", [-1, "heavy", True, float("nan"), 1e300, 10**30, [1]])
def test_what_is_no_weight_is_refused(configured, tmp_path, weight):  # noqa: F811
    path = jsonl(tmp_path / "a.jsonl", [chat("q", "a", weight=weight), *records(3)])
    with pytest.raises(UserError, match=r"a\.jsonl:1: bad weight: weight is .* weight_field"):
        prep.run(configured(path))
    (mix,) = prep.run(configured(path, "max_drop_ratio=0.5"))["blend"]["datasets"]
    assert mix["dropped"]["bad weight"]["count"] == 1
