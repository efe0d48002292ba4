"""The documentation: its links lead somewhere, its commands are spelled alike, and what it tells is what happens."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pkgutil import resolve_name

import pytest
from conftest import composed

from nemotron_sft import app
from nemotron_sft.config import Prep, check
from nemotron_sft.paths import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
COMMAND = re.compile(r"python recipes/(prep|train)\.py ([^#`\n]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_spelled_alike_and_name_keys_that_exist(page):
    text = page.read_text()
    assert not re.search(r"(?<!\w)(python3|\.venv/bin/python|\$ recipes/)", text), "say: python"
    for name, line in COMMAND.findall(text.replace("\\\n", " ")):
        for word in re.findall(r"(?:^|\s)(\w+)=(\w+)(?=\s|$)", line):
            if word[0] in app.groups(name) and word[1].islower() and word[1] not in ("mine", "pyxis"):
                assert word[1] in app.options(word[0]), f"{page.name}: {'='.join(word)}"
            assert word[0] in [*app.own_keys(name), "data"], f"{page.name}: {word[0]}"


def path_of_a_message() -> list[str]:
    """The functions in docs/index.md's table, in its order."""
    section = (ROOT / "docs/index.md").read_text().split("## The path of a message")[1].split("\n## ")[0]
    return re.findall(r"`(nemotron_sft\.[\w.]+)`", section)


def called(during: Iterator) -> list[str]:
    """The functions of this package that run while the iterator does, each call or resumption of one."""
    calls = []

    def note(frame, event, _):
        if event == "call" and (module := frame.f_globals.get("__name__", "")).startswith("nemotron_sft."):
            calls.append(f"{module}.{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        for _ in during:
            pass
    finally:
        sys.setprofile(None)
    return calls


def test_the_path_of_a_message(tmp_path):
    from nemotron_sft.data import prep
    from nemotron_sft.train.batches import PackedDataset

    path = path_of_a_message()
    rooms = [name.split(".")[1] for name in path]
    assert rooms == sorted(rooms, key=["data", "train"].index), "a room is entered twice"
    for name in path:
        assert callable(resolve_name(name)), name
    config = check(composed("prep", "sample=30", "workers=1", f"output_dir={tmp_path / 'out'}"), Prep)

    def through() -> Iterator:
        yield prep.run(config)
        data = PackedDataset(tmp_path / "out/training.npy", 4, seed=1)
        yield data.collate_fn(data.__getitems__([0, 1]))

    calls = iter(called(through()))
    megatron = ("packed_dataset_provider", "ForwardStep.__call__")  # called with Megatron alone: see tests/train
    for name in path:
        if not name.endswith(megatron):
            assert name in calls, f"{name} was not called, or not in this order"  # takes what comes before it


@pytest.mark.slow
def test_the_tutorial(tmp_path):
    """Its commands as they stand, in a fresh directory that has nothing but the recipes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = os.environ | {
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    told = ""
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.M | re.S):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        told += done.stdout
    assert told.rstrip().endswith("Tokyo")
    assert "100 │  100 │       0" in told and "right answers, " in told


def test_troubleshooting_quotes_messages_that_exist():
    sources = "".join(path.read_text() for path in (ROOT / "nemotron_sft").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # texts that go on in the next line
    quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 30
    for message in quoted:
        for part in filter(str.strip, message.split("...")):
            assert part in sources, f"{message!r}: no message has {part!r}"
