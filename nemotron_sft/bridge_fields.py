"""The field names of Megatron-Bridge's config dataclasses, read from its source without importing it.

Importing Bridge takes seconds; composing a config must not.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

# Config section -> the Bridge dataclasses whose fields it accepts.
SECTIONS = {
    "model": (
        ("megatron.bridge.models.gpt_provider", "GPTModelProvider"),
        ("megatron.bridge.models.hybrid.hybrid_provider", "HybridModelProvider"),
    ),
    "train": (("megatron.bridge.training.config", "TrainingConfig"),),
    "validation": (("megatron.training.config.training_config", "ValidationConfig"),),
    "optimizer": (("megatron.bridge.training.config", "OptimizerConfig"),),
    "scheduler": (("megatron.bridge.training.config", "SchedulerConfig"),),
    "checkpoint": (("megatron.bridge.training.config", "CheckpointConfig"),),
    "peft": (("megatron.bridge.peft.lora", "LoRA"),),
    "ddp": (("megatron.bridge.training.config", "DistributedDataParallelConfig"),),
    "logger": (("megatron.bridge.training.config", "LoggerConfig"),),
    "dist": (("megatron.bridge.training.config", "DistributedInitConfig"),),
    "rng": (("megatron.training.config", "RNGConfig"),),
    "mixed_precision": (("megatron.bridge.training.mixed_precision", "MixedPrecisionConfig"),),
    "comm_overlap": (("megatron.bridge.training.comm_overlap", "CommOverlapConfig"),),
}


def installed() -> bool:
    """Whether Megatron-Bridge is on this machine; a login node may lack it."""
    return _file("megatron.bridge") is not None


@functools.cache
def bridge_fields(section: str) -> frozenset[str]:
    """Names of the public fields of the Bridge dataclasses behind a config section, base classes included."""
    return frozenset(
        name for module, cls in SECTIONS[section] for name in _class_fields(module, cls) if not name.startswith("_")
    )


@functools.cache
def _class_fields(module: str, cls: str) -> frozenset[str]:
    tree = _parse(module)
    if tree is None:
        return frozenset()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            own = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return frozenset(own.union(*(_class_fields(module, base) for base in bases)))
    for statement in ast.walk(tree):  # not defined here: follow the import
        if isinstance(statement, ast.ImportFrom) and statement.module:
            source = _absolute(module, statement)
            for alias in statement.names:
                if (alias.asname or alias.name) == cls:
                    return _class_fields(source, alias.name)
    return frozenset()


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that an import names, also by dots: one for the package, one more for each level above it."""
    name = node.module or ""
    if not node.level:
        return name
    file = _file(module)
    parts = module.split(".")
    above = node.level - 1 if file and file.name == "__init__.py" else node.level
    return ".".join([*parts[: len(parts) - above], name])


def _parse(module: str) -> ast.Module | None:
    file = _file(module)
    return ast.parse(file.read_text()) if file else None


@functools.cache
def _file(module: str) -> Path | None:
    """The source of a module below the `megatron` namespace package, or None if it is not there."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top == "megatron" else None
    for root in (spec and spec.submodule_search_locations) or ():
        path = Path(root, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None
