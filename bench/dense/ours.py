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
from dense import PACK, STEP_PACKS
from nemotron_sft.config import TrainConfig, check
from nemotron_sft.train import run
from nemotron_sft.train.start import start_bridge


def ours(args: Namespace, row: int, in_memory: bool) -> Iterator[dict]:
    """Rows of `row` tokens. in_memory: the first batches are served again and again from GPU memory."""
    start_bridge()
    import megatron.bridge.training.finetune
    import megatron.bridge.training.gpt_step
    import megatron.bridge.training.pretrain  # noqa: F401

    yield {}
    clock = Clock(["", *(args.segments or [])], args.warm_up, args.steps, args.profiled)
    step = StepFromMemory() if in_memory else CountingStep()
    observer = Observer(clock, lambda: step.so_far()[2], functools.partial(change, step=step))
    overrides = [
        "model=dense_1b",
        "tracking=disabled",
        "hydra/launcher=basic",
        "hydra/sweeper=basic",
        f"data.path={args.data}",
        f"run_dir={args.out}/runs/{args.name}",
        f"++train.train_iters={clock.total}",
        f"++train.packs_per_microbatch={row // PACK}",
        *(args.set or []),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", overrides)
    config = check(composed, TrainConfig)
    run.train(config, composed, step, [observer])
    tokens, skipped, _ = step.so_far()
    yield clock.results() | {"skipped_flops": skipped / tokens * PACK * STEP_PACKS}
