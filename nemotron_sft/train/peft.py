"""Adapters (LoRA, DoRA): checked before training, merged into the weights for an export."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from nemotron_sft.config import nearest
from nemotron_sft.errors import UserError
from nemotron_sft.train.topology import layers_of


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


# --- before training --------------------------------------------------------------------------------------

# Names in transformers -> the layer of Megatron's that holds them, and more beside them.
ELSEWHERE = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "qkv_proj": "linear_qkv",
    "linear_q": "linear_qkv",
    "linear_k": "linear_qkv",
    "linear_v": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "gate_up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
}
INITIAL = ("xavier", "kaiming", "normal", "zero")  # how Bridge fills the two matrices


def layer_names(model) -> list[str]:
    """Full names of the layers that adapters can be put around, in a model as its provider describes it.

    Experts are named as they are on a GPU (a layer's in one) and on the CPU (each by itself).
    """
    latent = getattr(model, "multi_latent_attention", False)
    kinds = {
        "attention": [f"self_attention.{name}" for name in (*(LATENT if latent else ("linear_qkv",)), "linear_proj")],
        "mlp": ["mlp.linear_fc1", "mlp.linear_fc2"],
        "moe": [f"mlp.{part}" for part in _of_experts(model)] if model.num_moe_experts else [],
        "mamba": ["mixer.in_proj", "mixer.out_proj"],
    }
    layers = enumerate(layers_of(model))
    return [f"decoder.layers.{i}.{name}" for i, layer in layers for kind in layer for name in kinds[kind]]


LATENT = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
BEYOND_DORA = (".router", "_latent_proj", ".in_proj")  # Bridge's DoRA has no place there, or does not save
SHARED = ("shared_experts.linear_fc1", "shared_experts.linear_fc2")


def _of_experts(model) -> list[str]:
    groups = ["experts", *(f"experts.local_experts.{i}" for i in range(model.num_moe_experts))]
    names = ["router", *(f"{group}.{name}" for group in groups for name in ("linear_fc1", "linear_fc2"))]
    if model.moe_shared_expert_intermediate_size:
        names += SHARED
    return names + (["fc1_latent_proj", "fc2_latent_proj"] if getattr(model, "moe_latent_size", None) else [])


def settle(adapters, model) -> None:
    """Check the settings of Bridge's adapters against the model, and fill in the layers if none are named.

    Then all linear layers are adapted: attention's, feed-forward, experts' and Mamba's. (DoRA leaves out routed experts
    and Mamba's in_proj, where Bridge cannot put it, or not save it.) Raises UserError for what cannot be trained or
    names no layer.
    """
    name = type(adapters).__name__
    if not (isinstance(adapters.dim, int) and adapters.dim > 0 and adapters.alpha > 0 and 0 <= adapters.dropout < 1):
        raise UserError("peft: dim must be a whole number above 0, alpha above 0, dropout from 0 to below 1")
    for key in ("lora_A_init_method", "lora_B_init_method"):
        if getattr(adapters, key) not in INITIAL:
            raise UserError(f"peft.{key}={getattr(adapters, key)}: choose one of {', '.join(INITIAL)}")
    if adapters.dropout_position not in ("pre", "post") or (name == "DoRA" and adapters.dropout_position != "pre"):
        raise UserError(
            f"peft.dropout_position={adapters.dropout_position}: choose pre" + " or post" * (name == "LoRA")
        )
    if adapters.exclude_modules:
        raise UserError("peft.exclude_modules is not supported: name what to train in peft.target_modules")
    layers = layer_names(model)
    beyond = [layer for layer in layers if ".experts." in layer or layer.endswith(BEYOND_DORA)]
    if adapters.target_modules is None:
        adapters.target_modules = _every_linear_layer(layers, beyond, name)
    targets = adapters.target_modules
    if not (targets and isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        raise UserError(f"peft.target_modules={targets}: give a list of layers, or null for all of them")
    for target in adapters.target_modules:
        found = matched(target, layers)
        if not found:
            raise _no_such_layer(target, layers)
        if name == "DoRA" and set(found) & set(beyond):
            raise UserError(
                f"peft.target_modules: DoRA cannot adapt {found[0].rpartition('layers.')[2].partition('.')[2]}, which "
                f"{target} names: use LoRA for it, or name others, such as *.shared_experts.linear_fc1"
            )


def _every_linear_layer(layers: list[str], beyond: list[str], name: str) -> list[str]:
    """What target_modules=null means."""
    names = ("linear_qkv", *LATENT, "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2")
    if name == "DoRA":
        shared = tuple(f"*.{each}" for each in SHARED)
        names = tuple(each for each in (*names, *shared) if not set(matched(each, layers)) & set(beyond))
        if "linear_fc1" in names:
            names = tuple(each for each in names if each not in shared)
    return [target for target in names if matched(target, layers)]


def matched(target: str, layers: list[str]) -> list[str]:
    """The layers that an entry of target_modules stands for: by last name, or by full name with wildcards."""
    pattern = re.compile(re.escape(target).replace(r"\*", ".*"))
    return [layer for layer in layers if layer.rpartition(".")[2] == target or pattern.fullmatch(layer)]


def _no_such_layer(target: str, layers: list[str]) -> UserError:
    there = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    last = target.rpartition(".")[2]
    if ELSEWHERE.get(last) in there:
        hint = f"{last} is part of {ELSEWHERE[last]} here"
    elif "all" not in last and (best := nearest(last, there)):
        hint = f"did you mean {best}?"
    else:
        hint = "target_modules=null takes every linear layer"
    return UserError(f"peft.target_modules: no layer is called {target}: {hint} (there are {', '.join(there)})")
