"""Config values -> fields of Megatron-Bridge's dataclasses.

null       as the recipe sets it: the field is left alone
none       Python's None, where the field may be None (`model.num_moe_experts=none`)
bfloat16   a dtype by its name in torch, where the field is one
flash      a member of an enumeration by its name, where the field is one
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nemotron_sft.config import Bridge, is_none
from nemotron_sft.errors import UserError

# Keys of ours that are no field of the Bridge dataclass; container.py derives what Bridge needs from them.
OURS = {"name", "recipe", "provider", "hf", "epochs", "packs_per_microbatch", "loss_per", "load", "scheme", "bridge"}


def given(section: Bridge) -> dict[str, Any]:
    """The keys of a config section that are meant for Bridge and not null."""
    own = {key: value for key, value in vars(section).items() if key not in OURS and value is not None}
    return own | section.bridge


def apply(section: Bridge, target: Any, name: str) -> None:
    """Set every given key of a config section on the Bridge dataclass it configures. Raises UserError."""
    hints = get_type_hints(type(target))
    defaults = {field.name: field.default for field in dataclasses.fields(target)}
    for key, value in given(section).items():
        if not hasattr(target, key):
            raise UserError(f"{name}.{key} is not a field of {type(target).__name__}: remove it")
        hint = hints.get(key, Any)
        if defaults.get(key, ...) is None:
            hint = hint | None  # many are annotated without the None that is their default
        setattr(target, key, convert(value, hint, f"{name}.{key}"))


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type; see above. Ints become floats, and a plain mismatch raises UserError."""
    import torch

    kinds = list(_members(hint))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    named = {name: member for kind in enums for name, member in kind.__members__.items()}
    if isinstance(value, str):
        if value in named:
            return named[value]
        if is_none(value) and value not in words and (type(None) in kinds or Any in kinds):
            return None
        if torch.dtype in kinds:
            return _dtype(value, path)
        if named and str not in kinds:
            raise UserError(f"{path}={value}: choose one of {', '.join(named)}")
    if float in kinds and type(value) is int and int not in kinds:
        return float(value)
    _check_scalar(value, kinds, words, path)
    return value


def _members(hint: Any):
    """The types of a union, however nested; the type itself where it is none."""
    inner = get_args(hint) if get_origin(hint) not in (list, dict, tuple, Literal) else ()
    if not inner:
        yield hint
    for part in inner:
        yield from _members(part)


def _dtype(name: str, path: str) -> Any:
    """torch's dtype of that name."""
    import torch

    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"{path}={name} is no dtype of torch: bfloat16, float16, float32, float8_e4m3fn, uint8, ...")
    return found


def _check_scalar(value: Any, kinds: list[Any], words: list[Any], path: str) -> None:
    """Refuse a value that is none of a field's types, where those are numbers, truth values, text, or given words."""
    types = [kind for kind in kinds if kind in (bool, int, float, str)]
    others = [
        kind for kind in kinds if kind not in types and kind is not type(None) and get_origin(kind) is not Literal
    ]
    if others or not (types or words) or type(value) in types or value in words:
        return
    choices = [kind.__name__ for kind in types] + [str(word) for word in words]
    raise UserError(f"{path}={value!r} should be {'of type ' if types else ''}{' or '.join(choices)}")
