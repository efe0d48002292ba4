"""Which code made an output."""

import subprocess

from nemotron_sft import __version__
from nemotron_sft.paths import ROOT


def code() -> dict:
    """Version, commit, and the files that differ from the commit. A job knows these from its submission."""
    frozen = ROOT.parent / "version.txt"
    lines = (frozen.read_text() if ROOT.name == "code" and frozen.exists() else version()).splitlines()
    known = bool(lines) and len(lines[0]) == 40
    return {
        "version": __version__,
        "commit": lines[0] if known else None,
        "modified": [line.split()[-1] for line in lines[1:]] if known else [],
    }


def version() -> str:
    """The commit of the code and what differs from it, as `git` tells."""
    told = ""
    for command in ("rev-parse HEAD", "status --short -- nemotron_sft recipes"):
        try:
            git = subprocess.run(["git", "-C", ROOT, *command.split()], capture_output=True, text=True)
        except FileNotFoundError:
            return "unknown: git is not installed\n"
        told += git.stdout or git.stderr
    return told
