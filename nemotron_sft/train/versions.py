"""Which releases of NVIDIA's libraries this code was written for, checked before they are imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from nemotron_sft.errors import UserError

# Distribution -> its name in words, the module to look for, and how the version of a release that fits starts.
# What compat/ patches, and the recipes in conf/, are those of these releases. Tests run with 0.6.2, 0.19.2 and 2.20.2;
# the container image in conf/experiment has 0.6.1, 0.19.1 and 2.16.
SERIES = {
    "megatron-bridge": ("Megatron-Bridge", "megatron.bridge", "0.6"),
    "megatron-core": ("Megatron-Core", "megatron.core", "0.19"),
}
ENGINE, LEAST_ENGINE = "transformer-engine", (2, 16)
HELP = "docs/models.md names a container image that has them"


class WrongVersions(UserError):
    """A library is missing, or is another release than the code is for."""


def check_versions(on_gpu: bool) -> None:
    """Raise WrongVersions with one line unless the libraries are those that the code is for.

    on_gpu: whether Transformer Engine is needed, too; on the CPU it is not used.
    """
    wrong = []
    for name, (word, module, series) in SERIES.items():
        found = _installed(name, module)
        if found and not found.startswith(f"{series}."):
            wrong.append(f"{word} {found}")
    engine = _installed(ENGINE, "transformer_engine") if on_gpu else None
    if engine and _numbers(engine) < LEAST_ENGINE:
        wrong.append(f"Transformer Engine {engine}")
    if wrong:
        needed = ", ".join(f"{word} {series}.x" for word, _, series in SERIES.values())
        least = ".".join(map(str, LEAST_ENGINE))
        raise WrongVersions(
            f"{', '.join(wrong)}: needed are {needed} and, on a GPU, Transformer Engine {least} or later ({HELP})"
        )


def _installed(name: str, module: str) -> str | None:
    """Version of a distribution, "is not installed", or None for a plain checkout on the path, which has none."""
    for candidate in (name, f"{name}-torch") if name == ENGINE else (name,):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        there = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package around it
        there = None
    return None if there else "is not installed"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.16.0+71bbefb -> (2, 16); of words, 0."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)
