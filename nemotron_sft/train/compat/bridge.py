"""Patches of Megatron-Bridge and Megatron-Core that hold on a CPU and on a GPU alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from nemotron_sft.train.compat.registry import patch


@patch(
    {
        "megatron.core.datasets.utils:compile_helpers": "()",
        "megatron.bridge.training.initialize:compile_helpers": "()",
    },
    seen="megatron-core 0.19.2, megatron-bridge 0.6.2",
    until="Bridge builds core's dataset index helpers only where they are missing",
)
def skip_helper_build() -> None:
    """Bridge runs `make` for core's dataset index helpers, but core's wheel ships them built, without a Makefile."""
    import megatron.bridge.training.initialize as initialize
    import megatron.core.datasets.utils as core_utils

    core_utils.compile_helpers = initialize.compile_helpers = lambda: None


@patch(
    {
        "megatron.bridge.models.conversion.auto_bridge:safe_load_config_with_retry": (
            "(path, trust_remote_code, max_retries, base_delay, **kwargs)"
        )
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge's recipes and AutoBridge take a config object instead of a name",
)
@contextlib.contextmanager
def configs_from(load: Callable[..., Any]) -> Iterator[None]:
    """Bridge's recipes ask the hub for a config.json by name, which fails where there is no network.

    Inside this context `load(path, trust_remote_code=..., **options)` answers instead.
    """
    from megatron.bridge.models.conversion import auto_bridge

    original = auto_bridge.safe_load_config_with_retry
    auto_bridge.safe_load_config_with_retry = load
    try:
        yield
    finally:
        auto_bridge.safe_load_config_with_retry = original


@patch(
    {
        "megatron.bridge.training.checkpointing:_generate_model_state_dict": (
            "(model, model_sd_kwargs, ckpt_format, *, pg_collection)"
        ),
        "megatron.bridge.training.checkpointing:apply_peft_adapter_filter_to_state_dict": "(state_dict, peft_config)",
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge's load_megatron_model loads a checkpoint of adapters together with its base",
)
def adapter_state(model: list, lora: Any) -> dict:
    """Bridge loads adapters only inside its training loop; this names the shards that such a checkpoint holds."""
    from megatron.bridge.training.checkpointing import (
        _generate_model_state_dict,
        apply_peft_adapter_filter_to_state_dict,
    )

    return apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(model, {}), lora)


@patch(
    {
        "megatron.bridge.training.checkpointing:_generate_model_state_dict": (
            "(model, model_sd_kwargs, ckpt_format, *, pg_collection)"
        ),
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge or core names the shards of single weights",
)
def model_state(model: Any, metadata: dict | None) -> dict[str, Any]:
    """{parameter: its shards}, as a checkpoint with this content metadata holds them; Bridge only loads all at once."""
    from megatron.bridge.training.checkpointing import _generate_model_state_dict

    return _generate_model_state_dict([model], {"metadata": metadata})["model"]


@patch(
    {
        "megatron.bridge.models.conversion.auto_bridge:AutoBridge._model_bridge": "property",
        "megatron.bridge.models.conversion.model_bridge:MegatronModelBridge._accumulate_grouped_export": (
            "(self, task, converted_weights_dict, model_config, grouped_buffers, hf_state_dict)"
        ),
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge exports a chosen few weights from memory that is not a model's",
)
def translation(found: Any) -> Any:
    """The MegatronModelBridge of an AutoBridge: Bridge exports a whole model that is in memory, or nothing."""
    return found._model_bridge


@patch(
    {
        "megatron.core.dist_checkpointing.strategies.torch:sharded_tensor_to_torch_sharded_tensor": (
            "(sh_tens, rank, load_legacy_1d_flatten_tensors)"
        ),
        "torch.distributed._shard.sharded_tensor.api:ShardedTensor._init_from_local_shards_and_global_metadata": (
            "(local_shards, sharded_tensor_metadata, process_group, init_rrefs, sharding_spec)"
        ),
        "torch.distributed._shard.sharded_tensor.api:_parse_and_validate_remote_device": "(pg, remote_device)",
    },
    seen="megatron-core 0.19.2, torch 2.15",
    until="one process can load some layers or experts of a checkpoint without the others that share their name",
)
@contextlib.contextmanager
def some_shards() -> Iterator[None]:
    """Core says of shards that nobody asked for that they are the next process's, which in a run of one is this one.

    Torch then misses them. Inside this context they belong to a second process, which need not exist.
    """
    import torch.distributed as dist
    from torch.distributed._shard.sharded_tensor import api

    if dist.get_world_size() > 1:
        yield
        return
    whole, parse = api.ShardedTensor._init_from_local_shards_and_global_metadata, api._parse_and_validate_remote_device

    def make(local_shards, sharded_tensor_metadata, **options):
        mine = {tuple(shard.metadata.shard_offsets) for shard in local_shards}
        for each in sharded_tensor_metadata.shards_metadata:
            if tuple(each.shard_offsets) not in mine:
                each.placement = dist._remote_device("rank:1/cpu")
        return whole(local_shards, sharded_tensor_metadata=sharded_tensor_metadata, **options)

    api.ShardedTensor._init_from_local_shards_and_global_metadata = make
    api._parse_and_validate_remote_device = lambda pg, remote_device: (remote_device.rank(), remote_device.device())
    try:
        yield
    finally:
        api.ShardedTensor._init_from_local_shards_and_global_metadata = whole
        api._parse_and_validate_remote_device = parse


@patch(
    {
        "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker.ensure_initialized": (
            "(self, name, num_layers, device)"
        ),
    },
    seen="megatron-bridge 0.6.2, megatron-core 0.19.2",
    until="Bridge gives a stage without experts as many numbers as core gives the others",
)
def count_layers_of_metrics(layers: int) -> None:
    """Ranks of a pipeline add up what they record of experts, one number per layer of the model: `layers`, those of
    multi-token prediction included. A stage of a hybrid without experts has recorded nothing, and gets from Bridge one
    number per layer of experts: the sum of two lengths is wrong, or never ends."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    ensure = getattr(MoEMetricsTracker.ensure_initialized, "of_core", MoEMetricsTracker.ensure_initialized)

    def ensure_initialized(self: Any, name: str, num_layers: int, device: Any = None) -> None:
        ensure(self, name, layers, device)

    ensure_initialized.of_core = ensure  # type: ignore[attr-defined]
    MoEMetricsTracker.ensure_initialized = ensure_initialized
