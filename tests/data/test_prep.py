"""The preparation pipeline: exact, indifferent to the number of workers, resumable, clear about bad input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hub import COMMIT, serving
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft import app, config, paths
from nemotron_sft.data import merge, packed, prep, units
from nemotron_sft.data import plan as plans
from nemotron_sft.data.chat import load_template
from nemotron_sft.data.tokens import load_tokenizer
from nemotron_sft.errors import UserError
from nemotron_sft.paths import ROOT

TINY = ROOT / "data/tiny"


def chat(*texts, **extra):
    """A conversation of alternating user and assistant messages."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": messages, **extra}


def records(count, start=0):
    return [chat(f"Say {i} please.", "word " * (i % 23) + str(i)) for i in range(start, start + count)]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def configured(tmp_path):
    """configured(data, "key=value", ...) -> the checked config for a blend of one file or of many."""

    def make(data, *overrides, output="out", **entry):
        datasets = data if isinstance(data, list) else [{"name": "d", "path": str(data), **entry}]
        (tmp_path / "mix.json").write_text(json.dumps({"datasets": datasets}))
        with initialize_config_dir(str(paths.CONF), version_base="1.3"):
            fixed = [
                "blend=file",
                f"blend.path={tmp_path}/mix.json",
                f"output_dir={tmp_path / output}",
                "workers=1",
            ]
            cfg = compose("prep", [*fixed, *(app.open_key(o) for o in ("pack_size=256", *overrides))])
        return config.check(cfg, config.Prep)

    return make


def packs_of(directory, name="training"):
    return packed.open_packs(Path(directory) / f"{name}.npy")


def unpacked(directory):
    """Counter of (ids, mask) of every sequence in the training, validation and test packs."""
    found = Counter()
    for name in packed.SPLITS:
        if not (Path(directory) / f"{name}.npy").exists():
            continue
        for ids, mask, cu, *_ in packs_of(directory, name):
            for a, b in pairwise(cu):
                if b > a:
                    found[tuple(ids[a:b].tolist()), tuple(mask[a:b].tolist())] += 1
    return found


def expected(rows, pack_size=256):
    """What `unpacked` should find, computed one span at a time with the reference encoder."""
    template, tokenizer = (
        load_template("nano3"),
        load_tokenizer(str(TINY / "tokenizer"), backend="tokenizers"),
    )
    found = Counter()
    for row in rows:
        for spans in template.sequences(row["messages"], row.get("tools")):
            ids, mask = [], []
            for role, text in spans:
                span = tokenizer.encode_batch([text])[0].tolist()
                ids += span
                mask += [int(role == "assistant")] * len(span)
            if any(mask[:pack_size]):
                found[tuple(ids[:pack_size]), tuple(mask[:pack_size])] += 1
    return found


def hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(directory).glob("*.npy"))}


# --- exactness ---------------------------------------------------------------------------------------------


def test_tiny_end_to_end(configured, tmp_path):
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:800]]
    metadata = prep.run(configured(jsonl(tmp_path / "a.jsonl", rows), "pack_size=512"))
    out = tmp_path / "out"
    assert unpacked(out) == expected(rows, 512)
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == [
        "metadata.json", "report.html", "spool", "test.npy", "training.npy", "validation.npy"
    ]  # fmt: skip
    on_disk = json.loads((out / "metadata.json").read_text())
    assert on_disk == {k: v for k, v in metadata.items() if k not in ("directory", "unchanged")}
    (mix,) = on_disk["blend"]["datasets"]
    assert mix["records_read"] == mix["records_kept"] == 800 and mix["dropped"] == {}
    for key in ("sequences", "tokens", "trained_tokens"):
        assert sum(part[key] for part in on_disk["splits"].values()) == mix[key]
    for name, part in on_disk["splits"].items():
        packs, raw = packs_of(out, name), (out / part["file"]).read_bytes()
        assert (len(packs), len(raw), hashlib.sha256(raw).hexdigest()) == (
            part["packs"],
            part["bytes"],
            part["sha256"],
        )
        assert int(packs["loss_mask"].sum()) == part["trained_tokens"]
        assert part["fill"] == pytest.approx(part["tokens"] / packs["input_ids"].size, abs=1e-6)
        ends = packs["cu_seqlens"].max(axis=1)
        padding = np.arange(512) >= ends[:, None]
        assert (packs["input_ids"][padding] == on_disk["tokenizer"]["pad_id"]).all()
        assert not packs["loss_mask"][padding].any()
    assert sum(on_disk["lengths"]["counts"]) == mix["sequences"]
    assert on_disk["splits"]["training"]["fill"] > 0.95


def test_workers_and_unit_size_leave_no_trace(configured, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", records(600))
    found = {}
    for unit_bytes, workers in ((1 << 20, 1), (3000, 1), (3000, 2), (3000, 8)):
        monkeypatch.setattr(plans, "UNIT_BYTES", unit_bytes)
        output = f"{unit_bytes}-{workers}"
        cfg = configured(path, f"workers={workers}", output=output)
        assert len(plans.plan(cfg).units) == -(-path.stat().st_size // unit_bytes)
        prep.run(cfg)
        found[output] = hashes(tmp_path / output)
    assert len(found["3000-8"]) == 3
    assert len({json.dumps(h) for h in found.values()}) == 1, found


def test_seed_changes_the_output(configured, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", records(100))
    prep.run(configured(path, output="a"))
    prep.run(configured(path, "seed=2", output="b"))
    assert hashes(tmp_path / "a") != hashes(tmp_path / "b")
    assert unpacked(tmp_path / "a") == unpacked(tmp_path / "b")


def test_parquet_holds_the_same_packs(configured, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", records(300))
    prep.run(configured(path, output="a"))
    metadata = prep.run(configured(path, "format=parquet", output="b"))
    assert metadata["splits"]["training"]["file"] == "training.idx.parquet"
    for index in range(metadata["splits"]["training"]["packs"]):
        ours = packed.read_pack(tmp_path / "a/training.npy", index)
        bridge = packed.read_pack(tmp_path / "b/training.idx.parquet", index)
        assert all(map(np.array_equal, ours, bridge))
    prep.run(configured(path, output="b"))  # back to npy in the same place
    assert not list((tmp_path / "b").glob("*.parquet"))


def test_fields_tools_and_json_text(configured, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    rows = [chat("a", "b", tools=tools), chat("c", "d", tools=tools)]
    odd = [
        {"m": rows[0]["messages"], "t": json.dumps(tools)},
        {"m": json.dumps(rows[1]["messages"]), "t": tools},
    ]
    prep.run(configured(jsonl(tmp_path / "a.jsonl", odd), "messages_field=m", "tools_field=t"))
    assert unpacked(tmp_path / "out") == expected(rows)


def test_user_template_with_the_tokenizers_own_tokens(configured, tmp_path):
    template = tmp_path / "my.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}\n{% endfor %}"
    )
    path = jsonl(tmp_path / "a.jsonl", [chat("a", "b")])
    metadata = prep.run(configured(path, "template=file", f"template.name={template}", "split.training=1",
                                   "split.validation=0", "split.test=0"))  # fmt: skip
    tokenizer = load_tokenizer(str(TINY / "tokenizer"))
    ids, mask, _ = packed.read_pack(tmp_path / "out/training.npy", 0)
    assert tokenizer.decode(ids[mask == 1]) == "b" + tokenizer.special_tokens["eos_token"]
    assert metadata["template"]["name"] == str(template)


# --- blends ------------------------------------------------------------------------------------------------


def test_weights_are_passes(configured, tmp_path):
    entries = []
    for number, weight in enumerate((0.25, 1, 1.5, 2)):
        path = jsonl(tmp_path / f"{number}.jsonl", [chat(f"{number} {i}", "yes") for i in range(400)])
        entries.append({"name": f"w{weight}", "path": str(path), "weight": weight})
    metadata = prep.run(configured(entries))
    counts = {d["name"]: d["sequences"] for d in metadata["blend"]["datasets"]}
    assert counts["w1"] == 400 and counts["w2"] == 800
    assert 70 <= counts["w0.25"] <= 130 and 560 <= counts["w1.5"] <= 640
    copies = Counter(count for count in unpacked(tmp_path / "out").values())
    assert copies[2] == 400 + counts["w1.5"] - 400 and max(copies) == 2
    for entry in metadata["blend"]["datasets"]:
        assert entry["requested_share"] == pytest.approx(entry["weight"] / 4.75)
        assert entry["realised_share"] == pytest.approx(entry["sequences"] / sum(counts.values()))


def test_an_answer_that_is_labelled_bad_is_not_trained(configured, tmp_path):
    """KTO's data has good and bad answers."""
    path = jsonl(tmp_path / "a.jsonl", [{**record, "label": i > 1} for i, record in enumerate(records(10))])
    with pytest.raises(UserError, match=r'a.jsonl:1: rejected answer: .*"filter": {"label": true}'):
        prep.run(configured(path))
    metadata = prep.run(configured(path, filter={"label": True}))
    assert metadata["blend"]["datasets"][0]["records_kept"] == 8
    metadata = prep.run(configured(path, "max_drop_ratio=0.2", output="dropped"))
    assert metadata["blend"]["datasets"][0]["dropped"]["rejected answer"]["count"] == 2


def test_filter(configured, tmp_path):
    rows = [chat("a", "b", used_in=["nano_v3", "x"]), chat("c", "d", used_in=["x"]), chat("e", "f")]
    metadata = prep.run(configured(jsonl(tmp_path / "a.jsonl", rows), filter={"used_in": "nano_v3"}))
    (mix,) = metadata["blend"]["datasets"]
    assert (mix["records_read"], mix["records_matched"], mix["records_kept"]) == (3, 1, 1)
    assert unpacked(tmp_path / "out") == expected(rows[:1])


def test_sample_takes_the_first_of_each_and_its_own_place(configured, tmp_path, monkeypatch):
    entries = [
        {"name": name, "path": str(jsonl(tmp_path / name, rows)), "filter": {"use": 1}}
        for name, rows in (
            ("a.jsonl", [chat(f"a{i}", "x", use=i % 2) for i in range(50)]),
            ("b.jsonl", [chat(f"b{i}", "x", use=1) for i in range(3)]),
        )
    ]
    prep.run(configured(entries, "sample=10"))
    rows = [chat(f"a{i}", "x") for i in range(1, 20, 2)] + [chat(f"b{i}", "x") for i in range(3)]
    assert unpacked(tmp_path / "out") == expected(rows)
    monkeypatch.chdir(tmp_path)
    assert plans.plan(configured(entries, "sample=10", "output_dir=null")).directory == Path("output/data/mix-sample10")
    assert plans.plan(configured(entries, "output_dir=null")).directory == Path("output/data/mix")


# --- splits ------------------------------------------------------------------------------------------------


def test_a_conversation_is_in_one_split(configured, tmp_path):
    """Repeated by weight, within a file and across datasets, and cut into several sequences by reasoning."""
    rows = [chat(f"q{i}", "a", f"r{i}", "b") for i in range(150)]
    for row in rows:
        row["messages"][1]["reasoning_content"] = "hm"
    path = jsonl(tmp_path / "a.jsonl", rows + rows[:50])
    entries = [{"name": n, "path": str(path), "weight": w} for n, w in (("a", 2), ("b", 0.5))]
    prep.run(configured(entries, "split.training=0.6", "split.validation=0.2", "split.test=0.2"))
    tokenizer = load_tokenizer(str(TINY / "tokenizer"))
    seen = {}
    for name in packed.SPLITS:
        for ids, _, cu, *_ in packs_of(tmp_path / "out", name):
            for a, b in pairwise(cu):
                if b > a:
                    question = tokenizer.decode(ids[a:b]).split("user\nq")[1].split("<")[0]
                    assert seen.setdefault(question, name) == name
    assert len(seen) == 150 and len(set(seen.values())) == 3


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60),
    st.sampled_from([(0.98, 0.01, 0.01), (1, 0, 0), (0.5, 0.5, 0), (0.01, 0.01, 0.98)]),
    st.integers(0, 2**31),
)
def test_split_rules(conversations, ratios, seed):
    which = merge.assign_splits(np.array(conversations, np.uint64), list(ratios), seed)
    assert len({(c, w) for c, w in zip(conversations, which, strict=True)}) == len(set(conversations))
    used, wanted = set(which.tolist()), {i for i, ratio in enumerate(ratios) if ratio}
    assert used <= wanted and (0 in used or ratios[0] == 0)
    assert len(used) == min(len(wanted), len(set(conversations)))


@pytest.mark.parametrize("seed", [0, 1234, 2**40])
def test_split_ratios_hold(seed):
    which = merge.assign_splits(np.arange(200_000, dtype=np.uint64), [0.9, 0.07, 0.03], seed)
    assert np.bincount(which) / 200_000 == pytest.approx([0.9, 0.07, 0.03], abs=0.003)
    assert (which != merge.assign_splits(np.arange(200_000, dtype=np.uint64), [0.9, 0.07, 0.03], seed + 1)).any()


def test_empty_splits_have_no_file(configured, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", records(20))
    metadata = prep.run(configured(path, "split.training=1", "split.validation=0", "split.test=0"))
    assert list(hashes(tmp_path / "out")) == ["training.npy"]
    assert metadata["splits"]["validation"]["packs"] == 0 and metadata["splits"]["validation"]["file"] is None


# --- drops and long sequences ------------------------------------------------------------------------------


def test_drops_are_counted_with_their_first_place(configured, tmp_path, monkeypatch):
    rows = records(200)
    rows[17] = {"text": "no messages here"}
    rows[40] = {"messages": [{"role": "robot", "content": "?"}]}
    rows[41] = {"messages": [{"role": "user", "content": "?"}]}
    rows[150] = {"messages": [{"role": "robot", "content": "?"}]}
    path = jsonl(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(plans, "UNIT_BYTES", 2000)
    metadata = prep.run(configured(path, "max_drop_ratio=0.02"))
    (mix,) = metadata["blend"]["datasets"]
    found = {reason: (drop["count"], drop["first"]) for reason, drop in mix["dropped"].items()}
    assert found == {
        "no messages": (1, f"{path}:18"),
        "unknown role": (2, f"{path}:41"),
        "no assistant turn": (1, f"{path}:42"),
    }
    assert mix["records_kept"] == 196
    with pytest.raises(UserError, match=rf"4 of 200 records dropped.*max_drop_ratio=0.01.*unknown role.*{path}:41"):
        prep.run(configured(path, "max_drop_ratio=0.01", output="other"))
    assert not (tmp_path / "other/metadata.json").exists()


def test_nothing_trained_counts_as_a_drop(configured, tmp_path):
    """A template that marks empty spans would otherwise give data without a single target."""
    template = tmp_path / "my.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}")
    path = jsonl(tmp_path / "a.jsonl", records(5))
    with pytest.raises(UserError, match=r"a\.jsonl"):
        prep.run(configured(path, "template=file", f"template.name={template}"))


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_over_long(configured, tmp_path, policy):
    rows = [*records(50), chat("short", "long " * 400), chat("long " * 400, "short")]
    metadata = prep.run(configured(jsonl(tmp_path / "a.jsonl", rows), f"over_long={policy}"))
    (mix,) = metadata["blend"]["datasets"]
    drops = {reason: (drop["count"], Path(drop["first"]).name) for reason, drop in mix["dropped"].items()}
    if policy == "truncate":
        assert unpacked(tmp_path / "out") == expected(rows) and sum(unpacked(tmp_path / "out").values()) == 51
        assert mix["truncated"] == 1 and drops == {"no trained token within pack_size": (1, "a.jsonl:52")}
    else:
        assert unpacked(tmp_path / "out") == expected(rows[:50])
        assert mix["truncated"] == 0 and drops == {"longer than pack_size": (2, "a.jsonl:51")}


# --- resuming ----------------------------------------------------------------------------------------------

CRASHES = {
    "in the third unit": "units._Work.write = crash(units._Work.write, 3)",
    "before a spool file is renamed": "os.replace = crash(os.replace, 2)",
    "before merging": "merge._mix = crash(merge._mix, 1)",
    "in the second chunk": "merge._assemble = crash(merge._assemble, 2)",
    "between two splits": "merge.write_packs = crash(merge.write_packs, 2)",
    "before the commit": "packed.write_metadata = crash(packed.write_metadata, 1)",
    "before tidying up": "shutil.rmtree = crash(shutil.rmtree, 1)",
}
DRIVER = """
import os, pickle, shutil, signal, sys
from nemotron_sft.data import packed
from nemotron_sft.data import prep
from nemotron_sft.data import merge
from nemotron_sft.data import units
from nemotron_sft.data import plan as plans
plans.UNIT_BYTES, merge.CHUNK_TOKENS = 3000, 4096
def crash(function, at):
    calls = [0]
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        cfg = pickle.load(file)
    exec(sys.argv[2])
    prep.run(cfg)
"""


def start(cfg, tmp_path, crash="", **options):
    (tmp_path / "driver.py").write_text(DRIVER)
    import pickle

    (tmp_path / "cfg.pickle").write_bytes(pickle.dumps(cfg))
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "cfg.pickle"), crash]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, **options)


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(plans, "UNIT_BYTES", 3000)
    monkeypatch.setattr(merge, "CHUNK_TOKENS", 4096)


@pytest.mark.parametrize("point", CRASHES)
def test_killed_and_rerun(configured, tmp_path, small_units, monkeypatch, point):
    path = jsonl(tmp_path / "a.jsonl", records(300))
    prep.run(configured(path, output="straight"))
    cfg, out = configured(path, "keep_spool=false"), tmp_path / "out"
    killed = start(cfg, tmp_path, CRASHES[point])
    assert killed.wait(60) == -signal.SIGKILL, killed.stderr.read().decode()
    assert (out / "metadata.json").exists() == (point == "before tidying up")

    done, redone = {p.stem for p in (out / "spool").glob("*.spool")}, []
    run_unit = units.run_unit
    monkeypatch.setattr(prep, "run_unit", lambda todo, unit: redone.append(unit.key) or run_unit(todo, unit))
    metadata = prep.run(cfg)
    every = [unit.key for unit in plans.plan(cfg).units]
    assert metadata["unchanged"] == (point == "before tidying up")
    assert redone == [key for key in every if key not in done]
    assert len(done) == {"in the third unit": 2, "before a spool file is renamed": 1}.get(point, len(every))
    assert hashes(out) == hashes(tmp_path / "straight")
    assert not list(out.glob(".*.tmp"))


def processes_under(pid):
    """Pids of all processes below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    for _ in range(5):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_a_worker_killed_before_the_first_unit(configured, tmp_path):
    cfg = configured(jsonl(tmp_path / "a.jsonl", records(10)))
    todo = plans.plan(cfg)
    with pytest.raises(UserError, match="a worker process was killed"), prep.start_workers(1, cfg) as pool:
        os.kill(pool.submit(os.getpid).result(), signal.SIGKILL)
        todo.directory.mkdir()
        prep.run_units(todo, pool)


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_kill_with_two_workers(configured, tmp_path, small_units, monkeypatch, victim):
    path = jsonl(tmp_path / "a.jsonl", records(4000))
    cfg, out = configured(path, "workers=2"), tmp_path / "out"
    run = start(cfg, tmp_path)
    wait_for(lambda: len(list((out / "spool").glob("*.spool"))) > 20)
    below = processes_under(run.pid)
    if victim == "parent":
        run.kill()
        run.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 20)
    else:
        workers = [pid for pid in below if len(os.listdir(f"/proc/{pid}/task")) > 1]
        os.kill(workers[0], signal.SIGKILL)
        assert run.wait(60) == 1
        assert "a worker process was killed" in run.stderr.read().decode().strip().splitlines()[-1]
    assert not (out / "metadata.json").exists()
    done = len(list((out / "spool").glob("*.spool")))
    total = len(plans.plan(cfg).units)
    assert 20 < done < total
    assert len(list((out / "spool").glob("*.tmp"))) <= 2
    prep.run(cfg)
    monkeypatch.setattr(plans, "UNIT_BYTES", 1 << 20)
    prep.run(configured(path, output="straight"))
    assert hashes(out) == hashes(tmp_path / "straight")


def test_rerun_does_nothing_until_something_changes(configured, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", records(30))
    assert not prep.run(configured(path))["unchanged"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*[a-z].*")}
    assert prep.run(configured(path))["unchanged"]
    assert prep.run(configured(path, "workers=2"))["unchanged"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*[a-z].*")}
    assert not prep.run(configured(path, "force=true"))["unchanged"]
    for change in (
        "pack_size=128",
        "seed=1",
        "split.test=0.02,split.training=0.97",
        "template.mask=last_turn",
    ):
        cfg = configured(path, *change.split(","))
        assert not prep.run(cfg)["unchanged"] and prep.run(cfg)["unchanged"]
    jsonl(path, records(31))
    assert prep.run(cfg)["splits"]["training"]["sequences"] >= 29 and prep.run(cfg)["unchanged"]
    (tmp_path / "out/training.npy").write_bytes(b"cut")
    assert not prep.run(cfg)["unchanged"]


def test_two_at_once_are_refused(configured, tmp_path):
    cfg = configured(jsonl(tmp_path / "a.jsonl", records(3)))
    with prep.locked(tmp_path / "out"), pytest.raises(UserError, match="in use by another prep"):
        prep.run(cfg)


def test_plan_survives_pickling_and_units_run_anywhere(configured, tmp_path, small_units):
    """What a job array does: plan once, run the units in any order, merge at the end."""
    import pickle

    cfg = configured(jsonl(tmp_path / "a.jsonl", records(100)))
    todo = pickle.loads(pickle.dumps(plans.plan(cfg)))
    assert plans.plan(cfg) == todo
    todo.spool(todo.units[0]).parent.mkdir(parents=True)
    for unit in reversed(todo.units):
        assert units.run_unit(todo, unit) == units.run_unit(todo, unit)
    merge.merge(cfg, todo)
    assert unpacked(tmp_path / "out") == expected(records(100))


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "overrides", "words"),
    [
        (['{"messages": [}'], [], "a.jsonl:4: not JSON"),
        ([{"text": "x"}], [], "a.jsonl:4: no messages: the record has no messages (messages_field)"),
        ([{"messages": []}], [], "a.jsonl:4: no messages"),
        ([chat("x")], [], "a.jsonl:4: no assistant turn"),
        ([{"messages": [{"role": "robot"}]}], [], "a.jsonl:4: unknown role: message 0: 'robot'"),
        ([], ["split.training=0.5"], "sum to 1, not 0.5 + 0.01 + 0.01 = 0.52"),
        ([], ["split.training=1.2", "split.test=-0.21"], "must be 0..1"),
        ([], ["pack_size=0"], "pack_size must be at least 2, not 0"),
        ([], ["sample=0"], "sample must be at least 1"),
        ([], ["workers=0"], "workers must be at least 1"),
        ([], ["over_long=keep"], "over_long must be truncate or drop"),
        ([], ["format=csv"], "format must be npy or parquet"),
        ([], ["max_drop_ratio=2"], "max_drop_ratio must be 0..1"),
        ([], ["tokenizer.model=/nowhere"], "/nowhere"),
        ([], ["template=file", "template.name=/nowhere.jinja"], "nor a readable Jinja file"),
        ([], ["blend.path=/nowhere.json"], "no blend file /nowhere.json"),
        ([], ["max_drop_rato=1"], "did you mean max_drop_ratio"),
        ([], ["split.train=1"], "did you mean split.training"),
        ([], ["pack_size=many"], "pack_size"),
    ],
)  # fmt: skip
def test_bad_input(configured, tmp_path, lines, overrides, words):
    rows = [json.dumps(row) for row in records(3)]
    rows += [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    overrides = [f"+{o}" if o.startswith("max_drop_rato") else o for o in overrides]
    with pytest.raises(UserError) as caught:
        prep.run(configured(tmp_path / "a.jsonl", *overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*[a-z].*"))


def test_broken_template(configured, tmp_path):
    (tmp_path / "my.jinja").write_text("{% for m in messages %}")
    path = jsonl(tmp_path / "a.jsonl", records(3))
    with pytest.raises(UserError, match=r"my\.jinja"):
        prep.run(configured(path, "template=file", f"template.name={tmp_path / 'my.jinja'}"))


def test_nothing_to_train_on(configured, tmp_path):
    with pytest.raises(UserError, match=r"dataset d: none of 3 records matches its filter {'used_in': 'x'}"):
        prep.run(configured(jsonl(tmp_path / "a.jsonl", records(3)), filter={"used_in": "x"}))


def test_unwritable_output(configured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create .*file/out.*set output_dir"):
        prep.run(configured(jsonl(tmp_path / "a.jsonl", records(3)), output="file/out"))


@pytest.mark.parametrize("kilobytes", [8, 64, 128, 200])
def test_disk_full(configured, tmp_path, kilobytes):
    """On a small tmpfs, at whatever stage it fills up; once there is room the rerun finishes."""
    out = tmp_path / "out"
    out.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(out)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        cfg = configured(jsonl(tmp_path / "a.jsonl", records(1200)))
        with pytest.raises(UserError) as caught:
            prep.run(cfg)
        assert "no space left" in str(caught.value) and "\n" not in str(caught.value)
        assert not (out / "metadata.json").exists()
        assert not list(out.glob("**/*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        prep.run(cfg)
        assert unpacked(out) == expected(records(1200))
    finally:
        subprocess.run(["umount", str(out)], check=True)


# --- the command -------------------------------------------------------------------------------------------


def command(*arguments, **options):
    file = ROOT / f"recipes/{options.pop('name', 'prep')}.py"
    return subprocess.run(
        [sys.executable, *options.pop("python", []), str(file), *arguments],
        capture_output=True, text=True, **options,
    )  # fmt: skip


def test_command(tmp_path):
    done = command("blend=tiny", "sample=100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Mix of tiny" in done.stdout and "Wrote output/data/tiny-sample100" in done.stdout
    again = command("blend=tiny", "sample=100", cwd=tmp_path)
    assert again.returncode == 0 and "Nothing changed" in again.stdout
    shown = command("output/data/tiny-sample100", "--pack", "1", cwd=tmp_path, name="show")
    assert shown.returncode == 0 and "pack 1," in shown.stdout and "«" in shown.stdout
    shown = command("output/data/tiny-sample100", cwd=tmp_path, name="show")
    assert "Mix of tiny" in shown.stdout and "Dataset-tiny" in shown.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["output"]
    bad = command("blend=file", "blend.path=nowhere.json", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.strip().splitlines() == [
        "error: no blend file nowhere.json: give an existing JSON or YAML file as blend=FILE"
    ]


def test_hub_sample_fetches_no_more_than_it_needs(tmp_path):
    rows = "".join(json.dumps(row) + "\n" for row in records(20)).encode()
    (tmp_path / "mix.yaml").write_text("datasets: [{name: h, path: org/name, split: train}]")
    with serving({"org/name": {f"train-{i}.jsonl": rows for i in range(3)}}) as server:
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
        done = command("blend=file", "blend.path=mix.yaml", "sample=25", "output_dir=out", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        fetched = {path.rpartition("/")[2] for method, path, _ in server.requests if "resolve" in path}
    metadata = json.loads((tmp_path / "out/metadata.json").read_text())
    assert metadata["blend"]["datasets"][0]["records_kept"] == 25
    assert fetched == {"train-0.jsonl", "train-1.jsonl"}
    assert metadata["inputs"][0]["path"] == f"hf://datasets/org/name@{COMMIT}/train-0.jsonl"


def test_what_the_template_writes_itself_is_left_out_and_counted(configured, tmp_path):
    """Marks of rendered text, and flags of turns beside a system message of a field of its own."""
    clean = [chat("q1", "a1"), chat("q2", "a2 "), *records(3)]
    rows = [chat("q1<|im_end|>", "a1<|im_end|>\n"), chat("q2", "a2 <|im_end|>"), *records(3)]
    metadata = prep.run(configured(jsonl(tmp_path / "a.jsonl", rows), output="marked"))
    assert unpacked(tmp_path / "marked") == expected(clean)
    assert metadata["blend"]["datasets"][0]["flags"] == {"the template's end token in the text": 2}
    turns = chat("q1", "a1", "q2", "a2", system="s", train_turns=[False, False, False, True])
    prep.run(configured(jsonl(tmp_path / "b.jsonl", [turns]), output="turns"))
    question, answer, *more = turns["messages"]
    flagged = {"messages": [{"role": "system", "content": "s"}, question, {**answer, "weight": 0}, *more]}
    prep.run(configured(jsonl(tmp_path / "c.jsonl", [flagged]), output="flagged"))
    assert unpacked(tmp_path / "turns") == unpacked(tmp_path / "flagged") != Counter()
