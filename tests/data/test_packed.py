"""The on-disk format: what is written is what is read, and nothing half-written is ever read."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from nemotron_sft import files
from nemotron_sft.data import packed
from nemotron_sft.data.packing import members, pack
from nemotron_sft.errors import UserError

PAD = 99


def records_of(sequences=200, pack_size=64, version=packed.VERSION):
    """Packs of random tokens, laid out with plain loops."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, pack_size + 1, sequences)
    order, bounds = members(pack(lengths, pack_size))
    packs = packed.empty_packs(len(bounds) - 1, packed.pack_dtype(pack_size, int(np.diff(bounds).max()), version))
    packs["input_ids"] = PAD
    if version > 1:
        packs["source"] = random.integers(0, 3, packs["source"].shape)
        packs["weight"] = random.choice([0, 0.5, 1, 2.5], packs["weight"].shape)
    for record, low, high in zip(packs, bounds, bounds[1:], strict=False):
        cu = np.concatenate([[0], np.cumsum(lengths[order[low:high]])])
        record["input_ids"][: cu[-1]] = random.integers(0, PAD, cu[-1])
        record["loss_mask"][: cu[-1]] = random.integers(0, 2, cu[-1])
        record["cu_seqlens"] = cu[-1]
        record["cu_seqlens"][: len(cu)] = cu
    return packs


def write(path, packs, chunk=7):
    """Write packs a few at a time, in the format that the name asks for."""
    chunks = (packs[low : low + chunk] for low in range(0, len(packs), chunk))
    return packed.write_packs(path, chunks, len(packs), datasets=3)


def by_sequence(packs):
    """(source, weight, tokens, trained) of every sequence, with plain loops."""
    found = []
    for one in packs:
        for k, (a, b) in enumerate(pairwise(one["cu_seqlens"].tolist())):
            if b > a:
                source, weight = (one["source"][k], one["weight"][k]) if "source" in packs.dtype.names else (0, 1)
                found.append((int(source), float(weight), b - a, int(one["loss_mask"][a:b].sum())))
    return found


@pytest.mark.parametrize("version", packed.READABLE)
@pytest.mark.parametrize("pack_size", [64, 61])  # 61: the record needs alignment padding
def test_written_packs_are_read_by_plain_numpy_and_by_us(tmp_path, pack_size, version):
    records = records_of(pack_size=pack_size, version=version)
    path = tmp_path / "training.npy"
    split = write(path, records)
    packs = packed.open_packs(path)
    for read in (packs, np.load(path, mmap_mode="r")):
        assert all((read[name] == records[name]).all() for name in records.dtype.names)
        assert read["cu_seqlens"].flags.aligned
    assert not packs.flags.writeable
    content = path.read_bytes()
    tokens = int(records["cu_seqlens"].max(1).sum())
    rows = by_sequence(records)
    assert len(rows) == 200 and {row[0] for row in rows} == ({0, 1, 2} if version > 1 else {0})
    of = [[row for row in rows if row[0] == number] for number in range(3)]
    assert split == {
        "packs": len(records),
        "sequences": 200,
        "tokens": tokens,
        "trained_tokens": int(records["loss_mask"].sum()),
        "weights": {
            "least": min(row[1] for row in rows),
            "most": max(row[1] for row in rows),
            "sequences": pytest.approx(sum(row[1] for row in rows)),
            "tokens": pytest.approx(sum(row[1] * row[3] for row in rows)),
        },
        "datasets": [
            {"sequences": len(some), "tokens": sum(r[2] for r in some), "trained_tokens": sum(r[3] for r in some)}
            for some in of
        ],
        "fill": round(tokens / (len(records) * pack_size), 6),
        "file": "training.npy",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["training.npy"]


def test_an_empty_file_and_a_single_pack(tmp_path):
    dtype = packed.pack_dtype(8, 2)
    with packed.PackWriter(tmp_path / "none.npy", 0, dtype):
        pass
    assert packed.open_packs(tmp_path / "none.npy").shape == (0,)
    with packed.PackWriter(tmp_path / "one.npy", 1, dtype) as writer:
        writer.write(np.ones(1, dtype))
    assert packed.open_packs(tmp_path / "one.npy")["input_ids"].tolist() == [[1] * 8]


@pytest.mark.parametrize("announced", [1, 3])
@pytest.mark.parametrize("kind", [packed.PackWriter, packed.ParquetWriter])
def test_the_wrong_number_of_packs_leaves_no_file(tmp_path, announced, kind):
    dtype = packed.pack_dtype(8, 2)
    with (
        pytest.raises(ValueError, match=f"2 packs written, {announced} announced"),
        kind(tmp_path / "a.idx.parquet", announced, dtype) as writer,
    ):
        writer.write(np.ones(2, dtype))
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ValueError, match="for a file of"),
        kind(tmp_path / "a.idx.parquet", 1, dtype) as writer,
    ):
        writer.write(np.ones(1, packed.pack_dtype(9, 2)))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path, dtype = tmp_path / "a.npy", packed.pack_dtype(8, 2)
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), packed.PackWriter(path, 1, dtype) as writer:
        writer.write(np.ones(1, dtype))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("direct", ["", "refused when switched on", "refused in every write"])
def test_what_is_written_in_pieces_is_all_there(tmp_path, monkeypatch, direct, threads):
    """Also on file systems that take no direct writes, and those that say so late."""
    monkeypatch.setattr(files.AtomicFile, "BLOCK", 4096)
    fcntl_, write_, direct_on = fcntl.fcntl, os.write, set()

    def fcntl_of_the_file_system(fd, command, *flags):
        if command == fcntl.F_SETFL and direct:
            if flags[0] & os.O_DIRECT:
                if direct == "refused when switched on":
                    raise OSError(errno.EINVAL, "no direct writes here")
                direct_on.add(fd)
            else:
                direct_on.discard(fd)
            return 0
        return fcntl_(fd, command, *flags)

    def write_of_the_file_system(fd, data):
        if fd in direct_on:
            raise OSError(errno.EINVAL, "no direct writes here")
        return write_(fd, data)

    monkeypatch.setattr(fcntl, "fcntl", fcntl_of_the_file_system)
    monkeypatch.setattr(os, "write", write_of_the_file_system)
    random = np.random.default_rng(0)
    pieces = [random.bytes(int(size)) for size in random.integers(0, 20_000, 20)]
    with files.AtomicFile(tmp_path / "a", threads) as file:
        for piece in pieces:
            file.write(piece)
    whole = b"".join(pieces)
    assert (tmp_path / "a").read_bytes() == whole
    assert (file.bytes, file.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path):
    code = f"""if True:
        import os, signal, numpy as np
        from nemotron_sft.data import packed
        from nemotron_sft import files
        dtype = packed.pack_dtype(8, 2)
        files.AtomicFile.BLOCK = 16  # bytes, so that most of what is written is in the file
        with packed.PackWriter({str(tmp_path / "a.npy")!r}, 2, dtype) as writer:
            writer.write(np.ones(1, dtype))
            os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == [".a.npy.tmp"] and (tmp_path / ".a.npy.tmp").stat().st_size > 100
    with pytest.raises(UserError, match="no packed data"):
        packed.open_packs(tmp_path / "a.npy")
    dtype = packed.pack_dtype(8, 2)
    with packed.PackWriter(tmp_path / "a.npy", 2, dtype) as writer:  # takes the leftover over
        with pytest.raises(UserError, match="another run"), files.AtomicFile(tmp_path / "a.npy"):
            pass
        writer.write(np.full(2, 7, dtype))
    assert packed.open_packs(tmp_path / "a.npy")["input_ids"].sum() == 2 * 8 * 7


@pytest.mark.parametrize("keep", [0, 4, 40, 150, -1])
def test_truncated_files_are_refused_in_one_line(tmp_path, keep):
    path = tmp_path / "training.npy"
    records = records_of()
    write(path, records)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"training\.npy") as error:
        packed.open_packs(path)
    assert "\n" not in str(error.value)
    if keep == -1:
        assert "truncated" in str(error.value)


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.npy"
    whole = records_of()
    wide = np.zeros(3, [("input_ids", "<i8", 64), ("loss_mask", "u1", 64), ("cu_seqlens", "<i4", 9)])
    odd = np.zeros(3, [("input_ids", "<i4", 64), ("loss_mask", "u1", 63), ("cu_seqlens", "<i4", 9)])
    short = np.zeros(3, packed.pack_dtype(64, 8).descr[:4])
    cases = [
        (lambda: np.save(path, np.zeros(3)), "not packs"),
        (lambda: np.save(path, wide), "not packs"),
        (lambda: np.save(path, odd), "not packs"),
        (lambda: np.save(path, short), "not packs"),
        (lambda: np.save(path, whole.reshape(1, -1)), "not packs"),
        (lambda: np.save(path, np.array([{"input_ids": [1]}], object)), "pickled"),
        (lambda: path.write_text("hello"), "no .npy file"),
        (lambda: write(path, whole) and path.write_bytes(path.read_bytes() + b"x"), "longer"),
    ]
    for make, message in cases:
        make()
        with pytest.raises(UserError, match=message) as error:
            packed.open_packs(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(UserError, match="no packed data"):
        packed.open_packs(tmp_path)


def test_metadata_round_trip_and_its_errors(tmp_path):
    metadata = {"format": packed.FORMAT, "version": packed.VERSION, "z": np.int64(3), "a": np.float32(0.5)}
    packed.write_metadata(tmp_path, metadata)
    assert list(packed.read_metadata(tmp_path).items()) == [*list(metadata.items())[:2], ("z", 3), ("a", 0.5)]
    assert [p.name for p in tmp_path.iterdir()] == ["metadata.json"]
    for text, message in (
        ('{"format": "nemotron-sft-packed", "version": 3}', "version"),
        ("[]", "version"),
        ("{", "no JSON"),
    ):
        (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(UserError, match=message):
            packed.read_metadata(tmp_path)
    with pytest.raises(UserError, match="not a finished output"):
        packed.read_metadata(tmp_path / "nowhere")


def test_parquet_has_bridges_schema_and_reads_back(tmp_path):
    import pyarrow.parquet as pq

    records = records_of()
    path = tmp_path / "training.idx.parquet"
    split = write(path, records, chunk=100)
    content = path.read_bytes()
    assert (split["bytes"], split["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    types = [str(field.type.value_type) for field in pq.read_schema(path)]
    assert (pq.read_schema(path).names, types) == (
        ["input_ids", "loss_mask", "seq_start_id"], ["int32", "int8", "int32"],
    )  # fmt: skip
    write(tmp_path / "a.npy", records)
    for index in range(len(records)):
        ids, mask, cu = packed.read_pack(tmp_path / "a.npy", index)
        kept = np.diff(records[index]["cu_seqlens"]) > 0
        source, weight = packed.read_sequences(tmp_path / "a.npy", index)
        assert source.tolist() == records[index]["source"][kept].tolist()
        assert weight.tolist() == records[index]["weight"][kept].tolist()
        assert packed.read_sequences(path, index) is None
        same_ids, same_mask, same_cu = packed.read_pack(path, index)
        mask[cu[:-1]] = 0  # Bridge's schema has no place for it
        assert ids.tolist() == same_ids.tolist() and cu.tolist() == same_cu.tolist()
        assert mask.tolist() == same_mask.tolist()
    for row in pq.read_table(path).to_pylist():
        ends = [*row["seq_start_id"][1:], len(row["input_ids"])]
        assert not any(row["loss_mask"][end - 1] for end in ends)  # what follows is of another sequence
    for name in ("a.npy", "training.idx.parquet"):
        with pytest.raises(UserError, match=f"no pack {len(records)} in"):
            packed.read_pack(tmp_path / name, len(records))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="no whole Parquet file"):
        packed.read_pack(path, 0)
    with pytest.raises(ValueError, match=r"\.idx\.parquet"):
        write(tmp_path / "a.parquet", records)


def test_a_failed_parquet_write_leaves_no_file(tmp_path):
    records = records_of()
    with (
        pytest.raises(KeyboardInterrupt),
        packed.ParquetWriter(tmp_path / "a.idx.parquet", len(records), records.dtype) as writer,
    ):
        writer.write(records)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


BRIDGE = """
import json, sys
from nemotron_sft.train.start import start_bridge
start_bridge()
from types import SimpleNamespace
from megatron.bridge.data.packing.parquet import GPTSFTPackedParquetDataset as Dataset
path, pack_size, eos = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# the prompt template is demanded, and not used
dataset = Dataset(path, SimpleNamespace(eos_id=eos), max_seq_length=pack_size, pad_to_max_length=True,
                  prompt_template="{text} {output}", label_key="output")
rows = [dataset[i] for i in range(len(dataset))]
for i, row in enumerate(rows):
    starts = row["seq_boundaries"][:-1]
    Dataset.validate_row(i, row["input_ids"], row["loss_mask"], starts)
batch = dataset.collate_fn(rows)
names = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q")
print(json.dumps({name: batch[name].tolist() for name in names}))
"""


@pytest.mark.slow
def test_stock_bridge_collates_our_parquet_into_what_the_packs_say(tmp_path):
    """Element by element: Bridge's batch against one built from the token-aligned packs with plain loops."""
    pack_size = 64
    records = records_of(pack_size=pack_size)
    path = tmp_path / "training.idx.parquet"
    write(path, records)
    result = subprocess.run(
        [sys.executable, "-c", BRIDGE, str(path), str(pack_size), str(PAD)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    batch = SimpleNamespace(**json.loads(result.stdout.splitlines()[-1]))
    assert len(batch.tokens) == len(records)
    for row, record in enumerate(records):
        tokens, labels, mask, positions, boundaries = [], [], [], [], [0]
        cu = record["cu_seqlens"].tolist()
        for low, high in pairwise(cu):
            if high == low:
                continue
            tokens += record["input_ids"][low : high - 1].tolist()
            labels += record["input_ids"][low + 1 : high].tolist()
            mask += record["loss_mask"][low + 1 : high].tolist()  # the loss belongs to the label's token
            positions += range(high - low - 1)
            boundaries.append(len(tokens))
        space = pack_size - len(tokens)
        assert batch.tokens[row] == tokens + [PAD] * space
        assert batch.labels[row] == labels + [PAD] * space
        assert batch.loss_mask[row] == mask + [0] * space
        assert batch.position_ids[row] == positions + [0] * space
        theirs = batch.cu_seqlens_q[row]
        assert theirs[: len(boundaries)] == boundaries
        assert set(theirs[len(boundaries) :]) <= {pack_size}


def test_the_example_in_the_documentation_runs(tmp_path):
    text = (ROOT / "docs" / "format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    records = records_of()
    write(tmp_path / "training.npy", records)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lengths = [int(line.split()[0]) for line in result.stdout.splitlines() if "trained" in line]
    assert lengths == np.diff(records["cu_seqlens"][0]).tolist()
