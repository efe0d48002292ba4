"""Hugging Face weights into a Megatron model: all of them, or none."""

from __future__ import annotations

import re
from typing import Any

from nemotron_sft.errors import UserError
from nemotron_sft.train.compat.registry import patch

# What transformers' save_pretrained calls weights that published checkpoints, and so Bridge, call otherwise.
SAVED_AS = {"backbone.embeddings.weight": "backbone.embedding.weight"}
COMPUTED = r"rotary_emb\.inv_freq$"  # stored by some, computed by all


@patch(
    {
        "megatron.bridge.models.conversion.model_bridge:MegatronModelBridge.load_weights_hf_to_megatron": (
            "(self, hf_pretrained, megatron_model, allowed_mismatched_params)"
        ),
        "megatron.bridge.models.conversion.model_bridge:MegatronModelBridge.build_conversion_tasks": (
            "(self, hf_pretrained, megatron_model, weight_dtype)"
        ),
        "megatron.bridge.models.conversion.model_bridge:MegatronModelBridge."
        "_megatron_global_param_names_all_pp_ranks": "(self, megatron_model)",
        "megatron.bridge.models.conversion.model_bridge:MegatronModelBridge._share_embeddings_and_output_weights": (
            "(self, model_config)"
        ),
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge refuses a checkpoint whose weights are not those of the model",
)
def load_all_or_nothing() -> None:
    """Bridge logs a weight that it does not find, and leaves the model's as it was allocated; a weight of the
    checkpoint that the model has no place for it passes over without a word. Here either is an error."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.core.utils import unwrap_model

    convert = MegatronModelBridge.load_weights_hf_to_megatron

    def load(self, hf_pretrained, megatron_model, allowed_mismatched_params=None):
        models = unwrap_model(megatron_model if isinstance(megatron_model, list) else [megatron_model])
        hf_pretrained.state.source = _renamed(hf_pretrained.state.source)
        _account(self, hf_pretrained, models)
        try:
            return convert(self, hf_pretrained, megatron_model, allowed_mismatched_params)
        except ValueError as error:
            if "Shape mismatch" not in str(error):
                raise
            raise UserError(f"{hf_pretrained.model_name_or_path}: {' '.join(str(error).split())}") from None

    MegatronModelBridge.load_weights_hf_to_megatron = load


def _renamed(source: Any) -> Any:
    """The source of a checkpoint's tensors, under the names that Bridge looks for."""
    from megatron.bridge.models.hf_pretrained.state import StateSource

    stored = set(source.get_all_keys())
    names = {ours: theirs for ours, theirs in SAVED_AS.items() if theirs in stored and ours not in stored}
    if not names:
        return source

    class Renamed(StateSource):
        def get_all_keys(self) -> list[str]:
            ours = {theirs: name for name, theirs in names.items()}
            return [ours.get(key, key) for key in source.get_all_keys()]

        def load_tensors(self, keys: list[str]) -> dict[str, Any]:
            loaded = source.load_tensors([names.get(key, key) for key in keys])
            return {key: loaded[names.get(key, key)] for key in keys}

        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

    return Renamed()


def _account(bridge: Any, hf_pretrained: Any, models: list) -> None:
    """Raise UserError for a weight of the model that nothing fills, or one of the checkpoint that nothing takes."""
    place, stored = hf_pretrained.model_name_or_path, set(hf_pretrained.state.source.get_all_keys())
    tasks = bridge.build_conversion_tasks(hf_pretrained, models)
    tied = bridge._share_embeddings_and_output_weights(models[0].config)
    names = bridge._megatron_global_param_names_all_pp_ranks(models)
    names = [name for name in names if not (tied and "output_layer" in name)]
    taken: set[str] = set()
    for name, task in zip(names, tasks, strict=True):
        if task is None:
            raise UserError(f"Megatron-Bridge does not know what the weight {name} is called in {place}")
        if task.mapping.allow_hf_name_mismatch:
            return  # a family that renames while it reads: what is read cannot be told beforehand
        wanted = task.mapping.hf_param
        wanted = {wanted} if isinstance(wanted, str) else set(wanted.values())
        if missing := sorted(wanted - stored):
            raise UserError(f"{place} has no weight {missing[0]}, which {name} of the model is filled from")
        taken |= wanted
    unused = [key for key in sorted(stored - taken) if not _without_a_place(key, tied, models[0].config, hf_pretrained)]
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise UserError(
            f"{place} has a weight {unused[0]}{more} that the model has no place for: is it of another "
            "architecture, or larger than model.* says?"
        )


def _without_a_place(key: str, tied: bool, config: Any, hf_pretrained: Any) -> bool:
    """Whether a weight may be left out: a tied copy, a computed one, the heads of a model trained without them."""
    if re.search(COMPUTED, key) or (tied and key == "lm_head.weight"):
        return True
    if config.mtp_num_layers:
        return False
    layers = getattr(hf_pretrained.config, "num_hidden_layers", None)
    found = re.match(r"\w+\.layers\.(\d+)\.", key)
    return key.startswith("mtp.") or bool(found and layers and int(found[1]) >= layers)
