"""The table of the upstream names that this project replaces, or calls although they are private."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_sft.errors import UserError

Names = dict[str, str]  # "package.module:name", or "package.module" for a package -> what is expected of it


@dataclass(frozen=True)
class Patch:
    """One patch: what it expects to find upstream, why it exists, and when it can go."""

    function: str  # "nemotron_sft.train.compat.cpu.use_cpu"
    why: str
    expects: Names | Callable[[], Names]
    seen: str  # the versions that it was written for: "megatron-core 0.19.2, megatron-bridge 0.6.2"
    until: str

    def check(self) -> None:
        """Raise UserError if an upstream name is not what the patch expects."""
        names = self.expects() if callable(self.expects) else self.expects
        for name, expected in names.items():
            if (found := look_up(name)) not in expected.split(" | "):
                raise UserError(
                    f"{name} is {found} in what is installed ({_installed(self.seen)}), but {self.function} expects "
                    f"{expected}, as in {self.seen}: install that version, or adapt the patch"
                )


PATCHES: list[Patch] = []
APPLIED: set[str] = set()  # functions that ran in this process: the names that they expect are ours since


def patch(expects: Names | Callable[[], Names], *, seen: str, until: str) -> Callable:
    """Register a function that replaces upstream names, or calls private ones; check them when it is first called.

    expects: for every name its parameters without defaults, "(self, hidden_states, *args)"; for what is not a
    function "class", "package", "property", "compiled" or the name of its type; "missing" for what the patch adds.
    Alternatives are divided by " | ". A function that returns such a dict is called at the first check.
    seen: the versions that the patch was written for. until: when it can go.
    """

    def register(function: Callable) -> Callable:
        entry = Patch(f"{function.__module__}.{function.__qualname__}", function.__doc__ or "", expects, seen, until)
        PATCHES.append(entry)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if entry.function not in APPLIED:
                entry.check()
                APPLIED.add(entry.function)
            return function(*args, **kwargs)

        return checked

    return register


def look_up(name: str) -> str:
    """What an upstream name is now, in the words of `patch`."""
    module, _, attribute = name.partition(":")
    if not attribute:
        return "package" if _is_package(module) else "missing"
    try:
        return describe(pkgutil.resolve_name(name))
    except (ImportError, AttributeError):
        return "missing"


def describe(value: Any) -> str:
    """Parameters of a function without defaults and annotations; the kind of anything else."""
    if inspect.isclass(value):
        return "class"
    if not callable(value):
        return type(value).__name__
    empty = inspect.Parameter.empty
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # of an extension module
        return "compiled"
    return str(inspect.Signature([each.replace(annotation=empty, default=empty) for each in parameters]))


def _is_package(name: str) -> bool:
    """Whether a package has an __init__.py, found without running it or those above it."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    places = spec.submodule_search_locations if spec else None
    return any(Path(place, *rest, "__init__.py").is_file() for place in places or ())


def _installed(seen: str) -> str:
    """The installed versions of the distributions that `seen` names."""
    found = []
    for part in seen.split(", "):
        name = part.split()[0]
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} of unknown version")
    return ", ".join(found)
