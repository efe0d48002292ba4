"""What a run prints when it ends: the closing table."""

from __future__ import annotations

import time
from pathlib import Path

from nemotron_sft.console import visible
from nemotron_sft.train import page
from nemotron_sft.train.evaluation import Heldout, first_and_last


def summarise(progress, scores: Heldout, run_dir: Path, imported: float, terminal) -> None:
    """Print the closing table and three held-out answers, and name the page."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(file=terminal, width=None if terminal.isatty() else 120, highlight=False)
    table = Table(title=f"Run {run_dir}", title_justify="left", show_header=False)
    seconds = time.time() - progress.started

    def row(name, value):
        table.add_row(name, value)

    row("steps", f"{progress.losses[-1][0]:,}" if progress.losses else "none logged")
    if progress.losses:
        row("training loss", f"{progress.losses[0][1]:.4f} -> {progress.losses[-1][1]:.4f}")
    if progress.validation:
        row("validation loss", f"{progress.validation[0][1]:.4f} -> {progress.validation[-1][1]:.4f}")
    if progress.test is not None:
        row("test loss", f"{progress.test:.4f}")
    for name, shares in first_and_last(scores.asked):
        row(f"right answers, {name}", " -> ".join(f"{share:.1%}" for share in shares))
    steps = progress.losses[-1][0] if progress.losses else progress.begin
    row("tokens", f"{steps * progress.tokens_per_step:,.0f}")  # of the whole run, this start may be its second
    first = f"{progress.first_step:.1f} s" if progress.first_step else "none"
    row("imports / first step / whole run", f"{imported:.1f} s / {first} / {seconds:.1f} s")
    row("checkpoints", str(run_dir / "checkpoints"))
    out.print(table)
    if len(scores.asked) > 1:
        examples = Table(title="Held-out answers", title_justify="left", show_lines=True)
        columns, rows = scores.table()
        for column in columns:
            examples.add_column(column, overflow="fold")
        for cells in rows[:: max(1, len(rows) // max(1, scores.settings.samples))][: scores.settings.samples]:
            examples.add_row(*(Text(visible(cell[:200])) for cell in cells))
        out.print(examples)
    print(f"report {run_dir / page.NAME}", file=terminal, flush=True)
