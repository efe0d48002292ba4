"""Every shape that data comes in gives the same records, and damage is a drop or one line, never silence."""

import gzip
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data import reading, sources
from nemotron_sft.data.blend import Dataset
from nemotron_sft.data.jsontext import NotJSON, loads
from nemotron_sft.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOOLS = [{"name": "f", "parameters": {"properties": {"x": {"type": ["integer", "null"], "default": None}}}}]
ROWS = [{"messages": CHAT, "tools": TOOLS, "n": 1}, {"messages": CHAT, "tools": [{"name": "g"}], "n": 2}, {"n": 3}]


def records(path, columns=None, bad=None, piece_bytes=1 << 20, **entry):
    files = sources.find(Dataset(name="d", path=str(path), **entry))
    return [
        record
        for file in files
        for piece in reading.pieces(file, piece_bytes)
        for _, record in reading.read(piece, columns, bad)
    ]


def json_array(values):
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))


def test_the_json_type_of_hugging_face_datasets(tmp_path):
    """As a column, inside lists and inside structs; null inside the JSON is the data's own."""
    column = json_array([row.get("tools") for row in ROWS])
    flat = json_array([*TOOLS, *ROWS[1]["tools"]])
    listed = pa.ListArray.from_arrays(pa.array([0, 1, 2, 2]), flat)
    nested = pa.StructArray.from_arrays([json_array([{"a": None}, [2], 3])], ["inner"])
    pq.write_table(
        pa.table({"column": column, "listed": listed, "nested": nested, "n": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    first, second, third = records(tmp_path / "a.parquet")
    assert first == {"column": TOOLS, "listed": TOOLS, "nested": {"inner": {"a": None}}, "n": 1}
    assert second["column"] == second["listed"] == [{"name": "g"}] and second["nested"] == {"inner": [2]}
    assert third == {"listed": [], "nested": {"inner": 3}, "n": 3}


def test_maps_bytes_and_null_keys(tmp_path):
    kinds = {
        "m": pa.map_(pa.string(), pa.list_(pa.struct([("a", pa.int64()), ("b", pa.string())]))),
        "by": pa.binary(), "big": pa.uint64(), "d": pa.dictionary(pa.int32(), pa.string()),
    }  # fmt: skip
    rows = {
        "m": [[("x", [{"a": 1, "b": None}])], [("y", None)]],
        "by": ["é".encode(), b"\xff"],
        "big": [2**64 - 1, 0],
        "d": ["u", None],
    }
    table = pa.table({name: pa.array(values, kinds[name]) for name, values in rows.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    drops = []
    assert records(tmp_path / "a.parquet", bad=lambda *about: drops.append(about)) == [
        {"m": {"x": [{"a": 1}]}, "by": "é", "big": 2**64 - 1, "d": "u"}
    ]
    assert [drop[:2] for drop in drops] == [(1, "not JSON")] and "not UTF-8" in drops[0][2]
    with pytest.raises(UserError, match=r"a\.parquet:2: .*not UTF-8"):
        records(tmp_path / "a.parquet")


@pytest.mark.parametrize("footed", [False, True])
def test_arrow_files(tmp_path, footed):
    table = pa.table({"n": list(range(5000)), "s": [str(i) for i in range(5000)], "none": pa.nulls(5000)})
    with (pa.ipc.new_file if footed else pa.ipc.new_stream)(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    expected = [{"n": i, "s": str(i)} for i in range(5000)]
    assert records(tmp_path / "a.arrow") == expected
    assert records(tmp_path / "a.arrow", ["s"], piece_bytes=9000) == [{"s": row["s"]} for row in expected]
    (file,) = sources.find(Dataset(name="d", path=str(tmp_path / "a.arrow")))
    assert len(reading.pieces(file, 9000)) > 3
    for piece in reading.pieces(file, 9000):
        for position, record in reading.read(piece, None):
            assert position == record["n"]
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"a\.arrow: not a whole Arrow file"):
        records(tmp_path / "a.arrow")


def test_what_datasets_saves_caches_and_clones(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train, test = (datasets.Dataset.from_list([{"messages": CHAT, "n": n}]) for n in (1, 2))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert records(tmp_path / "one") == [{"messages": CHAT, "n": 1}]
    assert records(tmp_path / "two") == [{"messages": CHAT, "n": 1}], "like a hub dataset: its training split"
    assert records(tmp_path / "two", split="test") == [{"messages": CHAT, "n": 2}]
    (tmp_path / "one/cache-0123.arrow").write_bytes(b"a result of map(), not data")
    assert records(tmp_path / "one") == [{"messages": CHAT, "n": 1}]

    clone = tmp_path / "clone"
    for hidden in (".git/lfs/x", ".cache/huggingface", "data/.ipynb_checkpoints", "data/_delta_log", "__MACOSX/data"):
        (clone / hidden).mkdir(parents=True)
        (clone / hidden / "train.jsonl").write_text('{"n": -1}\n')
    for info in ("dataset_infos.json", "data/dataset_info.json", "state.json"):
        (clone / info).write_text('{\n "default": {}}')
    (clone / "data/train.jsonl").write_text('{"n": 1}\n')
    (clone / "data/test.jsonl").write_text('{"n": 2}\n')
    assert records(clone) == records(clone.as_uri(), split="train") == [{"n": 1}]
    assert records(f"{clone}/**/*.json*") == [{"n": 2}, {"n": 1}]
    (clone / "data/train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (clone / "data/train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    for name in ("train.jsonl", "train.parquet"):
        with pytest.raises(UserError, match="a Git LFS pointer instead of the data"):
            records(clone / "data" / name, bad=lambda *about: None)


def test_a_relative_path_counts_from_the_blends_folder_first(tmp_path, monkeypatch):
    for folder, n in (("blend", 1), ("work", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(json.dumps({"n": n}))
    (tmp_path / "work/b.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "work")
    found = {
        path: sources.find(Dataset(name="d", path=path), base=tmp_path / "blend")[0].path
        for path in ("a.jsonl", "b.jsonl", "*.jsonl", "data/tiny/train.jsonl")
    }
    assert found["a.jsonl"] == found["*.jsonl"] == str(tmp_path / "blend/a.jsonl")
    assert found["b.jsonl"] == "b.jsonl" and found["data/tiny/train.jsonl"].endswith("data/tiny/train.jsonl")


LINES = b"".join(json.dumps({"n": i, "text": "x" * 50}).encode() + b"\n" for i in range(3000))


def frames(data, parts):
    size = -(-len(data) // parts)
    return b"".join(zstandard.compress(data[low : low + size]) for low in range(0, len(data), size))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", frames(LINES, 7)),
        ("a.jsonl.zst", frames(LINES, 2) + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"),  # a frame to be skipped
    ],
)
def test_compressed_files_are_read_to_their_end_or_refused(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert [record["n"] for record in records(path)] == list(range(3000))
    for cut in (1, 9, len(data) // 2):
        path.write_bytes(data[:-cut])
        if b"abc" in data and cut == 1:
            continue  # nothing that counts is missing
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            records(path)


@pytest.mark.parametrize("array", [False, True])
def test_what_pythons_json_writes(tmp_path, array):
    rows = [
        {"score": float("nan"), "other": float("-inf")},
        {"text": "\ud83d and \udc00", "pair": "😀"},
        {"n": [2**63, 2**64, -(2**63) - 1, -(2**70), 10**40], "text": "12345678901234567890123"},
        {"x": 1e300, "y": 0.1234567890123456789, "z": 12345678901234567890.5},
    ]
    text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert repr(records(tmp_path / "a.json")) == repr(rows)


scalars = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats()
any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates among it


@settings(max_examples=150)
@given(st.recursive(scalars | any_text, lambda inner: st.lists(inner) | st.dictionaries(any_text, inner), max_leaves=8))
def test_loads_is_exact(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        data = text.encode("utf-8", "surrogatepass")
        assert repr(loads(data)) == repr(json.loads(text)) == repr(loads(b"\xef\xbb\xbf" + data))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "at character 2"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "Exceeds the limit"),
        (b'{"a": 1,\n "b": }', "at character 7"),
    ],
)
def test_not_json(text, words):
    with pytest.raises(NotJSON, match=words):
        loads(text)


def collect(drops, *about):
    drops.append(about)


def test_malformed_lines_are_told_with_their_place(tmp_path):
    """In the plain file and the compressed one, wherever the pieces are cut."""
    lines = [b'{"n": 1}', b'{"n": }', b"", b"[2]", b'{"n": "\xff"}', b"null", b'{"n": 6}', b"{" * 5000]
    for name, data in (("a.jsonl", b"\n".join(lines)), ("a.jsonl.gz", gzip.compress(b"\n".join(lines)))):
        (tmp_path / name).write_bytes(data)
        (file,) = sources.find(Dataset(name="d", path=str(tmp_path / name)))
        for size in (1, 12, 1 << 20):
            drops = []
            found = records(tmp_path / name, bad=partial(collect, drops), piece_bytes=size)
            assert [record["n"] for record in found] == [1, 6]
            assert [(reading.locate(file, position).rpartition(":")[2], reason) for position, reason, _ in drops] == [
                ("2", "not JSON"), ("4", "not an object"), ("5", "not JSON"), ("6", "not an object"), ("8", "not JSON"),
            ]  # fmt: skip


@pytest.mark.parametrize("before", range(7))
def test_long_numbers_are_exact_wherever_they_stand(before):
    text = b" " * before + b"[18446744073709551616]"
    assert loads(text) == [2**64]


@pytest.mark.parametrize("layout", ["array", "indented", "elements a line", "a list a line", "a list a line, more"])
def test_conversations_without_a_key_are_messages(tmp_path, layout):
    lists = [[{"role": "user", "content": f"[{i}]\n"}, {"role": "assistant", "content": "a"}] for i in range(3)]
    lines = [json.dumps(each) for each in lists]
    text = {
        "array": json.dumps(lists),
        "indented": json.dumps(lists, indent=1),
        "elements a line": "[" + ",\n".join(lines) + "\n]\n",
        "a list a line": "\n".join(lines),
        "a list a line, more": "\ufeff" + "\r\n\r\n".join([*lines, '["x"]', "[]"]) + "\n",
    }[layout]
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(text.encode())
        for piece_bytes in (50, 1 << 20):
            bad = []
            found = records(tmp_path / name, bad=lambda *about: bad.append(about[1:]), piece_bytes=piece_bytes)  # noqa: B023
            assert found == [{"messages": each} for each in lists]
            assert bad == [("not an object", "list instead of a JSON object")] * (2 if "more" in layout else 0)
