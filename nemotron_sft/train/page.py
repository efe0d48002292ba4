"""report.html of a run: curves, scores, answers, settings, data and lineage in one file without references to others.

Everything is read from the run directory, so that the page of a run that goes on, was resumed, or has ended is made in
the same way.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_sft.errors import first_line
from nemotron_sft.files import AtomicFile
from nemotron_sft.record import lineage
from nemotron_sft.train import evaluation
from nemotron_sft.train.charts import Chart, Line, Point, chart, short, smoothed
from nemotron_sft.train.progress import read_metrics

NAME = "report.html"
SECONDS = 180  # at least, between two pages of a run that goes on
SHARE = 0.005  # at most, of the time of a run that goes into its pages
COLOURS = 8  # curves that can be told apart
ANSWERS, LENGTH = 60, 1000  # prompts shown, and characters of each of their texts
# The sections of config.yaml whose keys are fields of Megatron-Bridge's config: null means "as the recipe has it".
SECTIONS = ("model", "train", "validation", "optimizer", "scheduler", "checkpoint", "peft", "ddp", "logger", "dist",
            "rng", "mixed_precision", "comm_overlap")  # fmt: skip
Columns = dict[str, list[Point]]


class Page:
    """Keeps the page up to date while a run goes on, and writes it a last time however the run ends.

    A context manager and an observer of Bridge's loop; does nothing on ranks other than 0. What goes wrong with a page
    is said, and ends no run.
    """

    def __init__(self, run_dir: Path, rank: int, say: Callable[[str], None]):
        self.run_dir, self.rank, self.say = run_dir, rank, say
        self.next = 0.0  # on the monotonic clock

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.write()

    def register(self, manager: Any) -> None:
        """After Heldout, whose scores belong to the same step."""
        manager.register("on_train_step_end", self.refresh)

    def refresh(self, context: object) -> None:
        if (began := time.monotonic()) >= self.next:
            self.write()
            ended = time.monotonic()
            self.next = ended + max(SECONDS, (ended - began) / SHARE)

    def write(self) -> None:
        if self.rank == 0:
            try:
                write_page(self.run_dir)
            except Exception as error:
                self.say(f"{NAME}: {first_line(error)}")


def write_page(run_dir: str | Path) -> Path:
    """Write report.html into a run directory, atomically, from what is there; returns its path."""
    from jinja2 import Environment

    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    seen = columns(lines)
    config = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    command = run_dir / "command.txt"
    record = lineage.read(run_dir)
    heldout = evaluation.read(run_dir / "heldout.json")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = short
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    html = template.render(
        name=run_dir.resolve().name,
        config=config,
        command=command.read_text().strip() if command.exists() else "",
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        step=max((line["step"] for line in lines), default=0),
        figures=figures(seen),
        charts=charts(seen),
        datasets=datasets(seen),
        scored=scored(heldout),
        answers=answers(heldout),
        asked=len(heldout["prompts"]) if heldout else 0,
        settings=settings(config),
        data=data(record),
        record=record,
        chain=chain(record),
    )
    with AtomicFile(run_dir / NAME) as file:
        file.write(html.encode())
    return run_dir / NAME


def columns(lines: list[dict]) -> Columns:
    """(step, value) of every number in the lines of metrics.jsonl, by key, keys in order of appearance."""
    found: Columns = {}
    for line in lines:
        step = line["step"]
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step":
                found.setdefault(key, []).append((step, value))
    return found


def parts(seen: Columns, prefix: str) -> list[str]:
    """What follows `prefix` in the keys: names of datasets or of prompt files."""
    return [key.removeprefix(prefix) for key in seen if key.startswith(prefix)]


def figures(seen: Columns) -> list[tuple[str, str]]:
    """(value, label) of the row at the top."""
    found = []
    for key, label in (("loss", "training loss"), ("validation_loss", "validation loss"), ("test_loss", "test loss")):
        if values := seen.get(key, []):
            last = smoothed(values)[-1][1] if key == "loss" else values[-1][1]
            found.append((f"{last:.4f}", label))
    found += [(f"{seen[f'score/{name}'][-1][1]:.1%}", f"right, {name}") for name in parts(seen, "score/")]
    if speeds := sorted(value for _, value in seen.get("tokens_per_second", [])):
        found.append((short(speeds[len(speeds) // 2]), "tokens/s (median)"))
    if seconds := seen.get("seconds", []):
        found.append((str(datetime.timedelta(seconds=round(seconds[-1][1]))), "since the last start"))
    return found


def charts(seen: Columns) -> list[Chart]:
    """All charts that there is something for."""
    by_size = sorted(parts(seen, "trained_tokens/"), key=lambda name: -_sum(seen, f"trained_tokens/{name}"))[:COLOURS]
    validated = [name for name in by_size if seen.get(f"validation_loss/{name}", [])]
    several = len(by_size) > 1
    validation = Line("validation", seen.get("validation_loss", []), dots=True)
    losses = [Line(name, seen.get(f"loss/{name}", []), smooth=True, raw=False) for name in by_size]
    validations = [Line(name, seen.get(f"validation_loss/{name}", []), dots=True) for name in validated]
    scores = [Line(name, seen.get(f"score/{name}", []), dots=True) for name in parts(seen, "score/")[:COLOURS]]
    found = [
        chart("Loss", [Line("training", seen.get("loss", []), smooth=True), validation], log=True),
        chart("Training loss by dataset", losses, log=True) if several else None,
        chart("Validation loss by dataset", validations, log=True) if several else None,
        chart("Right answers", scores, shares=True),
    ]
    for key, title, smooth, log in (
        ("lr", "Learning rate", False, False),
        ("grad_norm", "Gradient norm", True, True),
        ("tokens_per_second", "Tokens per second", True, False),
        ("mfu", "MFU: share of the GPU's peak FLOP/s", True, False),
        ("peak_memory_gib", "Peak memory, GiB per GPU", False, False),
    ):
        found.append(chart(title, [Line(title, seen.get(key, []), smooth=smooth)], log=log))
    return [each for each in found if each]


def datasets(seen: Columns) -> list[dict]:
    """Of every dataset: first and newest losses, and tokens trained in the logged steps."""
    rows = []
    for name in parts(seen, "trained_tokens/"):
        row: dict[str, Any] = {"name": name, "tokens": _sum(seen, f"trained_tokens/{name}")}
        for key in ("loss", "validation_loss"):
            values = seen.get(f"{key}/{name}", [])
            row[key] = (values[0][1], (smoothed(values) if key == "loss" else values)[-1][1]) if values else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["tokens"])


def _sum(seen: Columns, key: str) -> float:
    return sum(value for _, value in seen.get(key, []))


# --- prompts -----------------------------------------------------------------------------------------------


def scored(heldout: dict | None) -> list[dict]:
    """A row for each prompt file: prompts, chance level, first and newest score."""
    if not heldout:
        return []
    shares = dict(evaluation.first_and_last(heldout["asked"]))
    return [{"name": name, "shares": shares.get(name, []), **about} for name, about in heldout["files"].items()]


def answers(heldout: dict | None) -> list[dict]:
    """ANSWERS prompts with their answers before and now, what changed marked; those that became wrong first."""
    if not heldout or not heldout["asked"]:
        return []
    asked, found = heldout["asked"], []
    for i, prompt in enumerate(heldout["prompts"]):
        texts = [entry["answers"][i] for entry in asked]
        right = [entry["right"][i] if "right" in entry else None for entry in asked]
        expected = prompt["answer"] if isinstance(prompt["answer"], str) else json.dumps(prompt["answer"])
        row = {"file": prompt["file"], "question": _cut(prompt["question"]), "expected": _cut(expected)}
        found.append({**row, "change": _change(right, texts), "right": right, "texts": texts})
    order = ["now wrong", "now right", "changed", "the same", ""]
    found = sorted(found, key=lambda row: order.index(row["change"]))[:ANSWERS]
    steps = [entry["step"] for entry in asked]
    for row in found:  # not of all: comparing takes a while
        row["given"] = list(zip(steps, row["right"], marked([_cut(text) for text in row["texts"]]), strict=True))
    return found


def _change(right: list[bool | None], texts: list[str]) -> str:
    """What became of an answer, in two words."""
    if len(texts) < 2:
        return ""
    if right[0] != right[-1]:
        return "now right" if right[-1] else "now wrong"
    return "the same" if texts[0] == texts[-1] else "changed"


def marked(texts: list[str]) -> list[list[tuple[str, bool]]]:
    """(piece, whether only this text has it) of one text, or of two that are compared word by word."""
    if len(texts) < 2 or texts[0] == texts[1]:
        return [[(text, False)] for text in texts]
    words = [re.findall(r"\s+|\S+", text) for text in texts]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    found: list[list[tuple[str, bool]]] = [[], []]
    for kind, *ends in matcher.get_opcodes():
        for side in (0, 1):
            if piece := "".join(words[side][ends[2 * side] : ends[2 * side + 1]]):
                found[side].append((piece, kind != "equal"))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LENGTH else f"{text[:LENGTH]} [{len(text) - LENGTH:,} characters more]"


# --- settings, data, lineage -------------------------------------------------------------------------------


def settings(config: Any) -> list[tuple[str, str]]:
    """(dotted key, value) of what config.yaml sets of Megatron-Bridge's config, null left out."""
    found: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif value is not None:
            found.append((prefix, str(value)))

    for section in SECTIONS:
        walk(section, config.get(section))
    return found


def data(record: dict | None) -> dict | None:
    """The summary of the data that a run was trained on, as its lineage has it."""
    inputs = record["inputs"] if record else []
    return next((entry["metadata"] for entry in inputs if entry["artifact"] == lineage.DATA), None)


def chain(record: dict | None, depth: int = 0) -> list[dict]:
    """The inputs of a record and theirs, in the order of a tree; depth: how far they are from the run."""
    found = []
    for entry in record["inputs"] if record else []:
        found.append({"depth": depth, **{key: entry[key] for key in ("artifact", "path", "digest")}})
        found += chain(entry.get("lineage"), depth + 1)
    return found
