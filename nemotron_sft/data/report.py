"""What prep made, for people: tables in the terminal, report.html beside the data, and a look into a pack.

In both, trained tokens are green and context is grey, so that a wrong loss mask is seen rather than computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemotron_sft.console import console, table, visible
from nemotron_sft.data.opened import open_tokenizer
from nemotron_sft.data.packed import read_metadata
from nemotron_sft.data.shown import described, marked_text
from nemotron_sft.files import AtomicFile

if TYPE_CHECKING:
    from nemotron_sft.data.tokens import Tokenizer

SHOWN_PACKS = 6  # in report.html, spread evenly over the training packs
SHOWN_TOKENS = 8192  # of each


def print_report(metadata: dict) -> None:
    """Print the mix, the splits, the lengths and the drops of an output. metadata: see docs/format.md."""
    from rich.markup import escape

    datasets = metadata["blend"]["datasets"]
    names = [escape(d["name"]) for d in datasets]  # rich reads [...] as markup
    table(
        f"Mix of {escape(metadata['blend']['name'])}",
        ["dataset", "weight", "requested", "realised", "sequences", "tokens", "trained"],
        [
            (name, f"{d['weight']:g}", percent(d["requested_share"]), percent(d["realised_share"]),
             number(d["sequences"]), number(d["tokens"]), share(d["trained_tokens"], d["tokens"]))
            for name, d in zip(names, datasets, strict=True)
        ],
    )  # fmt: skip
    table(
        "Records",
        ["dataset", "read", "kept", "dropped", "repeated", "truncated sequences"],
        [
            (name, number(d["records_read"]), number(d["records_kept"]), number(dropped(d)),
             number(duplicates(d)["count"]), number(d["truncated"]))
            for name, d in zip(names, datasets, strict=True)
        ],
    )  # fmt: skip
    table(
        "Forms",
        ["dataset", "form", "records with"],
        [(name, escape(visible(d.get("form", "-"))), flags(d)) for name, d in zip(names, datasets, strict=True)],
    )
    table(
        f"Packs of {metadata['pack_size']:,} tokens",
        ["split", "packs", "sequences", "tokens", "trained", "fill", "size"],
        [
            (name, number(s["packs"]), number(s["sequences"]), number(s["tokens"]),
             share(s["trained_tokens"], s["tokens"]), percent(s["fill"]), size(s["bytes"]))
            for name, s in metadata["splits"].items()
        ],
    )  # fmt: skip
    out = console()
    out.print("Sequence lengths in tokens, before cutting", style="bold")
    for bar in histogram(metadata):
        note = " a whole pack or more" if bar["over"] else ""
        out.print(f"  below {bar['high']:>9,} {'█' * round(30 * bar['height']):30} {number(bar['count'])}{note}")
    if drops := all_drops(metadata):
        out.print("Dropped", style="bold")
        for drop in drops:
            detail = f" ({drop['detail']})" if drop["detail"] else ""
            where = f"{drop['dataset']}, first at {drop['first']}{detail}"
            out.print(visible(f"  {number(drop['count'])} x {drop['reason']}: {where}"), markup=False)
    if repeats := all_duplicates(metadata):
        what = "left out" if metadata["dedup"] else "kept; dedup=true leaves them out"
        out.print(f"Conversations that an earlier record has ({what})", style="bold")
        for repeat in repeats:
            out.print(visible(f"  {repeat['dataset']}: {repeat['at']} repeats {repeat['repeats']}"), markup=False)
    out.print(f"{metadata['wall_seconds']:,.1f} s, {metadata['tokens_per_second']:,.0f} tokens/s")


def write_report(directory: str | Path, metadata: dict, tokenizer: Tokenizer | None = None) -> None:
    """Write report.html, one file without references to others, into an output whose packs are already there.

    It shows the figures of `metadata` and a few packs as text. tokenizer: the one that made them, if it is open.
    Raises UserError if it is not given and gone or another one.
    """
    from jinja2 import Environment
    from markupsafe import Markup, escape

    def marked(run: tuple[str, bool, bool]) -> Markup:
        text, trained, special = run
        html = escape(text)
        if trained:
            html = html.replace("\n", Markup("<em>↵</em>\n"))
        if special:
            html = Markup("<b>{}</b>").format(html)
        return Markup('<span class="t">{}</span>').format(html) if trained else html

    directory = Path(directory)
    datasets, splits = metadata["blend"]["datasets"], metadata["splits"]
    tokens = sum(s["tokens"] for s in splits.values())
    trained = sum(s["trained_tokens"] for s in splits.values())
    packs = sum(s["packs"] for s in splits.values())
    figures = [
        (number(packs), "packs"),
        (number(sum(s["sequences"] for s in splits.values())), "sequences"),
        (number(tokens), "tokens"),
        (share(trained, tokens), "trained"),
        (share(tokens, packs * metadata["pack_size"]), "fill"),
        (number(sum(map(dropped, datasets))), "dropped"),
        (number(round(metadata["tokens_per_second"])), "tokens/s"),
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number, "percent": percent, "size": size, "marked": marked, "drops": dropped, "flags": flags,
        "repeats": lambda d: duplicates(d)["count"],
        "size_of_tokens": lambda n: number(n) if n < 1024 else f"{n / 1024:g}k",
    }  # fmt: skip
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    html = template.render(
        m=metadata,
        figures=figures,
        share=share,
        largest_share=max([d[key] for d in datasets for key in ("requested_share", "realised_share")] + [1e-9]),
        histogram=histogram(metadata),
        drops=all_drops(metadata),
        repeats=all_duplicates(metadata),
        packs=_shown_packs(directory, metadata, tokenizer or open_tokenizer(metadata)),
    )
    with AtomicFile(directory / "report.html") as file:
        file.write(html.encode())


def print_pack(path: str | Path, pack: int = 0) -> None:
    """Print one pack as text: trained tokens green, context grey, special tokens bold.

    path: an output directory (its training packs) or one of the packed files in it. Control characters are shown.
    Where there are no colours, as in a pipe, trained text stands between « and ». Raises UserError.
    """
    path = Path(path)
    directory = path.parent if path.is_file() else path
    metadata = read_metadata(directory)
    if path == directory:
        path = directory / metadata["splits"]["training"]["file"]
    shown = described(Path(path), pack, metadata, open_tokenizer(metadata), limit=None)

    out = console()
    colours = out.color_system is not None
    out.print(
        f"{path}: pack {pack}, {len(shown['sequences'])} sequences, {shown['tokens']:,} tokens, "
        f"{share(shown['trained'], shown['tokens'])} trained, {shown['padding']:,} padding",
        markup=False,
    )
    for index, sequence in enumerate(shown["sequences"], start=1):
        length = sequence["high"] - sequence["low"]
        out.rule(f"sequence {index}: {length:,} tokens, {share(sequence['trained'], length)} trained", align="left")
        out.print(marked_text(sequence["runs"], colours))


# --- numbers -----------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """12,345 as it is; from ten million on in millions or billions."""
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if value >= 10 * unit:
            return f"{value / unit:,.1f}{letter}"
    return f"{value:,}"


def percent(value: float) -> str:
    """0.123 as 12.3%; with more digits just below 100%."""
    return f"{value:.1%}" if value < 0.999 or value == 1 else f"{value:.3%}"


def share(part: float, whole: float) -> str:
    """A part of a whole as a percentage; - where the whole is 0."""
    return percent(part / whole) if whole else "-"


def size(nbytes: int) -> str:
    """A number of bytes in B, kB, MB or GB, 3 digits."""
    unit = next((u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if nbytes >= u[0]), (1, "B"))
    return f"{nbytes / unit[0]:.3g} {unit[1]}"


def dropped(dataset: dict) -> int:
    """How much of a dataset was dropped, whatever the reason."""
    return sum(drop["count"] for drop in dataset["dropped"].values())


def all_drops(metadata: dict) -> list[dict]:
    """Every reason of every dataset, the most frequent first."""
    drops = [
        {
            "dataset": d["name"],
            "reason": reason,
            "count": drop["count"],
            "first": drop["first"],
            "detail": (drop.get("detail") or "").removeprefix(reason).lstrip(": "),
        }
        for d in metadata["blend"]["datasets"]
        for reason, drop in d["dropped"].items()
    ]
    return sorted(drops, key=lambda drop: -drop["count"])


def duplicates(dataset: dict) -> dict:
    """How many records of a dataset repeat an earlier one, and examples; older outputs do not say."""
    return dataset.get("duplicates", {"count": 0, "examples": []})


def all_duplicates(metadata: dict) -> list[dict]:
    """The examples of all datasets, each with dataset, at and repeats."""
    return [
        {"dataset": d["name"], **example}
        for d in metadata["blend"]["datasets"]
        for example in duplicates(d)["examples"]
    ]


def flags(dataset: dict) -> str:
    """What was found in a dataset's records beside roles and texts, and in how many of them."""
    return ", ".join(f"{name} {number(count)}" for name, count in dataset.get("flags", {}).items()) or "-"


def histogram(metadata: dict) -> list[dict]:
    """The bars of the length histogram from the first to the last that is not empty.

    A bar counts sequences of low to high - 1 tokens. Each has low, high, count, height (0..1) and over
    (whether its sequences fill or exceed a pack).
    """
    edges, counts = metadata["lengths"]["edges"], metadata["lengths"]["counts"]
    used = np.flatnonzero(counts)
    if not len(used):
        return []
    return [
        {
            "low": edges[i], "high": edges[i + 1], "count": counts[i], "height": counts[i] / max(counts),
            "over": edges[i] >= metadata["pack_size"],
        }
        for i in range(used[0], used[-1] + 1)
    ]  # fmt: skip


# --- packs as text -----------------------------------------------------------------------------------------


def _shown_packs(directory: Path, metadata: dict, tokenizer: Tokenizer) -> list[dict]:
    """A few packs, described for the HTML."""
    training = metadata["splits"]["training"]
    return [
        described(directory / training["file"], int(index), metadata, tokenizer, SHOWN_TOKENS)
        for index in np.unique(np.linspace(0, training["packs"] - 1, SHOWN_PACKS).round())
    ]
