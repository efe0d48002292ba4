"""The composed Hydra config -> Megatron-Bridge's ConfigContainer."""

from __future__ import annotations

import importlib
import math
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from nemotron_sft.config import TrainConfig
from nemotron_sft.errors import UserError

# Sections whose keys are set on the field of the same name of the ConfigContainer.
SECTIONS = ("model", "train", "validation", "optimizer", "scheduler", "checkpoint", "ddp", "logger", "dist")
# Keys of ours that are not a field of that Bridge dataclass; `build` derives what Bridge needs from them.
OURS = {"name", "recipe", "provider", "epochs", "packs_per_microbatch", "load", "bridge"}


def build(config: TrainConfig, metadata: dict, data_dir: Path, run_dir: Path, world_size: int):
    """Build the ConfigContainer of a run.

    metadata is the prep output's metadata.json: pack size, vocabulary and the number of packs come from there.
    Raises UserError for settings that cannot work together.
    """
    container = _base(config)
    for section in SECTIONS:
        _apply(getattr(config, section), getattr(container, section), section)
    model, train = container.model, container.train

    _fit_vocabulary(model, metadata["tokenizer"])
    model.seq_length = metadata["pack_size"]
    # Exact token weighting: the loss is the mean over all trained tokens of the global batch.
    model.calculate_per_token_loss = True
    container.ddp.average_in_collective = False

    packs = {split: metadata["splits"][split]["packs"] for split in ("training", "validation", "test")}
    if not packs["training"]:
        raise UserError(
            f"{data_dir} has no training packs: prepare more data, or give training a larger ratio"
        )
    train.micro_batch_size = config.train.packs_per_microbatch or train.micro_batch_size
    step = train.micro_batch_size * _replicas(model, world_size)
    if train.global_batch_size % step:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of {step} (packs_per_microbatch "
            f"{train.micro_batch_size} x {step // train.micro_batch_size} data-parallel ranks): "
            f"use {math.ceil(train.global_batch_size / step) * step}"
        )
    if config.train.epochs is not None:  # wins over train_iters, which most model configs set
        train.train_iters = max(
            1, math.ceil(config.train.epochs * packs["training"] / train.global_batch_size)
        )

    validation = container.validation
    validation.eval_micro_batch_size, validation.eval_global_batch_size = train.micro_batch_size, step
    if config.validation.eval_iters is None:  # everything, once
        validation.eval_iters = math.ceil(max(packs["validation"], packs["test"]) / step)

    # Bridge decays weights by the scheduler's pair of values, not by the optimizer's, which the user sets.
    scheduler = container.scheduler
    if config.optimizer.weight_decay is not None or scheduler.start_weight_decay is None:
        scheduler.start_weight_decay = scheduler.end_weight_decay = container.optimizer.weight_decay

    scheduler.override_opt_param_scheduler = True  # after a resume, too, the config decides

    container.dataset = _dataset(config, data_dir, packs, validation.eval_iters * step)
    container.rng.seed = config.seed
    checkpoint = container.checkpoint
    checkpoint.save = str(run_dir / "checkpoints")
    checkpoint.load = resume_from(config, run_dir)
    checkpoint.pretrained_checkpoint = None if config.init_from == "random" else config.init_from
    container.logger.tensorboard_dir = str(run_dir / "tensorboard")
    container.logger.save_config_filepath = str(run_dir / "megatron.yaml")
    container.logger.filter_warnings = True
    if any(key.startswith("wandb_") for key in config.logger.bridge):
        raise UserError("logger.wandb_*: use tracking=wandb, with tracking.project, tracking.entity, tracking.name")
    container.logger.wandb_project = None  # nemotron_sft.tracking says why
    return container


def resume_from(config: TrainConfig, run_dir: Path) -> str | None:
    """The checkpoint directory to continue from: the run's own once it has one, else checkpoint.load."""
    own = run_dir / "checkpoints"
    if (own / "latest_checkpointed_iteration.txt").exists() or (own / "latest_train_state.pt").exists():
        return str(own)
    return config.checkpoint.load


def _base(config: TrainConfig):
    """The ConfigContainer to start from: what model.recipe returns, or plain defaults around model.provider."""
    if config.model.recipe:
        module, _, function = config.model.recipe.rpartition(".")
        return getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), function)()

    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    provider = {"GPTModelProvider": GPTModelProvider, "HybridModelProvider": HybridModelProvider}[
        config.model.provider
    ]
    own = config.model.bridge
    model = provider(
        **{key: own[key] for key in ("num_layers", "hidden_size", "num_attention_heads") if key in own}
    )
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(global_batch_size=8, micro_batch_size=1),
        optimizer=bridge.OptimizerConfig(optimizer="adam"),
        scheduler=bridge.SchedulerConfig(),
        dataset=None,
        logger=bridge.LoggerConfig(),
        # The data is tokenized already; Bridge insists on a tokenizer only for its size.
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1),
        checkpoint=bridge.CheckpointConfig(),
        mixed_precision="bf16_mixed",
    )


def _apply(section: Any, target: Any, name: str) -> None:
    """Set every key of a config section that is not null on the Bridge dataclass it configures."""
    values = {key: value for key, value in vars(section).items() if key not in OURS and value is not None}
    values |= getattr(section, "bridge", {})
    hints = get_type_hints(type(target))
    for key, value in values.items():
        if not hasattr(target, key):
            raise UserError(f"{name}.{key} is not a field of {type(target).__name__}: remove it")
        setattr(target, key, _convert(value, hints.get(key, Any), f"{name}.{key}"))


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type: enum members by name, ints as floats, and an error for a plain mismatch."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, Enum) and isinstance(value, str):
            if value not in kind.__members__:
                raise UserError(f"{path}={value}: choose one of {', '.join(kind.__members__)}")
            return kind[value]
    if float in kinds and type(value) is int and int not in kinds:
        return float(value)
    scalars = [kind for kind in kinds if kind in (bool, int, float, str)]
    if scalars and len(scalars) == len([k for k in kinds if k is not type(None)]) and value is not None:
        if type(value) not in scalars:
            raise UserError(f"{path}={value!r} should be of type {' or '.join(k.__name__ for k in scalars)}")
    return value


def _fit_vocabulary(model, tokenizer: dict) -> None:
    """Take the vocabulary size from the data unless the model fixes it; refuse data with ids beyond it."""
    needed = tokenizer["vocab_size"]
    if model.vocab_size is None:
        multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
        model.vocab_size = math.ceil(needed / multiple) * multiple
    if model.vocab_size < needed:
        raise UserError(
            f"the data has {needed} token ids (tokenizer {tokenizer['model']}) but the model only {model.vocab_size}: "
            f"prepare the data with the model's own tokenizer"
        )
    model.should_pad_vocab = False


def _replicas(model, world_size: int) -> int:
    """Number of data-parallel ranks."""
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    parallel = tensor * pipeline * model.context_parallel_size
    if world_size % parallel:
        raise UserError(
            f"{world_size} processes cannot be divided into model-parallel groups of {parallel} (tensor {tensor} x "
            f"pipeline {pipeline} x context {model.context_parallel_size}): start a multiple of {parallel}"
        )
    return world_size // parallel


def _dataset(config: TrainConfig, data_dir: Path, packs: dict[str, int], evaluated: int):
    from nemotron_sft.megatron.data import packed_dataset_provider

    return packed_dataset_provider(
        path=str(data_dir),
        packs=packs,
        evaluated=evaluated,
        seed=config.seed,
        num_workers=0,
        pin_memory=False,
    )
