"""Sources: every kind of file and place gives the same records, and pieces neither lose nor repeat any."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hub import COMMIT, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_sft.data import reading, sources
from nemotron_sft.data.blend import Dataset
from nemotron_sft.errors import UserError
from nemotron_sft.paths import ROOT

RECORDS = [
    {
        "messages": [{"role": "user", "content": f"n° {i}" * (i % 7)}, {"role": "assistant", "content": "x"}],
        "n": i,
    }
    for i in range(257)
]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write(path, data=JSONL):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_all(files, piece_bytes=1 << 20):
    return [
        record
        for file in files
        for piece in reading.pieces(file, piece_bytes)
        for _, record in reading.read(piece, ["messages", "n"])
    ]


def find(path, **fields):
    return sources.find(Dataset(name="d", path=str(path), **fields))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonlines", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst", "array.json", "a.parquet"]
)
def test_formats(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=100)
    elif name == "array.json":
        path.write_text(json.dumps(RECORDS))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(JSONL))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(JSONL))
    else:
        path.write_bytes(JSONL)
    files = find(path)
    assert read_all(files) == RECORDS
    pieces = reading.pieces(files[0], 1000)
    assert len(pieces) == {"a.parquet": 3, "array.json": 1}.get(name, 1 if "z" in name else -(-len(JSONL) // 1000))
    assert read_all(files, 1000) == RECORDS
    whole = list(reading.read(reading.whole(files[0]), ["messages", "n"]))
    assert [record for _, record in whole] == RECORDS
    for wanted in (0, 1, 150, 256):  # a position leads back to its line
        assert reading.locate(files[0], whole[wanted][0]) == f"{path}:{wanted + 1}"


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(1, 200),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
)
def test_pieces_cover_each_line_once(tmp_path_factory, sizes, piece_bytes, newline, closed):
    lines = [json.dumps({"n": i, "x": "y" * size}).encode() for i, size in enumerate(sizes)]
    data = newline.join(lines) + (newline if closed and lines else b"")
    path = write(tmp_path_factory.mktemp("pieces") / "a.jsonl", data)
    assert [record["n"] for record in read_all(find(path), piece_bytes)] == list(range(len(sizes)))


def test_byte_order_mark(tmp_path):
    assert read_all(find(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + JSONL))) == RECORDS


def test_parquet_nulls_are_absent_keys(tmp_path):
    rows = [
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}], "tools": None},
        {"messages": [{"role": "user", "content": "b"}], "tools": [{"type": "function"}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (piece,) = reading.pieces(find(tmp_path / "a.parquet")[0], 1)
    assert [record for _, record in reading.read(piece, ["messages", "tools"])] == [
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "user", "content": "b"}], "tools": [{"type": "function"}]},
    ]


def test_places(tmp_path, monkeypatch):
    write(tmp_path / "d/train-00000-of-00002.jsonl")
    write(tmp_path / "d/sub/train-00001-of-00002.jsonl.gz", gzip.compress(JSONL))
    write(tmp_path / "d/validation.jsonl", b'{"n": -1}\n')
    write(tmp_path / "d/.hidden.jsonl", b"junk")
    write(tmp_path / "d/notes.txt", b"junk")
    assert read_all(find(tmp_path / "d", split="train")) == RECORDS * 2
    assert read_all(find(tmp_path / "d")) == RECORDS * 2
    assert read_all(find(tmp_path / "d/*.jsonl", split="train")) == [*RECORDS, {"n": -1}]
    assert read_all(find(tmp_path / "d/**/*.gz")) == RECORDS
    assert read_all(find((tmp_path / "d/train-00000-of-00002.jsonl").as_uri())) == RECORDS
    assert read_all(find((tmp_path / "d").as_uri(), split="train")) == RECORDS * 2
    assert read_all(find((tmp_path / "d").as_uri() + "/*.jsonl"), 999) == [*RECORDS, {"n": -1}]
    monkeypatch.chdir(tmp_path)
    assert read_all(find("d/train-00000-of-00002.jsonl")) == RECORDS
    assert find("data/tiny/train.jsonl")[0].path == str(ROOT / "data/tiny/train.jsonl")


def test_web_server(monkeypatch):
    with serving({"org/x": {"a.jsonl": JSONL}}) as server:
        (file,) = find(f"{server.url}/plain/org/x/a.jsonl")
        assert file.bytes == len(JSONL) and read_all([file], 5000) == RECORDS
        assert any(wanted for _, _, wanted in server.requests), "pieces are read by range, not from the start"


CARD = b"""---
configs:
- config_name: chat
  default: true
  data_files:
  - {split: chat_if, path: data/chat_if.jsonl}
  - {split: tools.part_00, path: "data/tools/*.parquet"}
- config_name: other
  data_files: data/other.jsonl
---
# A dataset
"""
NAMES = [
    "README.md",
    "data/chat_if.jsonl",
    "data/other.jsonl",
    "data/tools/a.parquet",
    "data/tools/b.parquet",
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"split": "chat_if"}, ["data/chat_if.jsonl"]),
        ({"subset": "chat_if"}, ["data/chat_if.jsonl"]),  # seen in the wild: a split given as subset
        ({"subset": "chat", "split": "tools.part_00"}, ["data/tools/a.parquet", "data/tools/b.parquet"]),
        ({"subset": "other"}, ["data/other.jsonl"]),
        ({"subset": "other", "split": "train"}, ["data/other.jsonl"]),
        ({"split": "tools"}, ["data/tools/a.parquet", "data/tools/b.parquet"]),  # by path, past the card
        ({}, "say which split of p: chat_if, tools.part_00"),
        ({"split": "math"}, "no math in p; there is chat, chat_if, other, tools.part_00, train"),
    ],
)
def test_choice_by_card(fields, expected):
    dataset = Dataset(name="d", path="p", **fields)
    if isinstance(expected, list):
        assert sources.select(NAMES, sources._card(CARD.decode()), dataset, hub=True) == expected
    else:
        with pytest.raises(UserError, match=expected):
            sources.select(NAMES, sources._card(CARD.decode()), dataset, hub=True)


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (["train.jsonl", "test.jsonl"], {"split": "train"}, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], {}, ["train.jsonl"]),
        (["a.jsonl", "b.jsonl"], {"split": "train"}, ["a.jsonl", "b.jsonl"]),
        (["a.jsonl", "test.jsonl"], {}, ["a.jsonl", "test.jsonl"]),
        (
            ["en/train-0.parquet", "de/train-0.parquet"],
            {"subset": "de", "split": "train"},
            ["de/train-0.parquet"],
        ),
    ],
)
def test_choice_by_name(names, fields, expected):
    assert sources.select(names, {}, Dataset(name="d", path="p", **fields), hub=True) == expected


@pytest.mark.parametrize("other", ["test.jsonl", "dev/a.jsonl", "x-validation-0.parquet", "eval.json"])
def test_a_directory_with_splits_gives_its_training_split_and_says_so(capsys, other):
    names = ["extra.jsonl", other, "train.jsonl"]
    found = sources.select(sorted(names), {}, Dataset(name="d", path="p"), hub=False)
    assert found == ["extra.jsonl", "train.jsonl"]
    assert f"dataset d: 2 of 3 files; without split, {other} is left out" in capsys.readouterr().err


def test_links(tmp_path):
    write(tmp_path / "real/a.jsonl")
    write(tmp_path / "d/b.jsonl", b"")
    (tmp_path / "d/sub").symlink_to(tmp_path / "real")
    (tmp_path / "d/again").symlink_to(tmp_path / "real")
    (tmp_path / "d/circle").symlink_to(tmp_path)
    assert read_all(find(tmp_path / "d")) == RECORDS
    (tmp_path / "d/gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"gone.jsonl: no such file or directory; a broken link"):
        find(tmp_path / "d")


def in_fresh_process(code, server, home):
    """huggingface_hub reads HF_ENDPOINT when it is imported, so each case is a process of its own."""
    setup = "from nemotron_sft.data import reading, sources\nfrom nemotron_sft.data.blend import Dataset\n"
    setup += "from nemotron_sft.errors import UserError\n"
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", setup + code], env=env, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FIND = """
files = sources.find(Dataset(name="d", path="PATH", split="chat_if", revision=REVISION))
rows = [r for f in files for p in reading.pieces(f, 1 << 20) for _, r in reading.read(p, [])]
print(len(rows), files[0].label)
"""


def test_hub_download_resumes_and_is_cached(tmp_path):
    big = b'{"n": "%s"}\n' % (b"x" * 1000)
    repo = {"README.md": CARD, "data/chat_if.jsonl": big * 25_000, "data/other.jsonl": JSONL}
    with serving({"org/name": repo}, cut_file="data/chat_if.jsonl", cut=21 << 20) as server:
        code = FIND.replace("PATH", "hf://org/name").replace("REVISION", "'v1'")
        for _ in range(2):
            label = f"hf://datasets/org/name@{COMMIT}/data/chat_if.jsonl"
            assert in_fresh_process(code, server, tmp_path) == f"25000 {label}"
        downloads = [wanted for method, path, wanted in server.requests if method == "GET" and "chat_if" in path]
        assert downloads == [None, f"bytes={20 << 20}-"], "one broken download, one resumed, then the cache"
        assert not any("other.jsonl" in path for _, path, _ in server.requests)


def test_hub_errors(tmp_path):
    with serving({"org/name": {"data/chat_if.jsonl": JSONL}}) as server:
        code = "try:\n    sources.find(Dataset(name='d', path='PATH', revision=REVISION))\n"
        code += "except UserError as e:\n    print(e)"
        missing = code.replace("PATH", "org/nothing").replace("REVISION", "None")
        assert f"org/nothing: neither a path here nor a dataset on {server.url}" in in_fresh_process(
            missing, server, tmp_path
        )
        revision = code.replace("PATH", "org/name").replace("REVISION", "'v9'")
        assert "no revision v9" in in_fresh_process(revision, server, tmp_path)
    gone = code.replace("PATH", "org/name").replace("REVISION", "None")
    assert "cannot be fetched" in in_fresh_process(gone, server, tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"n": 1}\n\n{"n": }\n', "a.jsonl:3: not JSON"),
        ("a.jsonl", b'{"n": 1}\n{"n": 2', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"n": 1}\n[1]\n', "a.jsonl:2: list instead of a JSON object"),
        ("a.jsonl", b'{"n": "\xff"}\n', "a.jsonl:1: not JSON"),
        ("a.json", b'[{"n": 1},\n {"n": }]', "a.json:2: not JSON"),
        ("a.json", b"[1]", "a.json:1: int instead of a JSON object"),
        ("a.jsonl", gzip.compress(JSONL), "compressed and not named so"),
        ("a.json", b'{\n "n": 1\n}', "a record is one line, or an element of one JSON array"),
        ("a.jsonl.gz", b"junk", "damaged .gz file"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-20], "damaged .gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n{]\n", mtime=0), "a.jsonl.gz:2: not JSON"),
        ("a.jsonl.zst", b"junk", "damaged .zst file"),
        ("a.parquet", b"junk", "not a whole Parquet file"),
        ("a.txt", b"", "not a data file"),
    ],
)
def test_bad_files(tmp_path, name, data, words):
    with pytest.raises(UserError) as caught:
        read_all(find(write(tmp_path / name, data)), 5)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing.jsonl", "no such file or directory: nothing.jsonl"),
        ("some/nothing.jsonl", "no such file or directory: some/nothing.jsonl"),
        ("no/*.jsonl", r"no file matches no/\*.jsonl"),
        ("bogus://x/y.jsonl", "cannot list bogus://x/y.jsonl"),
    ],
)
def test_nothing_there(path, words):
    with pytest.raises(UserError, match=words):
        find(path)
