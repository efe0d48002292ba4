"""What is left of a run for people: the held-out score before and after, the closing table, the loss curve."""

from __future__ import annotations

import json
import time
from pathlib import Path

from nemotron_sft import heldout
from nemotron_sft.config import TrainConfig
from nemotron_sft.lineage import newest_iteration
from nemotron_sft.megatron.checkpoint import trained_model


class Heldout:
    """Answers the held-out prompts before training (the model in memory) and after (the saved checkpoint)."""

    def __init__(self, config: TrainConfig, metadata: dict, run_dir: Path, rank: int):
        self.config, self.rank = config.heldout, rank
        self.file = run_dir / "heldout.json"
        self.prompts = heldout.load_prompts(Path(config.heldout.path), metadata) if config.heldout.path else None
        self.scores: dict[str, float] = {}
        self.answers: dict[str, list[str]] = {}
        if self.file.exists():  # resumed: the score from before the first start is the one to compare with
            saved = json.loads(self.file.read_text())
            self.scores["before"] = saved["exact_match"]["before"]
            self.answers["before"] = [row["before"] for row in saved["prompts"]]

    def register(self, manager) -> None:
        manager.register("on_train_start", self.on_train_start)

    def on_train_start(self, context) -> None:
        if self.prompts and "before" not in self.scores:
            self._score("before", context.model[0].module)

    def after(self, checkpoints: Path, on_cpu: bool) -> None:
        """Load the newest checkpoint into a fresh model and score it."""
        if not self.prompts:
            return
        with trained_model(newest_iteration(checkpoints), on_cpu) as model:
            self._score("after", model)

    def _score(self, when: str, model) -> None:
        answers = heldout.answer(self.prompts, model, self.config.max_new_tokens)
        self.answers[when], self.scores[when] = answers, heldout.exact_match(self.prompts, answers)
        if self.rank == 0:
            rows = [
                {"question": record["messages"][-1]["content"], "answer": record["answer"]}
                | {when: self.answers[when][i] for when in self.answers}
                for i, record in enumerate(self.prompts.records)
            ]
            self.file.write_text(
                json.dumps({"exact_match": self.scores, "prompts": rows}, indent=1, ensure_ascii=False)
            )


def summarise(progress, scores: Heldout, run_dir: Path, imported: float, terminal) -> None:
    """Print the closing table and three held-out answers, and draw loss.png."""
    from rich.console import Console
    from rich.table import Table

    out = Console(file=terminal, width=None if terminal.isatty() else 120, highlight=False)
    table = Table(title=f"Run {run_dir}", title_justify="left", show_header=False)
    seconds = time.time() - progress.started

    def row(name, value):
        table.add_row(name, value)

    row("steps", f"{progress.losses[-1][0]:,}" if progress.losses else "0 new")
    if progress.losses:
        row("training loss", f"{progress.losses[0][1]:.4f} -> {progress.losses[-1][1]:.4f}")
    if progress.validation:
        row("validation loss", f"{progress.validation[0][1]:.4f} -> {progress.validation[-1][1]:.4f}")
    if progress.test is not None:
        row("test loss", f"{progress.test:.4f}")
    if "after" in scores.scores:
        row("held-out exact match", f"{scores.scores['before']:.1%} -> {scores.scores['after']:.1%}")
    row("tokens", f"{progress.tokens:,.0f}")
    row(
        "imports / first step / whole run",
        f"{imported:.1f} s / {progress.first_step or 0:.1f} s / {seconds:.1f} s",
    )
    row("checkpoints", str(run_dir / "checkpoints"))
    out.print(table)
    if "after" in scores.scores:
        examples = Table(title="Held-out answers", title_justify="left", show_lines=True)
        for column in ("question", "right answer", "before", "after"):
            examples.add_column(column, overflow="fold")
        records = scores.prompts.records
        for i in range(0, len(records), max(1, len(records) // scores.config.samples))[: scores.config.samples]:
            before, after = (scores.answers[when][i] for when in ("before", "after"))
            examples.add_row(records[i]["messages"][-1]["content"], records[i]["answer"], before[:80], after[:80])
        out.print(examples)
    draw(run_dir)


def draw(run_dir: Path) -> None:
    """loss.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=run_dir.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "loss.png", dpi=150)
    pyplot.close(figure)
