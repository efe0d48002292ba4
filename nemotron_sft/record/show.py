"""A lineage record for people: the tree from an output back to its source files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_sft.console import console, visible
from nemotron_sft.errors import UserError
from nemotron_sft.record.lineage import FILE, find


def print_lineage(path: str | Path) -> None:
    """Print the chain from an output back to the source files. Raises UserError if there is no record of it."""
    found = find(path)
    if not found:
        raise UserError(f"no {FILE} in {path}: give a run directory, a checkpoint of one, or prepared data")
    out = console()
    if not out.is_terminal:
        out.width = 1000  # a tree is cut to the width, whatever soft_wrap says
    out.print(tree(found, Path(path)), soft_wrap=True)


def tree(record: dict, path: Path) -> Any:
    """The rich Tree of a record."""
    from rich.tree import Tree

    shown = [o for o in record["outputs"] if Path(o["path"]).resolve() == path.resolve()] or record["outputs"]
    root = Tree(f"[bold]{_safe(str(path))}[/]")
    for output in shown:
        root.add(_title(output))
    _branches(root.add(_maker(record)), record)
    return root


def _branches(node: Any, record: dict) -> None:
    for entry in record["inputs"]:
        branch = node.add(_title(entry))
        if entry.get("lineage"):
            _branches(branch.add(_maker(entry["lineage"])), entry["lineage"])
        elif "stamp" in (entry["files"] or [{}])[0]:
            for file in entry["files"][:10]:
                known = f"sha256 {file['sha256'][:12]}" if file["sha256"] else f"stamp {file['stamp']}"
                branch.add(f"{_safe(file['name'])}  {file['bytes']:,} bytes  {known}{_state(file)}")
            if len(entry["files"]) > 10:
                branch.add(f"... and {len(entry['files']) - 10:,} more files")


def _title(entry: dict) -> str:
    aliases = f" ({', '.join(entry['aliases'])})" if entry.get("aliases") else ""
    digest = f"digest {entry['digest'][:12]}" if entry["digest"] else "digest not computed"
    about, facts = entry["metadata"], []
    if splits := about.get("splits"):
        facts.append(f"{sum(s['packs'] for s in splits.values()):,} packs of {about['pack_size']:,}")
        facts.append(f"{sum(s['tokens'] for s in splits.values()):,} tokens")
        facts.append(f"tokenizer {about['tokenizer']['model']}, template {about['template']['name']}")
    if "records_kept" in about:
        facts.append(f"{about['records_kept']:,} records, weight {about['weight']:g}")
    if about.get("validation_loss") is not None:
        facts.append(f"validation loss {about['validation_loss']:.4f}")
    if "seed" in about and "init_from" in about:
        facts.append(f"seed {about['seed']}")
    if about.get("revision"):
        facts.append(f"revision {about['revision']}")
    title = _safe("  ".join([f"{entry['artifact']}{aliases}", entry["path"], digest]))
    return f"{title}\n[dim]{_safe('; '.join(facts))}[/]" if facts else title


def _maker(record: dict) -> str:
    commit = (record["code"]["commit"] or "unknown commit")[:12] + (
        " with changes" if record["code"]["modified"] else ""
    )
    return _safe(
        f"made by {record['stage']}  {record['made']}  commit {commit}  config {record['config']['digest'][:12]}"
    )


def _state(file: dict) -> str:
    """What has become of a local source file, as far as a look at its size tells."""
    path = Path(file["name"])
    if "://" in file["name"] or (not path.is_absolute() and not path.exists()):
        return ""
    if not path.exists():
        return "  [red]gone[/]"
    return "" if path.stat().st_size == file["bytes"] else "  [red]has another size now[/]"


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(visible(text))
