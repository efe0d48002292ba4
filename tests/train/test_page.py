"""The page of a run: small however long the run, without references, and nothing in it acts as HTML."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from nemotron_sft.train import charts
from nemotron_sft.train.page import Page, answers, marked, write_page

EVIL = "<script>alert(1)</script><img src=http://x.example onerror=alert(1)>\"'&"


def long_run(path, steps=10_000, datasets=12, prompts=500):
    """A run directory with synthetic lines; returns it."""
    draw = random.Random(0)
    path.mkdir(exist_ok=True)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 8 / math.sqrt(step) + 0.3 * draw.random()
            line = {"step": step, "loss": 1e4 if step == 7_777 else loss, "lr": 1e-4, "grad_norm": draw.random()}
            line |= {"tokens_per_second": 1e5, "mfu": 0.4, "peak_memory_gib": 70.1, "seconds": step * 1.5}
            for i in range(datasets):
                line |= {f"loss/set {i}{EVIL}": loss + i, f"trained_tokens/set {i}{EVIL}": 100 + i}
            file.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "validation_loss": loss, f"score/{EVIL}": 0.5}) + "\n")
    asked = [
        {"step": step, "scores": {EVIL: 0.5}, "answers": [f"{step} {EVIL} " + "word " * 300] * prompts,
         "right": [bool(step)] * prompts}
        for step in (0, steps)
    ]  # fmt: skip
    rows = [{"file": EVIL, "question": EVIL, "answer": {"a": EVIL}, "score": "json"}] * prompts
    files = {EVIL: {"path": EVIL, "prompts": prompts, "chance": 0.0}}
    (path / "heldout.json").write_text(json.dumps({"version": 2, "files": files, "asked": asked, "prompts": rows}))
    (path / "config.yaml").write_text(json.dumps({"model": {"name": EVIL, "x": EVIL}, "init_from": EVIL}))
    (path / "command.txt").write_text(EVIL)
    return path


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_a_long_run_is_a_small_page_of_inert_html(tmp_path):
    page = write_page(long_run(tmp_path))
    html = page.read_text()
    assert page.stat().st_size < 2_000_000
    found = Tags(html)
    assert not found.tags & {"script", "img", "link", "iframe", "object", "base", "form", "a"}
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href", "xlink:href")}
    assert "url(" not in html and "@import" not in html
    assert found.text.count(EVIL) > 20  # all of it is there, as text
    assert "60 of 500 are shown" in found.text and "now right" in found.text


def test_a_run_without_a_step_or_records_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: m}\ninit_from: random\n")
    assert "No step has been logged yet" in write_page(tmp_path).read_text()


def test_what_goes_wrong_with_a_page_ends_no_run(tmp_path):
    said = []
    Page(tmp_path / "gone", 0, said.append).write()
    Page(tmp_path / "gone", 1, said.append).write()
    assert len(said) == 1 and said[0].startswith("report.html: ")


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=3000))
def test_thinned_curves_keep_order_ends_and_extremes(values):
    points = list(enumerate(values))
    thin = charts.thinned(points)
    assert len(thin) <= 2 * charts.POINTS and thin == sorted(thin)
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert {min(values), max(values)} <= {value for _, value in thin}


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50), st.booleans())
@example([5e-324], True)
def test_every_point_and_tick_is_inside_its_chart(values, log):
    chart = charts.chart("c", [charts.Line("l", list(enumerate(values)), dots=True)], log=log)
    if chart is None:
        assert log and max(values) < sys.float_info.min
        return
    numbers = [float(y) for path in chart.paths for y in re.findall(r" ([-\d.]+)", path["d"])]
    assert all(-0.1 <= y <= charts.HEIGHT + 0.1 for y in numbers)
    assert all(-0.1 <= place <= 100.1 for place, _ in chart.x_ticks + chart.y_ticks)


@given(st.text(), st.text())
def test_marked_pieces_are_the_whole_texts(one, other):
    assert ["".join(piece for piece, _ in pieces) for pieces in marked([one, other])] == [one, other]


def test_answers_that_became_wrong_come_first():
    asked = [{"step": 0, "answers": ["a b", "x", "q"], "right": [False, True, False]},
             {"step": 9, "answers": ["a c", "y", "q"], "right": [True, False, False]}]  # fmt: skip
    rows = [{"file": "f", "question": q, "answer": "a c", "score": "exact"} for q in "123"]
    found = answers({"asked": asked, "prompts": rows})
    assert [(row["question"], row["change"]) for row in found] == [
        ("2", "now wrong"),
        ("1", "now right"),
        ("3", "the same"),
    ]
    assert found[1]["given"][1] == (9, True, [("a ", False), ("c", True)])


@pytest.mark.slow
def test_a_kill_while_the_page_is_written_leaves_a_whole_one(tmp_path):
    """Killed at several moments; what is under the name is always a complete page, and the next one takes over."""
    run = long_run(tmp_path, steps=300)
    write_page(run)
    code = f"from nemotron_sft.train.page import write_page\nprint(flush=True)\nwhile True: write_page({str(run)!r})"
    for wait in (0.01, 0.15, 0.3):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(wait)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert (run / "report.html").read_text().rstrip().endswith("</html>")
    write_page(run)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
