"""Terminal output: one rich console on stderr for progress, tables on stdout, plain lines when nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager


def console(stderr: bool = False):
    """A rich Console; tables stay whole when the output is a file or a pipe (width 120 instead of 80)."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else 120, soft_wrap=not stream.isatty(), highlight=False
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the first column is left-aligned, the others to the right."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console().print(grid)


@contextmanager
def progress(description: str, total: float | None):
    """Yield `advance(amount, note="")`: a bar on a terminal, otherwise a plain line at most every 5 s."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        parts = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*parts, console=console(stderr=True)) as bars:
            task = bars.add_task(description, total=total, note="")
            yield lambda amount, note="": bars.update(task, advance=amount, note=note)
        return

    done, last = 0.0, time.monotonic()

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            share = f"{100 * done / total:3.0f}%" if total else f"{done:,.0f}"
            print(f"{description} {share} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
