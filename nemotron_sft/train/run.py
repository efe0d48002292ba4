"""One training run: its directory and processes, Megatron-Bridge's own loop, and the report at the end."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemotron_sft.config import TrainConfig
from nemotron_sft.data.packed import check_data, find_data
from nemotron_sft.errors import UserError
from nemotron_sft.paths import STARTED
from nemotron_sft.record import wandb
from nemotron_sft.train import checkpoints, export, tracked
from nemotron_sft.train.checkpoints import starting_point
from nemotron_sft.train.container import build, resume_from
from nemotron_sft.train.start import log_to_file, start_bridge


def train(config: TrainConfig, composed: DictConfig) -> None:
    """Fine-tune as configured. Leaves a self-contained run directory:

    <run_dir>/
        config.yaml      the resolved config       command.txt   what was typed
        metrics.jsonl    a line per logged step    loss.png      training and validation loss
        heldout.json     answers before and after  checkpoints/  Megatron checkpoints
        megatron.yaml    Bridge's full config      logs/         Megatron's own output, one file per rank
        lineage.json     where all of it is from   wandb/        Weights & Biases' own files

    Raises UserError for what the user can mend.
    """
    if config.preflight:
        return plan(config)
    if config.export.run:
        return export.export_run(config)
    wandb.check(config.tracking)
    # Idle OpenMP threads sleep instead of spinning: 5 % slower on an idle machine, 10 times faster on a shared one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_cpu = not torch.cuda.is_available()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "gloo" if on_cpu else "nccl"
    if world_size > 1:
        torch.distributed.init_process_group(backend)
    tracked.resolve_names(config, rank, world_size)
    data_dir = find_data(config.data.path, config.output_dir)
    metadata = check_data(data_dir, config.data.verify if rank == 0 else "sizes")
    run_dir = agree_on_run_dir(config, rank, world_size)
    composed.data.path = str(data_dir)  # a resumed run, or an export, means the same data whatever is newest by then
    if config.peft.scheme or not resume_from(config, run_dir):
        config.init_from = starting_point(config.init_from) or "random"
    created = rank == 0 and not run_dir.exists()
    if rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run directory {run_dir} ({error.strerror}): set run_dir") from None
        OmegaConf.save(composed, run_dir / "config.yaml", resolve=True)
        (run_dir / "command.txt").write_text(shlex.join([sys.executable, *sys.argv]) + "\n")
        print(f"data {data_dir}  run directory {run_dir}", flush=True)

    with log_to_file(run_dir / "logs" / f"rank{rank}.log") as terminal:
        start_bridge()
        from megatron.bridge.training.callbacks import CallbackManager
        from megatron.bridge.training.finetune import finetune
        from megatron.bridge.training.pretrain import pretrain

        from nemotron_sft.train.evaluation import Heldout
        from nemotron_sft.train.progress import Progress
        from nemotron_sft.train.report import summarise
        from nemotron_sft.train.signals import saving_on_sigterm
        from nemotron_sft.train.step import ForwardStep

        if on_cpu:
            from nemotron_sft.train.compat.cpu import adapt
        imported = time.time() - STARTED
        gpu_bytes = None if on_cpu else torch.cuda.get_device_properties().total_memory
        try:
            container = build(config, metadata, data_dir, run_dir, world_size, gpu_bytes)
            if on_cpu:
                adapt(container)
        except UserError:
            if created:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise
        if not container.train.train_iters:
            if world_size > 1:
                raise UserError("train.train_iters=0 only converts weights, in one process: start it without torchrun")
            checkpoints.convert(container.model, config.init_from, run_dir / "checkpoints", on_cpu)
            if config.export.hf:
                print(export.export(run_dir, config.export.path, on_cpu), file=terminal)
            return
        if world_size == 1:  # with a store of its own: Bridge would listen on a port that only one run can have
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        callbacks = CallbackManager()
        forward_step = ForwardStep()
        progress = Progress(metadata, run_dir, terminal, STARTED, rank, forward_step)
        heldout = Heldout(config, metadata, run_dir, rank)
        for observer in (heldout, progress):  # in this order: answering before training is no part of step 1
            observer.register(callbacks)
        run = pretrain if config.init_from == "random" and not config.checkpoint.load else finetune
        with (
            tracked.Training(config, composed, metadata, data_dir, run_dir, rank, terminal) as progress.tracked,
            saving_on_sigterm(container, run_dir, rank, terminal),
        ):
            progress.tracked.register(callbacks)
            run(container, forward_step, callbacks=callbacks)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if rank == 0:
            heldout.after(run_dir / "checkpoints", on_cpu)
            if config.export.hf:
                print(export.export(run_dir, config.export.path, on_cpu), file=terminal)
            summarise(progress, heldout, run_dir, imported, terminal)


def plan(config: TrainConfig) -> None:
    """Print what the run would need, on any machine and without weights; see `preflight`. Data may still be missing."""
    tasks = config.cluster.get("tasks_per_node") or config.cluster.get("gpus_per_node") or 1
    given = config.cluster.get("nodes", 1) * tasks
    world_size = config.world_size or int(os.environ.get("WORLD_SIZE", given))
    data_dir = metadata = None
    with contextlib.suppress(UserError):  # it may not have been prepared yet
        data_dir = find_data(config.data.path, config.output_dir)
    if data_dir and data_dir.exists():
        metadata = check_data(data_dir)
    with log_to_file(Path(os.devnull)):
        start_bridge()
        from nemotron_sft.train import estimate

        container = build(config, metadata, data_dir, Path(config.run_dir or config.output_dir), world_size)
        rows = estimate.describe(container, metadata, world_size)
    rows["data"] = str(data_dir) if metadata else "none yet"
    rows["starts from"] = config.init_from
    print(f"Preflight of {config.name}: nothing was allocated or written")
    for name, text in rows.items():
        print(f"  {name:<16} {text}")


def agree_on_run_dir(config: TrainConfig, rank: int, world_size: int) -> Path:
    """The run directory, the same on every rank: rank 0 names it."""
    name = config.run_dir
    if name is None:
        date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = str(Path(config.output_dir, "train", f"{config.name}-{date}"))
    if world_size > 1:
        import torch

        box = [name]
        torch.distributed.broadcast_object_list(box, src=0)
        name = box[0]
    return Path(name)
