"""Terminal output: one rich console on stderr for progress, tables on stdout, plain lines when nobody watches.

Text that data brings goes through `visible` before it is printed: a terminal obeys escape sequences.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

# C0 controls have pictures of their own; C1 and marks that turn the direction of text are written as escapes.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
_ESCAPED = (*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_VISIBLE = _PICTURES | {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _ESCAPED}


def visible(text: str) -> str:
    """Text with its control characters shown instead of sent: an escape as \u241b. Line ends and tabs stay."""
    return text.translate(_VISIBLE)


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line that may quote data, on stderr or into `file`: control characters shown, line ends as spaces."""
    print(visible(line.replace("\n", " ")), file=file or sys.stderr, flush=True)


def console(stderr: bool = False) -> Any:
    """A rich Console; tables stay whole when the output is a file or a pipe (width 120 instead of 80)."""
    import rich.console

    class Console(rich.console.Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would exit with 1; app.command knows what to do

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else 120, soft_wrap=not stream.isatty(), highlight=False
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], header: bool = True) -> None:
    """Print a table; the first column is left-aligned, the others to the right, or to the left without a header.

    Titles and cells may hold rich's markup. Control characters in them are shown.
    """
    from rich.table import Table

    grid = Table(title=visible(title), title_justify="left", title_style="bold", show_header=header)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="right" if header and index else "left")
    for row in rows:
        grid.add_row(*(visible(str(cell)) for cell in row))
    console().print(grid)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
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
