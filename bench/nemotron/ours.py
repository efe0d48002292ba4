"""recipes/train.py's own path."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterator

from hydra import compose, initialize_config_dir

from common import ROOT
from common.change import change
from common.clock import Clock
from common.observer import CountingStep, Observer, StepFromMemory
from nemotron import PACK, PATTERN, VOCABULARY
from nemotron_sft.config import TrainConfig, check
from nemotron_sft.train import run
from nemotron_sft.train.start import start_bridge

SLICE = [f"++model.hybrid_layer_pattern={PATTERN}", f"++model.num_layers={len(PATTERN)}", "init_from=random"]
LORA = [
    "peft=lora",
    "++model.recompute_granularity=full",
    "++model.recompute_method=uniform",
    "++model.recompute_num_layers=1",
]


def ours(args: Namespace, row: int, in_memory: bool, lora: bool) -> Iterator[dict]:
    """Rows of `row` tokens, 0: as long as the product chooses. in_memory: the first batches again and again.

    lora: adapters on the whole model, whose frozen weights are random and made in place: a checkpoint of 63 GB is more
    than most machines for a benchmark hold.
    """
    start_bridge()
    import megatron.bridge.training.finetune
    import megatron.bridge.training.gpt_step
    import megatron.bridge.training.pretrain  # noqa: F401

    yield {}
    clock = Clock(["", *(args.segments or [])], args.warm_up, args.steps, args.profiled)
    step = StepFromMemory() if in_memory else CountingStep()
    observer = Observer(clock, lambda: step.so_far()[2], functools.partial(change, step=step))
    overrides = [
        "model=nemotron_3_nano",
        "tracking=disabled",
        "hydra/launcher=basic",
        "hydra/sweeper=basic",
        f"data.path={args.data}",
        f"run_dir={args.out}/runs/{args.name}",
        f"++model.vocab_size={VOCABULARY}",
        f"++model.expert_model_parallel_size={args.experts}",
        f"++train.train_iters={clock.total}",
        f"++train.global_batch_size={args.step_packs * args.processes}",
        *([f"++train.packs_per_microbatch={row // PACK}"] if row else []),
        "++checkpoint.save_interval=0",
        "++validation.eval_interval=1000000",
        "++validation.eval_iters=0",
        "++logger.log_interval=10",
        "++scheduler.lr_warmup_iters=2",
        *([*LORA, f"init_from={without_weights(args)}"] if lora else SLICE),
        *(args.set or []),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", overrides)
    run.train(check(composed, TrainConfig), composed, step, [observer])
    tokens, skipped, _ = step.so_far()
    yield clock.results() | {"skipped_flops": skipped / tokens, "lora": lora}


def without_weights(args: Namespace) -> str:
    """A directory that passes for a checkpoint, while Bridge is kept from loading it."""
    from megatron.bridge.training import setup

    setup.checkpoint_exists = lambda path: True
    setup._load_checkpoint_from_path = lambda *given, **named: (0, 0)
    directory = args.out / "no-weights"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run_config.yaml").write_text("model: {}\n")
    return str(directory)
