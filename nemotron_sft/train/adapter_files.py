"""Adapters alone, in the format of the peft package: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_sft.files import write_json
from nemotron_sft.train.weights import AdaptedReader, Group, Skeleton, plain_name

# Around what peft puts no adapter: routed experts and their router, which are no linear layers in transformers, and a
# Mamba layer's out_proj, whose weight the fused kernel takes past any adapter.
REFUSED = r"\.experts\.|\.gate$|\.out_proj$"


def write(directory: Path, skeleton: Skeleton, reader: AdaptedReader, adapters: Any, base: str) -> list[str]:
    """Write the adapters of a checkpoint beside the merged weights; returns lines about what could not be written.

    adapters: Bridge's LoRA or DoRA with its settings; base: what peft is to find the frozen model by.
    """
    from safetensors.torch import save_file

    weights = dict(_of_layers(skeleton, reader))
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name in weights if ".lora_A" in name}
    if refused := sorted(module for module in modules if re.search(REFUSED, module)):
        return [f"adapters alone: not written, peft cannot put one around {refused[0]} (the weights have them merged)"]
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.dim,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_dora": type(adapters).__name__ == "DoRA",
        "target_modules": _shortest(modules, skeleton),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / "adapter_config.json", settings)
    return []


def _of_layers(skeleton: Skeleton, reader: AdaptedReader) -> Iterator[tuple[str, Any]]:
    """(name in peft, tensor) of every adapter. A layer of Megatron may be several in transformers, such as q, k and v:
    they share the first matrix, and have the rows of the second that a weight's rows go to."""
    for task in skeleton.tasks:
        name = plain_name(task.param_name)
        adapter = reader.adapter_of(name)
        if adapter is None:
            continue
        width = task.param_weight.shape[1]
        magnitudes = {}
        if adapter.magnitude is not None:
            magnitudes = _rows(skeleton, task, adapter.magnitude[:, None], width)
        for key, second in _rows(skeleton, task, adapter.second, width).items():
            module = f"base_model.model.{key.removesuffix('.weight')}"
            yield f"{module}.lora_A.weight", adapter.first.clone()
            yield f"{module}.lora_B.weight", second
            if magnitudes:
                yield f"{module}.lora_magnitude_vector", magnitudes[key][:, 0].contiguous()


def _rows(skeleton: Skeleton, task: Any, matrix, width: int) -> dict[str, Any]:
    """{weight in transformers: its rows of `matrix`}, which has a row for each of the Megatron weight's.

    matrix: (out, n). The translation of weights (out, width) is applied to it, `width` columns at a time.
    """
    import torch

    parts: dict[str, list] = {}
    for columns in matrix.split(width, dim=1):
        count = columns.shape[1]
        wide = torch.nn.functional.pad(columns, (0, width - count))
        for key, rows in skeleton.to_hf(Group([task], 0), {plain_name(task.param_name): wide}).items():
            parts.setdefault(key, []).append(rows[:, :count])
    return {key: torch.cat(found, dim=1) for key, found in parts.items()}


def _shortest(modules: set[str], skeleton: Skeleton) -> list[str]:
    """Last names of the adapted layers, as servers want them; longer ones where a name is also another layer's."""
    names: set[str] = set()
    for task in skeleton.tasks:
        found = task.mapping.hf_param
        names |= {found} if isinstance(found, str) else set(found.values())
    everything = {name.removesuffix(".weight") for name in names}
    last = {module.rpartition(".")[2] for module in modules}
    if {name for name in everything if name.rpartition(".")[2] in last} == modules:
        return sorted(last)
    return sorted(module.partition(".")[2] for module in modules)  # without "model." or "backbone."
