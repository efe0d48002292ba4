"""Megatron-Bridge as it comes: _sft_common, its own packed Parquet dataset, its own forward step."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from common.change import change
from common.clock import Clock
from common.observer import Observer, TimedStep
from dense import FFN, GROUPS, HEADS, HIDDEN, LAYERS, PACK, STEP_PACKS, VOCABULARY
from nemotron_sft.train.compat.cpu import adapt
from nemotron_sft.train.start import start_bridge


def bridge(args: Namespace) -> Iterator[dict]:
    """pretrain() on _sft_common's config, changed only where the data and the model demand it."""
    machine = start_bridge()
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.pretrain import pretrain

    yield {}
    clock = Clock(["", *(args.segments or [])], args.warm_up, args.steps, args.profiled)
    container = configure(args, clock.total)
    if machine.on_cpu:
        adapt(container)
        data = container.dataset
        data.num_workers, data.pin_memory, data.persistent_workers = 0, False, False
    step = TimedStep(gpt_step.forward_step)
    callbacks = CallbackManager()
    Observer(clock, lambda: step.waited, change).register(callbacks)
    pretrain(container, step, callbacks=callbacks)
    yield clock.results()


def configure(args: Namespace, steps: int) -> Any:
    """Bridge's ConfigContainer for `steps` steps."""
    from megatron.bridge.recipes.common import _sft_common
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    NullTokenizer.eos_id = 0  # Bridge's dataset pads with it
    container = _sft_common()
    container.model = model(json.loads(args.size))
    container.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1)
    point_to(container.dataset, args.data)
    container.train.train_iters, container.train.global_batch_size = steps, STEP_PACKS
    container.validation.eval_iters = 0
    container.scheduler.lr_warmup_iters = 5
    container.checkpoint.save = container.checkpoint.load = None
    container.logger.tensorboard_dir = str(args.out / "runs" / args.name / "tensorboard")
    return container


def model(changes: dict) -> Any:
    """The provider of conf/model/dense_1b.yaml's model, with fields changed."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    fields = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
        "num_query_groups": GROUPS, "normalization": "RMSNorm", "position_embedding_type": "rope",
        "rotary_base": 500000, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "share_embeddings_and_output_weights": False, "vocab_size": VOCABULARY, "seq_length": PACK,
        "gradient_accumulation_fusion": False,  # needs APEX in the output layer
    }  # fmt: skip
    return GPTModelProvider(**fields | changes)


def point_to(data: Any, directory: Any) -> None:
    """Let Bridge's dataset config read our packed Parquet file, and nothing from the hub."""
    from megatron.bridge.data.packing import PackedSequenceSpecs

    data.seq_length, data.dataset_root, data.do_validation, data.do_test = PACK, str(directory), False, False
    data.hf_dataset = data.hf_validation_dataset = data.hf_test_dataset = None
    data.hf_output_root = data.hf_validation_proportion = None
    data.hf_rewrite = False
    data.offline_packing_specs = PackedSequenceSpecs(
        packed_sequence_size=PACK, packed_train_data_path=str(directory / "training.idx.parquet"), pad_seq_to_mult=1
    )
