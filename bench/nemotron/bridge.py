"""Megatron-Bridge as it comes: nemotron_3_nano_sft_config, its own packed Parquet dataset, its own forward step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from common.change import change
from common.clock import Clock
from common.observer import Observer, TimedStep
from dense.bridge import point_to
from nemotron import PATTERN, VOCABULARY
from nemotron_sft.train import hf, tuning
from nemotron_sft.train.start import start_bridge


def bridge(args: Namespace) -> Iterator[dict]:
    """pretrain() on the recipe's config, changed only where the data, the slice and one GPU demand it."""
    start_bridge()
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.pretrain import pretrain

    yield {}
    clock = Clock([""], args.warm_up, args.steps, args.profiled)
    step = TimedStep(gpt_step.forward_step)
    callbacks = CallbackManager()
    Observer(clock, lambda: step.waited, change).register(callbacks)
    pretrain(configure(args, clock.total), step, callbacks=callbacks)
    yield clock.results() | {"skipped_flops": 0.0}  # logits of every token


def configure(args: Namespace, steps: int) -> Any:
    """Bridge's ConfigContainer for `steps` steps."""
    from megatron.bridge.recipes.nemotronh.nemotron_3_nano import nemotron_3_nano_sft_config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    NullTokenizer.eos_id = 0  # Bridge's dataset pads with it
    with hf.configs_of("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"):
        container = nemotron_3_nano_sft_config()
    model = container.model
    model.hybrid_layer_pattern, model.num_layers = PATTERN, len(PATTERN)
    model.vocab_size, model.seq_length = VOCABULARY, 4096
    model.expert_model_parallel_size = 1
    model.moe_token_dispatcher_type = "alltoall"  # the recipe's DeepEP wants several GPUs
    tuning.use_what_is_installed(model)
    model.gradient_accumulation_fusion = False  # needs APEX in the output layer
    container.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1)
    point_to(container.dataset, args.data)
    container.train.train_iters, container.train.global_batch_size = steps, args.step_packs
    container.train.micro_batch_size = 1
    container.validation.eval_iters = 0
    container.scheduler.lr_warmup_iters, container.scheduler.lr_decay_iters = 2, None
    container.checkpoint.save = container.checkpoint.load = container.checkpoint.pretrained_checkpoint = None
    container.logger.tensorboard_dir = str(args.out / "runs" / args.name / "tensorboard")
    return container
