"""Scores of lm-eval, and how those of two models differ. All errors are standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemotron_sft.console import table


@dataclass
class Score:
    """One metric of one task. each: what every sample scored, where the score is their mean; else empty."""

    task: str
    metric: str
    samples: int
    score: float
    error: float | None
    each: dict[Any, float] = field(repr=False)


@dataclass
class Compared:
    """A score, and that of the other model, where there is one."""

    task: str
    metric: str
    samples: int
    score: float
    error: float | None
    before: float | None = None
    before_error: float | None = None
    difference: float | None = None
    difference_error: float | None = None


def scores_of(results: dict) -> Iterator[Score]:
    """Every metric in what lm-eval's simple_evaluate returns, of tasks and of groups."""
    for task, values in (results["results"] | results.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            each = _samples(results.get("samples", {}).get(task, []), metric, kind, value)
            count = len(each) or results.get("n-samples", {}).get(task, {}).get("effective", 0)
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield Score(task, name, count, float(value), _number(values.get(f"{metric}_stderr,{kind}")), each)


def _samples(samples: list[dict], metric: str, kind: str, mean: float) -> dict[Any, float]:
    """What each sample scored; nothing of a group, or of a metric that is no mean of the samples."""
    each = {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter", "none") == kind and isinstance(sample.get(metric), int | float)
    }
    return each if each and math.isclose(sum(each.values()) / len(each), mean, abs_tol=1e-9) else {}


def _number(value: Any) -> float | None:
    """lm-eval says "N/A" where there is no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def compare(after: list[Score], before: list[Score]) -> list[Compared]:
    """Every score of `after` with that of `before`.

    Where both models answered the same samples and scores are means, the standard error of the difference is that of
    the mean of the differences, sample by sample; else the models count as independent.
    """
    earlier = {(score.task, score.metric): score for score in before}
    found = []
    for score in after:
        row = Compared(score.task, score.metric, score.samples, score.score, score.error)
        if base := earlier.get((score.task, score.metric)):
            row.before, row.before_error = base.score, base.error
            row.difference, row.difference_error = score.score - base.score, _error(score, base)
        found.append(row)
    return found


def _error(after: Score, before: Score) -> float | None:
    if len(after.each) > 1 and after.each.keys() == before.each.keys():
        differences = [after.each[sample] - before.each[sample] for sample in after.each]
        mean, count = sum(differences) / len(differences), len(differences)
        return math.sqrt(sum((each - mean) ** 2 for each in differences) / (count - 1) / count)
    if after.error is None or before.error is None:
        return None
    return math.hypot(after.error, before.error)


def cells(scores: list[Compared], against: bool) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of scores. against: whether there was another model."""
    columns = ["task", "metric", "samples", *(["before", "after", "difference"] if against else ["score"])]
    rows = []
    for row in scores:
        shown = [_text(row.score, row.error)]
        if against:
            shown = [_text(row.before, row.before_error), *shown, _text(row.difference, row.difference_error, "+")]
        rows.append([row.task, row.metric, f"{row.samples:,}", *shown])
    return columns, rows


def _text(value: float | None, error: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def print_scores(scores: list[Compared], model: str, against: str | None) -> None:
    """Print the table."""
    from rich.markup import escape

    columns, rows = cells(scores, against is not None)
    title = f"{model}, before: {against}" if against else model
    table(escape(title), columns, [[escape(cell) for cell in row] for row in rows])
