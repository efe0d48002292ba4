"""The report on real packs: the tiny chat data, tokenized, packed, and read back from the page."""

import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from nemotron_sft.data import report
from nemotron_sft.data.chat import load_template
from nemotron_sft.data.packed import empty_packs, open_packs, pack_dtype, read_metadata, write_metadata, write_packs
from nemotron_sft.data.packing import members, pack
from nemotron_sft.data.tokens import load_tokenizer, tokenize
from nemotron_sft.errors import UserError

TINY = ROOT / "data" / "tiny"
PACK_SIZE = 512
ODD = {"role": "assistant", "content": "<b>größer</b> & 你好 🙂\n«done»"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY / "tokenizer"), backend="tokenizers")


def make_output(directory: Path, tokenizer, name="training.npy", records=60) -> dict:
    """Pack the first records of the tiny data, and one with odd characters, into an output directory."""
    with open(TINY / "train.jsonl") as lines:
        chats = [json.loads(next(lines))["messages"] for _ in range(records)]
    chats.append([{"role": "user", "content": "<script>alert(1)</script>"}, ODD])
    template = load_template("nano3")
    ids, mask, offsets = tokenize(tokenizer, [s for chat in chats for s in template.sequences(chat)])
    lengths = np.diff(offsets)
    order, bounds = members(pack(lengths, PACK_SIZE))
    packs = empty_packs(len(bounds) - 1, pack_dtype(PACK_SIZE, int(np.diff(bounds).max())))
    packs["input_ids"] = tokenizer.pad_id
    for record, low, high in zip(packs, bounds, bounds[1:], strict=False):
        place = 0
        for number, k in enumerate(order[low:high]):
            record["input_ids"][place : place + lengths[k]] = ids[offsets[k] : offsets[k + 1]]
            record["loss_mask"][place : place + lengths[k]] = mask[offsets[k] : offsets[k + 1]]
            place += lengths[k]
            record["cu_seqlens"][number + 1 :] = place
    directory.mkdir(exist_ok=True)
    split = write_packs(directory / name, [packs], len(packs))
    nothing = dict.fromkeys(("packs", "sequences", "tokens", "trained_tokens", "fill", "bytes"), 0)
    edges = [0, 64, 128, 256, 512, 1024]
    common = {name: split[name] for name in ("sequences", "tokens", "trained_tokens")}
    common |= {"records_read": 61, "records_kept": 60, "truncated": 2}
    drops = {"no messages": {"count": 3, "first": "a.jsonl:17", "detail": "no messages"}}
    metadata = {
        "format": "nemotron-sft-packed",
        "version": 1,
        "pack_size": PACK_SIZE,
        "format_on_disk": "npy",
        "tokenizer": {
            "model": tokenizer.name, "revision": None, "digest": tokenizer.digest, "backend": "tokenizers",
            "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id,
        },
        "template": {"name": "nano3", "mask": "assistant", "digest": template.digest},
        "blend": {"name": "demo", "datasets": [
            {"name": "<i>chat</i>", "path": "a.jsonl", "weight": 1.0, **common, "dropped": drops,
             "requested_share": 0.75, "realised_share": 0.7},
            {"name": "code [v2]", "path": "b.jsonl", "weight": 0.25, **common, "dropped": {},
             "requested_share": 0.25, "realised_share": 0.3},
        ]},
        "splits": {"training": split, "validation": {**nothing, "file": None, "sha256": None}},
        "lengths": {"edges": edges, "counts": [*np.histogram(lengths, edges)[0].tolist()[:-1], 4]},
        "seed": 1, "code_version": "0", "fingerprint": "abc", "wall_seconds": 1.5, "tokens_per_second": 12345,
    }  # fmt: skip
    write_metadata(directory, metadata)
    return metadata


class Page(HTMLParser):
    """Reads the report: tags, links to elsewhere, and each sequence's runs as (text, trained)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.sequences, self.styles = [], [], [], []
        self.text = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "data")]
        if tag == "p":
            self.text = attributes.get("class") == "text"
            if self.text:
                self.sequences.append([])
        if tag == "span" and self.text:
            self.styles.append(attributes["class"])
        if tag == "em":
            self.styles.append("sign")

    def handle_endtag(self, tag):
        if tag == "p":
            self.text = False
        if (tag == "span" and self.text) or tag == "em":
            self.styles.pop()

    def handle_data(self, data):
        if self.text and self.styles[-1:] != ["sign"]:
            self.sequences[-1].append((data, "t" in self.styles))


def texts(directory, tokenizer, index):
    """(whole text, trained text) of every sequence of a pack."""
    record = open_packs(directory / "training.npy")[index]
    cu = record["cu_seqlens"]
    result = []
    for low, high in pairwise(cu):
        if high > low:
            ids, mask = record["input_ids"][low:high], record["loss_mask"][low:high].astype(bool)
            result.append((tokenizer.decode(ids), tokenizer.decode(ids[mask])))
    return result


def test_the_page_shows_the_packs_as_they_are(tmp_path, tokenizer):
    metadata = make_output(tmp_path, tokenizer)
    report.write_report(tmp_path, metadata)
    packs = np.unique(np.linspace(0, metadata["splits"]["training"]["packs"] - 1, report.SHOWN_PACKS).round())
    expected = [pair for index in packs for pair in texts(tmp_path, tokenizer, int(index))]
    page = Page((tmp_path / "report.html").read_text())
    shown = [
        ("".join(text for text, _ in runs), "".join(text for text, trained in runs if trained))
        for runs in page.sequences
    ]
    assert len(expected) > 10 and shown == expected


def test_the_page_stands_alone_and_escapes_what_it_quotes(tmp_path, tokenizer):
    metadata = make_output(tmp_path, tokenizer, records=0)
    report.write_report(tmp_path, metadata)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.links == [] and not re.search(r"https?:|url\(|@import", text)
    assert "script" not in page.tags and "i>chat" not in text.replace("&lt;i&gt;chat", "")
    shown = "".join(part for runs in page.sequences for part, _ in runs)
    assert "<script>alert(1)</script>" in shown and ODD["content"] in shown
    for value in ("no messages", "a.jsonl:17", "12,345", "75.0% →", "70.0%", "none", "abc"):
        assert value in text
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["metadata.json", "report.html", "training.npy"]


def test_long_packs_are_cut_and_say_so(tmp_path, tokenizer, monkeypatch):
    metadata = make_output(tmp_path, tokenizer)
    monkeypatch.setattr(report, "SHOWN_TOKENS", 100)
    monkeypatch.setattr(report, "SHOWN_PACKS", 1)
    report.write_report(tmp_path, metadata)
    text = (tmp_path / "report.html").read_text()
    whole = texts(tmp_path, tokenizer, 0)
    shown = ["".join(part for part, _ in runs) for runs in Page(text).sequences]
    assert 0 < len(shown) < len(whole)
    assert all(w[0].startswith(s) for w, s in zip(whole, shown, strict=False))
    assert f"and {len(whole) - len(shown)} more sequences" in text


def test_the_tables_name_mix_splits_lengths_and_drops(tmp_path, tokenizer, capsys):
    metadata = make_output(tmp_path, tokenizer)
    report.print_report(metadata)
    text = capsys.readouterr().out
    for value in (
        "<i>chat</i>",
        "75.0%",
        "70.0%",
        "3 x no messages: <i>chat</i>, first at a.jsonl:17",
        "12,345",
    ):
        assert value in text
    training = next(line for line in text.splitlines() if "training" in line)
    assert report.number(metadata["splits"]["training"]["tokens"]) in training
    assert "below     1,024" in text and "a whole pack or more" in text


def test_inspect_marks_trained_text(tmp_path, tokenizer, capsys):
    make_output(tmp_path, tokenizer)
    for path in (tmp_path, tmp_path / "training.npy"):
        report.print_pack(path, 1)
        lines = capsys.readouterr().out.split("\n", 1)
        bodies = re.split(r"sequence \d+: .*─*\n", lines[1])[1:]
        expected = texts(tmp_path, tokenizer, 1)
        assert f"{len(expected)} sequences" in lines[0] and len(bodies) == len(expected)
        for body, (whole, trained) in zip(bodies, expected, strict=True):
            assert re.sub("[«»]", "", body) == whole + "\n"
            assert "".join(re.findall("«(.*?)»", body, flags=re.DOTALL)) == trained


def test_inspect_colours_a_terminal(tmp_path, tokenizer, monkeypatch):
    from rich.console import Console

    make_output(tmp_path, tokenizer, records=0)
    screen = io.StringIO()
    monkeypatch.setattr(
        report,
        "console",
        lambda: Console(file=screen, force_terminal=True, color_system="standard", width=200),
    )
    report.print_pack(tmp_path)
    text = screen.getvalue()
    assert "\x1b[32m<b>größer</b> & 你好 🙂" in text  # green
    assert "\x1b[1;32m<|im_end|>" in text  # bold green: a special token that is trained
    assert "\x1b[90muser" in text and "\x1b[1;90m<|im_start|>" in text  # grey


def test_inspect_reads_parquet(tmp_path, tokenizer, capsys):
    make_output(tmp_path / "npy", tokenizer)
    make_output(tmp_path / "parquet", tokenizer, "training.idx.parquet")
    shown = []
    for path in (tmp_path / "npy", tmp_path / "parquet"):
        report.write_report(path, read_metadata(path))
        report.print_pack(path, 2)
        shown.append(capsys.readouterr().out.split("\n", 1)[1])
    assert shown[0] == shown[1]


def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path, tokenizer):
    metadata = make_output(tmp_path, tokenizer, records=2)
    with pytest.raises(UserError, match="no pack 7"):
        report.print_pack(tmp_path, 7)
    with pytest.raises(UserError, match="not a finished output"):
        report.print_pack(tmp_path / "nowhere")
    metadata["tokenizer"]["digest"] = "0"
    write_metadata(tmp_path, metadata)
    with pytest.raises(UserError, match="has changed since the data was made with it"):
        report.print_pack(tmp_path)
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(UserError, match="not a finished output"):
        report.print_pack(tmp_path / "training.npy")
