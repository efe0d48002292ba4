"""Curves as SVG paths: ticks, smoothing, and few enough points that a long run stays a small page."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 1000.0, 400.0  # of the view box, which the page stretches to the room there is
POINTS = 400  # of a line; a raw one has two for each, its least and its greatest
Point = tuple[float, float]  # (step, value)


@dataclass
class Line:
    """One curve. smooth: draw its moving average over the pale raw line. dots: few points, each with a mark."""

    name: str
    points: list[Point]
    smooth: bool = False
    dots: bool = False
    raw: bool = True


@dataclass
class Chart:
    """What the template draws: paths in the view box, ticks in percent of it."""

    title: str
    paths: list[dict] = field(default_factory=list)  # d, colour (index), kind
    legend: list[tuple[int, str, str]] = field(default_factory=list)  # (colour, name, last value)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)


def chart(title: str, lines: Sequence[Line], log: bool = False, shares: bool = False) -> Chart | None:
    """A chart of all lines that have points; None if none has. log: logarithmic, values of 0 and less left out.

    shares: values from 0 to 1, in percent.
    """
    least = sys.float_info.min if log else -math.inf  # what is smaller has no room below it
    usable = [(line, [p for p in line.points if math.isfinite(p[1]) and p[1] >= least]) for line in lines]
    usable = [(line, points) for line, points in usable if points]
    if not usable:
        return None
    steps = [step for _, points in usable for step, _ in (points[0], points[-1])]
    low, high = (0.0, 1.0) if shares else _room([value for _, points in usable for _, value in points], log)
    first, last = min(steps), max(max(steps), min(steps) + 1)
    label = _percent if shares else short
    scale: Callable[[float], float] = math.log if log else float

    def place(point: Point) -> Point:
        part = (scale(point[1]) - scale(low)) / (scale(high) - scale(low))
        return WIDTH * (point[0] - first) / (last - first), HEIGHT * (1 - part)

    drawn = Chart(title)
    for colour, (line, points) in enumerate(usable):
        drawn.paths += [{"d": d, "colour": colour, "kind": kind} for d, kind in _paths(line, points, place)]
        drawn.legend.append((colour, line.name, label(smoothed(points)[-1][1] if line.smooth else points[-1][1])))
    drawn.x_ticks = [
        (100 * (tick - first) / (last - first), f"{tick:,.0f}") for tick in nice(first, last, 5, whole=True)
    ]
    ticks = logarithmic(low, high) if log else nice(low, high, 4)
    drawn.y_ticks = [(100 * place((first, tick))[1] / HEIGHT, label(tick)) for tick in ticks]
    return drawn


def _room(values: list[float], log: bool) -> tuple[float, float]:
    """The axis for these values, with some room, and never of length 0."""
    low, high = min(values), max(values)
    if log:
        return low / 1.05, high * 1.05
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < (high - low) else low - margin), high + margin


def _paths(line: Line, points: list[Point], place: Callable[[Point], Point]) -> list[tuple[str, str]]:
    """(d of a path, kind) of one line."""
    found = []
    if line.smooth:
        if line.raw:
            found.append((_path(thinned(points), place), "raw"))
        found.append((_path(thinned(smoothed(points)), place), "line"))
    else:
        found.append((_path(thinned(points), place), "line"))
    if line.dots and len(points) <= POINTS:
        dots = (place(point) for point in points)
        found.append(("".join(f"M{x:.1f} {y:.1f}h0" for x, y in dots), "dots"))
    return found


def _path(points: list[Point], place: Callable[[Point], Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, points))


def thinned(points: list[Point]) -> list[Point]:
    """At most 2 * POINTS of the points, in order: of each of POINTS stretches the least and the greatest.

    A spike of a single step stays, and so do the first and the last step.
    """
    if len(points) <= 2 * POINTS:
        return points
    kept = {0, len(points) - 1}
    for i in range(1, POINTS - 1):
        stretch = range(i * len(points) // POINTS, (i + 1) * len(points) // POINTS)
        kept |= {min(stretch, key=lambda j: points[j][1]), max(stretch, key=lambda j: points[j][1])}
    return [points[i] for i in sorted(kept)]


def smoothed(points: list[Point]) -> list[Point]:
    """The exponential moving average over about a twentieth of the points, without the pull to 0 at its beginning."""
    keep = 1 - 2 / (max(1, len(points) / 20) + 1)
    average = weight = 0.0
    found = []
    for step, value in points:
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        found.append((step, average / weight))
    return found


def nice(low: float, high: float, number: int, whole: bool = False) -> list[float]:
    """About `number` round values from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / number
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    start = math.ceil(low / step - 1e-9)
    return [i * step for i in range(start, math.floor(high / step + 1e-9) + 1)]


def logarithmic(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis; where it spans little, those of a linear one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    return ticks if len(ticks) > 2 else nice(low, high, 4)


def short(value: float) -> str:
    """A number as a label: four digits, thousands and more as k, M, G."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit or (letter != "k" and abs(value) >= unit):
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
