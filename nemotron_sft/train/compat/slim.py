"""Import Megatron-Bridge without the parts a fine-tuning run never touches.

`import megatron.bridge` loads every model and diffusion family (and with them diffusers, timm, open_clip, ...)
before the first line of one's own code runs. The packages whose __init__ does so are put in place unexecuted:
a submodule is imported when, and only when, it or a name in it is asked for. ModelOpt (quantization, distillation,
pruning), which Bridge's training loop imports only to ask whether it is in use, is replaced by a placeholder.
"""

from __future__ import annotations

import ast
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from nemotron_sft.train.compat.registry import patch

# Packages whose __init__ only gathers names from all of their submodules.
GATHERING = (
    "megatron.bridge",
    "megatron.bridge.data",
    "megatron.bridge.data.builders",
    "megatron.bridge.models",
    "megatron.bridge.models.conversion",
    "megatron.bridge.models.hf_pretrained",
    "megatron.bridge.recipes",
)


class _Unexecuted(ModuleType):
    """A package that finds each name its __init__ would import where that __init__ says it comes from."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if "_origins" not in self.__dict__:
            tree = ast.parse(Path(self.__file__).read_text())
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            self._origins = {
                alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names
            }
        if name in self._origins:
            module, original = self._origins[name]
            value = getattr(importlib.import_module(module), original)
            setattr(self, name, value)
            return value
        if PathFinder.find_spec(f"{self.__name__}.{name}", self.__path__):
            return importlib.import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"module {self.__name__} has no attribute {name}")


@patch(
    dict.fromkeys(GATHERING, "package"),
    seen="megatron-bridge 0.6.2",
    until="`import megatron.bridge` takes no longer than `import torch`",
)
def slim_imports() -> None:
    """Bridge imports every model family at once. Make its later imports cheap; do nothing if it was imported already.

    Bridge's training loop imports ModelOpt unconditionally, which is not needed and may not be installed.
    """
    if "megatron.bridge" in sys.modules:
        return
    placeholder("modelopt", callable=True)
    import megatron  # noqa: F401

    for name in GATHERING:
        parent, _, child = name.rpartition(".")
        spec = PathFinder.find_spec(name, sys.modules[parent].__path__)
        package = _Unexecuted(name)
        package.__spec__, package.__file__, package.__package__ = spec, spec.origin, name
        package.__path__ = spec.submodule_search_locations
        sys.modules[name] = package
        setattr(sys.modules[parent], child, package)


def placeholder(root: str, callable: bool = False) -> None:
    """Let `import root` and everything below it succeed with empty modules, whether or not it is installed.

    Names in them are classes that cannot be instantiated; with `callable`, lower-case names are functions that
    return None.
    """
    sys.meta_path.insert(0, _PlaceholderFinder(root, callable))


class _PlaceholderFinder:
    def __init__(self, root: str, callable: bool):
        self.root, self.callable = root, callable

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.root or fullname.startswith(f"{self.root}."):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Placeholder(spec.name)

    def exec_module(self, module):
        pass


class _Placeholder(ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__spec__.loader.callable and name.islower():
            return lambda *args, **kwargs: None
        return _placeholder_class(f"{self.__name__}.{name}")


def _placeholder_class(path: str) -> type:
    """A class that can be named, derived from, and used in isinstance and annotations, but not instantiated."""
    import torch

    class Meta(type):
        def __getattr__(cls, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return _placeholder_class(f"{path}.{name}")

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"{path} is not installed here, or was left out of the import")

    return Meta(path.rpartition(".")[2], (torch.nn.Module,), {"__init__": refuse, "__module__": path})
