"""The composed Hydra config -> Megatron-Bridge's ConfigContainer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path

from nemotron_sft.config import TrainConfig
from nemotron_sft.console import say
from nemotron_sft.errors import UserError
from nemotron_sft.train import estimate, hf, peft, tuning, values
from nemotron_sft.train.balance import Dealing
from nemotron_sft.train.batches import PLAIN, dataset_names, packed_dataset_provider, weighting
from nemotron_sft.train.checkpoints import is_hf, newest_iteration
from nemotron_sft.train.limits import check_logger, check_numbers, check_shape
from nemotron_sft.train.start import Machine
from nemotron_sft.train.topology import check_topology, layers_of

# Sections whose keys are set on the field of the same name of the ConfigContainer.
SECTIONS = ("model", "train", "validation", "optimizer", "scheduler", "checkpoint", "ddp", "logger", "dist", "rng")
SPLITS = ("training", "validation", "test")
Tell = Callable[[str], None]  # prints a line, on rank 0


def build(
    config: TrainConfig,
    metadata: dict | None,
    data_dir: Path | None,
    run_dir: Path,
    machine: Machine,
    checked: bool = True,
    tell: Tell = say,
):
    """Build the ConfigContainer of a run.

    metadata is the prep output's metadata.json: pack size, vocabulary and the number of packs come from there.
    Without data (a preflight) both are None, and the model's own pack size and vocabulary stand.
    checked=False leaves `check_division` to the caller. tell is given lines about what may surprise.
    Raises UserError for settings that cannot work together.
    """
    check_numbers(config)
    container = _base(config)
    _settings(container, config, machine)
    check_shape(container.model)
    packs = _data_shape(container.model, config, metadata, data_dir)
    _token_weighting(container)
    _rows(container, config, machine)
    if checked:
        check_division(container, machine.world_size)
    tell = tell if machine.rank == 0 else _silent
    _length(container, config, packs, max(1, replicas(container.model, machine.world_size)), tell)
    _schedule(container, config, tell)
    _dataset(container, config, metadata, data_dir, machine)
    _checkpoints(container, config, run_dir)
    if metadata and is_hf(container.checkpoint.pretrained_checkpoint):
        hf.load_config(config.init_from)  # Bridge converts while it loads
    _logs(container, config, run_dir)
    if config.profile:
        container.profiling = tuning.profiling(container.train.train_iters)
    return container


def _settings(container, config: TrainConfig, machine: Machine) -> None:
    """Everything that has a key: what is fast on a GPU first, then the user's own sections."""
    if config.precision is not None:
        container.mixed_precision = tuning.mixed_precision(config.precision)
    if not machine.on_cpu:
        tuning.tune(container, machine.world_size)
    for section in SECTIONS:
        values.apply(getattr(config, section), getattr(container, section), section)
    _precision_and_overlap(container, config)
    tuning.fit_dispatcher(container.model)
    if not machine.on_cpu:
        tuning.let_adam_keep_master_weights(container)
        if "bias_activation_fusion" not in config.model.bridge:
            tuning.fuse_activation(container.model)
    if getattr(container.model, "hybrid_layer_pattern", None):
        container.model.is_hybrid_model = True  # a bare HybridModelProvider does not say so, and Bridge's step asks
        _check_pattern(container.model)
    container.peft = _peft(config, container.model)


def _check_pattern(model) -> None:
    """Raise UserError where a hybrid's pattern and its number of layers differ."""
    layers = len(layers_of(model))
    if model.num_layers not in (None, layers):
        pattern = f"model.hybrid_layer_pattern={model.hybrid_layer_pattern}"
        raise UserError(f"model.num_layers={model.num_layers}, but {pattern} has {layers}: set both")


def _precision_and_overlap(container, config: TrainConfig) -> None:
    """The two sections that Bridge may keep as a name, or not have at all."""
    if "seed" in config.rng.bridge:
        raise UserError("rng.seed: set seed, which the order of the data follows as well")
    container.rng.seed = config.seed
    if values.given(config.mixed_precision):
        from megatron.bridge.training.mixed_precision import MixedPrecisionConfig, get_mixed_precision_config

        name = container.mixed_precision
        container.mixed_precision = get_mixed_precision_config(name) if name else MixedPrecisionConfig()
        values.apply(config.mixed_precision, container.mixed_precision, "mixed_precision")
    _check_reduction(container, config)
    if values.given(config.comm_overlap):
        from megatron.bridge.training.comm_overlap import CommOverlapConfig

        container.comm_overlap = container.comm_overlap or CommOverlapConfig(tp_comm_overlap=False)
        values.apply(config.comm_overlap, container.comm_overlap, "comm_overlap")


def _check_reduction(container, config: TrainConfig) -> None:
    """Raise UserError for a key that Bridge would overrule."""
    asked, numbers = config.ddp.bridge.get("grad_reduce_in_fp32"), estimate.precision(container)
    if asked is not None and numbers is not None and asked != numbers.grad_reduce_in_fp32:
        raise UserError("ddp.grad_reduce_in_fp32: set mixed_precision.grad_reduce_in_fp32, which Bridge copies to it")


def _data_shape(model, config: TrainConfig, metadata: dict | None, data_dir: Path | None) -> dict[str, int]:
    """Take vocabulary and pack size from the data; return the number of packs per split."""
    if not metadata:
        if model.vocab_size is None:
            raise UserError(
                f"model {config.model.name} takes its vocabulary from the data: prepare it, or give data=PATH"
            )
        return dict.fromkeys(SPLITS, 0)
    _fit_vocabulary(model, metadata["tokenizer"])
    asked, size = config.model.bridge.get("seq_length"), metadata["pack_size"]
    if asked not in (None, size):
        raise UserError(f"model.seq_length={asked}, but the packs of {data_dir} hold {size} tokens: prepare others")
    model.seq_length = size
    packs = {split: metadata["splits"][split]["packs"] for split in SPLITS}
    if not packs["training"]:
        raise UserError(f"{data_dir} has no training packs: prepare more data, or give training a larger ratio")
    return packs


def _token_weighting(container) -> None:
    """Exact token weighting: the loss is the mean over all trained tokens of the global batch."""
    container.model.calculate_per_token_loss = True
    container.ddp.average_in_collective = False


def _rows(container, config: TrainConfig, machine: Machine) -> None:
    """Choose how many packs form a row."""
    model, train = container.model, container.train
    if config.train.packs_per_microbatch:
        train.micro_batch_size = config.train.packs_per_microbatch
    elif not machine.on_cpu:
        train.micro_batch_size = tuning.packs_per_row(container, machine.world_size, machine.gpu_bytes)
    # Pipeline stages expect rows of one pack; of several joined, or padded for context parallelism, they must be told.
    longer = train.micro_batch_size > 1 or model.context_parallel_size > 1
    if longer and model.pipeline_model_parallel_size > 1:
        model.variable_seq_lengths = True
        if model.moe_token_dispatcher_type == "allgather":  # core refuses it for such rows, even without experts
            model.moe_token_dispatcher_type = "alltoall"


def check_division(container, world_size: int) -> None:
    """Raise UserError with one line if rows, model or batch cannot be divided over this many processes as asked."""
    model, train = container.model, container.train
    check_topology(model, world_size, train.micro_batch_size * model.seq_length)
    ranks = replicas(model, world_size)
    step = train.micro_batch_size * ranks
    if train.global_batch_size % step:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of {step} (packs_per_microbatch "
            f"{train.micro_batch_size} x {ranks} data-parallel ranks): "
            f"use {math.ceil(train.global_batch_size / step) * step}"
        )


def _silent(line: str) -> None:
    """What the other ranks say."""


def _length(container, config: TrainConfig, packs: dict[str, int], ranks: int, tell: Tell) -> None:
    """How many steps are trained, and how many are validated at a time."""
    train, validation = container.train, container.validation
    if packs["training"]:
        _check_step(config, packs["training"], train.global_batch_size, tell)
    if config.train.epochs is not None:  # wins over train_iters, which most model configs set
        train.train_iters = max(1, math.ceil(config.train.epochs * packs["training"] / train.global_batch_size))
    step = train.micro_batch_size * ranks
    validation.eval_micro_batch_size, validation.eval_global_batch_size = train.micro_batch_size, step
    if config.validation.eval_iters is None:  # everything, once
        validation.eval_iters = math.ceil(max(packs["validation"], packs["test"]) / step)
    if packs["training"] and not packs["validation"] and validation.eval_interval and validation.eval_iters:
        tell("the data has no validation packs: nothing is validated (validation.eval_interval=0 says so)")


def _check_step(config: TrainConfig, packs: int, step: int, tell: Tell) -> None:
    """Say that the data is read several times in a step; raise UserError where that is more than was asked for."""
    if step <= packs:
        return
    key = f"train.global_batch_size={step} is more than the {packs} training packs"
    if config.train.epochs is not None and config.train.epochs < step / packs:
        raise UserError(f"{key}: a step would be {step / packs:.3g} epochs; take {packs} or less, or prepare more data")
    tell(f"{key}: a step reads the data {step / packs:.3g} times")


def _schedule(container, config: TrainConfig, tell: Tell) -> None:
    """Weight decay and the length of the learning rate's decay."""
    scheduler = container.scheduler
    # Bridge decays weights by the scheduler's pair of values, not by the optimizer's, which the user sets.
    if config.optimizer.weight_decay is not None or scheduler.start_weight_decay is None:
        scheduler.start_weight_decay = scheduler.end_weight_decay = container.optimizer.weight_decay
    scheduler.override_opt_param_scheduler = True  # after a resume, too, the config decides
    if "lr_decay_iters" not in config.scheduler.bridge:
        scheduler.lr_decay_iters = None  # the whole run, whatever length the recipe had in mind
    rate, least = container.optimizer.lr, container.optimizer.min_lr or 0.0
    if rate is None:
        raise UserError("optimizer.lr is not set, and the model's recipe has none: set it")
    if rate < least:  # the model's, or the recipe's, and core refuses it
        container.optimizer.min_lr = rate
        tell(f"optimizer.min_lr={least} is above optimizer.lr={rate}: the rate stays at {rate} (set min_lr as well)")
    decay = scheduler.lr_decay_iters or container.train.train_iters
    if 0 < decay <= scheduler.lr_warmup_iters:  # Bridge cuts it
        tell(f"scheduler.lr_warmup_iters={scheduler.lr_warmup_iters}: the rate rises until the end, step {decay}")


def _dataset(container, config: TrainConfig, metadata: dict | None, data_dir: Path | None, machine: Machine) -> None:
    """Point Bridge to the packs."""
    model, validation = container.model, container.validation
    container.dataset = packed_dataset_provider(
        path=str(data_dir),
        packs={split: metadata["splits"][split]["packs"] if metadata else 0 for split in SPLITS},
        evaluated=validation.eval_iters * validation.eval_global_batch_size,
        seed=config.seed,
        ranks=(model.context_parallel_size, model.tensor_model_parallel_size),
        mtp_depth=model.mtp_num_layers or 0,
        dealing=Dealing(
            container.train.global_batch_size, replicas(model, machine.world_size), container.train.micro_batch_size
        ),
        weighting=weighting(metadata, config.train.loss_per) if metadata else PLAIN,
        sources=len(dataset_names(metadata)) if metadata else 0,
        # On a GPU a process of its own makes the next rows, and a thread pins them, while the step runs.
        num_workers=0 if machine.on_cpu else 1,
        pin_memory=not machine.on_cpu,
    )


def _checkpoints(container, config: TrainConfig, run_dir: Path) -> None:
    """Where checkpoints are saved, and what is loaded."""
    checkpoint = container.checkpoint
    if "dist_ckpt_strictness" not in config.checkpoint.bridge:
        # The log_all of Nemotron's recipes compares keys through metadata of torch 2.15's that core 0.19 cannot read.
        checkpoint.dist_ckpt_strictness = "assume_ok_unexpected"
    checkpoint.save = str(run_dir / "checkpoints")
    checkpoint.load = resume_from(config, run_dir)
    # What a resumed run started from may be gone by now; only adapters need it again.
    fresh = config.init_from != "random" and (not checkpoint.load or container.peft is not None)
    checkpoint.pretrained_checkpoint = config.init_from if fresh else None


def _logs(container, config: TrainConfig, run_dir: Path) -> None:
    """TensorBoard's files and Bridge's full config, in the run directory. Raises UserError for Bridge's W&B keys."""
    container.logger.tensorboard_dir = str(run_dir / "tensorboard")
    container.logger.save_config_filepath = str(run_dir / "megatron.yaml")
    container.logger.filter_warnings = True
    if any(key.startswith("wandb_") for key in config.logger.bridge):
        raise UserError("logger.wandb_*: use tracking=wandb, with tracking.project, tracking.entity, tracking.name")
    check_logger(container.logger, config.logger.bridge)
    container.logger.wandb_project = None  # nemotron_sft/record/wandb.py says why


def resume_from(config: TrainConfig, run_dir: Path) -> str | None:
    """The checkpoint to continue from: the run's own newest once it has one, else checkpoint.load."""
    own = newest_iteration(run_dir / "checkpoints")
    return str(own) if own else config.checkpoint.load


def _base(config: TrainConfig):
    """The ConfigContainer to start from: what model.recipe returns, or plain defaults around the model alone."""
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    # The data is tokenized already; Bridge insists on a tokenizer only for its size.
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1)
    if config.model.recipe:
        with hf.configs_of(_architecture(config)):
            container = _recipe(config.model.recipe)()
        container.tokenizer = tokenizer
        return container

    from megatron.bridge.training import config as bridge

    if config.model.provider:
        model = _provider(config)
    else:
        model = hf.auto_bridge(_architecture(config)).to_megatron_provider(load_weights=False)
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(global_batch_size=8, micro_batch_size=1),
        optimizer=bridge.OptimizerConfig(optimizer="adam"),
        scheduler=bridge.SchedulerConfig(),
        dataset=None,
        logger=bridge.LoggerConfig(),
        tokenizer=tokenizer,
        checkpoint=bridge.CheckpointConfig(),
        mixed_precision="bf16_mixed",
    )


def _architecture(config: TrainConfig) -> str:
    """Where the architecture is read from: the directory that training starts from if it has one, else model.hf."""
    return config.init_from if Path(config.init_from, "config.json").exists() else config.model.hf


def _recipe(name: str):
    """A function below megatron.bridge.recipes."""
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"model.recipe={name}: no such function below megatron.bridge.recipes ({error})") from None


def _provider(config: TrainConfig):
    """A model described by the keys of `model` alone."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    known = {"GPTModelProvider": GPTModelProvider, "HybridModelProvider": HybridModelProvider}
    if config.model.provider not in known:
        raise UserError(f"model.provider={config.model.provider}: choose one of {', '.join(known)}")
    given = config.model.bridge
    first = ("num_layers", "hidden_size", "num_attention_heads")  # the constructor insists on them
    return known[config.model.provider](**{key: given[key] for key in first if key in given})


def _peft(config: TrainConfig, model):
    """Bridge's adapters for a model provider, or None."""
    if config.peft.scheme is None:
        return None
    known = peft.schemes()
    if config.peft.scheme not in known:
        raise UserError(f"peft.scheme={config.peft.scheme}: choose {', '.join(known)}, or null")
    if config.init_from == "random":
        raise UserError(f"peft.scheme={config.peft.scheme} adapts a trained model: set init_from to one")
    adapters = known[config.peft.scheme]()
    adapters.target_modules = None  # Bridge's own default forgets Mamba
    values.apply(config.peft, adapters, "peft")
    peft.settle(adapters, model)
    return adapters


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


def replicas(model, world_size: int) -> int:
    """Number of data-parallel ranks."""
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    return world_size // (tensor * pipeline * model.context_parallel_size)
