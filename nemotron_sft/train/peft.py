"""Adapters (LoRA, DoRA): checked before training, merged into the weights for an export."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemotron_sft.errors import UserError


def schemes() -> dict[str, type]:
    """Bridge's adapter classes by the name that peft.scheme gives them."""
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    return {"lora": LoRA, "dora": DoRA}


def restored(saved: dict):
    """The adapters of a checkpoint, from the `peft` section of its run_config.yaml."""
    name = str(saved.get("_target_", "")).rpartition(".")[2].lower()
    kind = schemes().get(name)
    if kind is None:
        raise UserError(f"adapters of the kind {saved.get('_target_')} are not known: only LoRA and DoRA")
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    return kind(**{key: value for key, value in saved.items() if key in known and not isinstance(value, dict)})


@dataclasses.dataclass
class Adapter:
    """One layer's adapter. first (rank, in) and second (out, rank), or with a leading axis of experts; magnitude
    (out,) for DoRA, None for LoRA."""

    first: Any
    second: Any
    magnitude: Any
    scale: float

    def merged(self, weight, expert: int | None = None):
        """The layer's weight (out, in) with the adapter in it, computed in fp32, in the weight's own dtype."""
        first, second = (_of_expert(matrix, expert).float() for matrix in (self.first, self.second))
        total = weight.float().addmm(second, first, alpha=self.scale)
        if self.magnitude is not None:
            total *= (self.magnitude.float() / total.norm(dim=1))[:, None]
        return total.to(weight.dtype)


def _of_expert(matrix, expert: int | None):
    """The matrix of one expert, where an adapter keeps one for each; one of a single row serves all."""
    if matrix.ndim == 2:
        return matrix
    return matrix[0 if len(matrix) == 1 else expert]
