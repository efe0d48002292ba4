"""Numbers that no run can have, and shapes that no model can have: refused before anything is built.

Whatever else Megatron-Bridge and Megatron-Core refuse is said in their words (`check_with_bridge`).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

from nemotron_sft.config import Bridge, TrainConfig
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.train.compat.cpu import adapt
from nemotron_sft.train.topology import layer_kinds, mamba_heads

# What a number must be: whether it is, and the keys whose numbers must.
RULES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "must be at least 0": (
        lambda value: 0 <= value < math.inf,
        (
            "seed", "train.train_iters", "validation.eval_interval", "validation.eval_iters", "heldout.samples",
            "heldout.temperature", "heldout.seed", "checkpoint.save_interval", "optimizer.min_lr",
            "optimizer.weight_decay", "optimizer.clip_grad", "optimizer.adam_eps", "scheduler.lr_warmup_iters",
            "scheduler.lr_warmup_init", "scheduler.start_weight_decay", "scheduler.end_weight_decay",
            "model.init_method_std", "model.mtp_num_layers",
        ),
    ),
    "must be at least 1": (
        lambda value: 1 <= value < math.inf,
        (
            "world_size", "train.global_batch_size", "train.packs_per_microbatch", "train.exit_interval",
            "heldout.interval", "heldout.max_new_tokens", "heldout.batch_size", "logger.log_interval",
            "checkpoint.non_persistent_save_interval", "scheduler.lr_decay_iters", "model.num_layers",
            "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads", "model.num_query_groups",
            "model.kv_channels", "model.seq_length", "model.vocab_size", "model.num_moe_experts",
            "model.moe_router_topk", "model.moe_ffn_hidden_size", "model.mamba_num_heads", "model.mamba_head_dim",
            "model.mamba_num_groups", "model.mamba_state_dim", "model.mamba_chunk_size", "peft.dim",
        ),
    ),
    "must be above 0": (
        lambda value: 0 < value < math.inf,
        (
            "gpu.memory", "gpu.tflops", "train.epochs", "train.exit_duration_in_mins", "optimizer.lr",
            "model.layernorm_epsilon", "model.rotary_base", "peft.alpha",
        ),
    ),
    "must be at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        (
            "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.sgd_momentum", "scheduler.lr_warmup_fraction",
            "model.attention_dropout", "model.hidden_dropout", "peft.dropout",
        ),
    ),
    "must be above 0 and at most 1": (lambda value: 0 < value <= 1, ("heldout.top_p", "model.rotary_percent")),
    "must be at least 1, or -1 for all": (lambda value: value == -1 or value >= 1, ("checkpoint.most_recent_k",)),
}  # fmt: skip
# Keys that Megatron-Bridge has, and overrules or never reads; what to use instead.
INSTEAD = {
    "rng.seed": "set seed, which the order of the data follows as well",
    "train.micro_batch_size": "set train.packs_per_microbatch",
    "checkpoint.save_retain_interval": "Megatron-Bridge does not read it; checkpoint.most_recent_k keeps the newest",
    "logger.log_memory_interval": "Megatron-Bridge does not read it; metrics.jsonl has peak_memory_gib",
    "logger.log_device_memory_used": "Megatron-Bridge does not read it; metrics.jsonl has peak_memory_gib",
    "logger.log_max_attention_logit": "Megatron-Bridge does not read it; remove it",
    "logger.log_num_zeros_in_grad": "Megatron-Bridge does not read it; set optimizer.log_num_zeros_in_grad",
}
# Fields of Bridge's LoggerConfig that nothing reads where logger.skip_train_metrics_log, as on a GPU, is true.
IN_BRIDGES_LINES = (
    "log_params_norm", "log_throughput", "log_throughput_to_tensorboard", "throughput_window_size",
    "tensorboard_log_interval", "log_timers_to_tensorboard", "log_loss_scale_to_tensorboard",
    "log_memory_to_tensorboard", "memory_keys", "log_l2_norm_grad_to_tensorboard", "log_runtime_to_tensorboard",
    "runtime_time_unit", "log_world_size_to_tensorboard",
)  # fmt: skip
OPTIMIZERS = ("adam", "sgd", "muon", "adaptive_muon", "soap", "lion", "dist_muon")  # adam is AdamW
HINTS = {
    "train.epochs": " (train.train_iters=0 only converts weights)",
    "heldout.interval": ", or null: only before and after",
    "optimizer.clip_grad": " (0 clips nothing)",
    "checkpoint.save_interval": " (0 saves nothing)",
}


def check_numbers(config: TrainConfig) -> None:
    """Raise UserError for a number of the user's that no run can have, or a key that has no effect."""
    for name, instead in INSTEAD.items():
        if _given(config, name) is not None:
            raise UserError(f"{name}: {instead}")
    if (optimizer := _given(config, "optimizer.optimizer")) not in (None, *OPTIMIZERS):
        raise UserError(f"optimizer.optimizer={optimizer}: choose adam (which is AdamW), {', '.join(OPTIMIZERS[1:])}")
    for rule, (holds, names) in RULES.items():
        for name in names:
            value = _given(config, name)
            if isinstance(value, int | float) and not holds(value):
                raise UserError(f"{name}={value} {rule}{HINTS.get(name, '')}")


def _given(config: TrainConfig, name: str) -> Any:
    """The value of a key as the user, or a file in conf/, gives it; None without one."""
    section, _, key = name.rpartition(".")
    node = getattr(config, section) if section else config
    own = getattr(node, key, None)
    return node.bridge.get(key) if own is None and isinstance(node, Bridge) else own


def check_logger(logger: Any, given: dict[str, Any]) -> None:
    """Raise UserError for what only Bridge's own lines have, where it writes none.

    logger: Bridge's LoggerConfig, with all settings made; given: the user's own, by key.
    """
    lost = next((key for key in IN_BRIDGES_LINES if given.get(key)), None)
    if lost and logger.skip_train_metrics_log:
        raise UserError(
            f"logger.{lost}: only lines of Megatron-Bridge's own have it, which are off on a GPU: remove it, or add "
            "logger.skip_train_metrics_log=false"
        )


def check_shape(model: Any) -> None:
    """Raise UserError for heads, groups and experts that do not go into one another. model: Bridge's provider."""
    kinds, heads = layer_kinds(model), model.num_attention_heads
    if "attention" in kinds and not model.multi_latent_attention:
        if model.num_query_groups:
            _divides("num_query_groups", model.num_query_groups, "num_attention_heads", heads)
        if model.kv_channels is None:
            _divides("num_attention_heads", heads, "hidden_size", model.hidden_size, ", or set model.kv_channels")
        width = model.kv_channels or model.hidden_size // heads
        if width % 2 and model.position_embedding_type in ("rope", "yarn"):
            raise UserError(f"model.kv_channels={width}: rotary positions turn pairs, so it must be even")
    if "mamba" in kinds:
        _divides("mamba_num_groups", model.mamba_num_groups, "mamba_num_heads", mamba_heads(model))
    if "moe" in kinds:
        if model.num_moe_experts is None:
            raise UserError("model.num_moe_experts=none, but model.hybrid_layer_pattern has layers of experts (E)")
        if model.moe_router_topk > model.num_moe_experts:
            raise UserError(
                f"model.moe_router_topk={model.moe_router_topk} is more than model.num_moe_experts="
                f"{model.num_moe_experts}: a token cannot go to more experts than there are"
            )
    if model.normalization not in ("LayerNorm", "RMSNorm"):
        raise UserError(f"model.normalization={model.normalization}: choose LayerNorm or RMSNorm")


def _divides(key: str, divisor: int, other: str, number: int, hint: str = "") -> None:
    if number % divisor:
        raise UserError(f"model.{other}={number} is not a multiple of model.{key}={divisor}: change one of them{hint}")


def check_with_bridge(container: Any, replicas: int, on_cpu: bool, planned: bool = False) -> None:
    """Raise UserError, in their words, for what Megatron-Bridge and Megatron-Core refuse of a whole ConfigContainer.

    Bridge asks itself later, when the model is about to be built. on_cpu: what is turned off there is not looked at.
    planned: the run is for other machines than this one.
    """
    model = container.model
    if on_cpu and not planned and model.mtp_num_layers and not getattr(model, "is_hybrid_model", False):
        raise UserError("model.mtp_num_layers: heads of a GPT need a GPU; set it to null, or take a hybrid model")
    container = copy.deepcopy(container)
    if on_cpu:
        adapt(container)
    if on_cpu and planned:  # a GPU's optimizer may have other dtypes, which adapt cannot know
        container.optimizer = type(container.optimizer)(optimizer="adam", lr=container.optimizer.lr)
    container.data_parallel_size = replicas
    if container.checkpoint.pretrained_checkpoint:  # checkpoints.starting_point looks at it; it may be elsewhere
        container.checkpoint.pretrained_checkpoint = os.curdir
    try:
        container.validate()
    except (AssertionError, ValueError, ArithmeticError, TypeError, NotImplementedError) as error:
        raise UserError(f"Megatron-Bridge refuses these settings: {first_line(error)}") from error
