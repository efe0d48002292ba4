"""One training run: its directory and processes, Megatron-Bridge's own loop, and the report at the end."""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from omegaconf import DictConfig, OmegaConf

from nemotron_sft.config import TrainConfig
from nemotron_sft.console import say
from nemotron_sft.data.packed import find_data
from nemotron_sft.data.whole import check_data
from nemotron_sft.errors import UserError
from nemotron_sft.files import AtomicFile
from nemotron_sft.paths import STARTED, TYPED
from nemotron_sft.record import wandb
from nemotron_sft.train import checkpoints, evaluation, export, resume, tracked, vocabulary
from nemotron_sft.train.checkpoints import starting_point
from nemotron_sft.train.compat.bridge import count_layers_of_metrics
from nemotron_sft.train.compat.cpu import adapt
from nemotron_sft.train.compat.optimizer import resume_at_another_rate, shorten_the_optimizers_step
from nemotron_sft.train.container import build, replicas, resume_from
from nemotron_sft.train.evaluation import Heldout
from nemotron_sft.train.limits import check_with_bridge
from nemotron_sft.train.page import Page
from nemotron_sft.train.plan import plan
from nemotron_sft.train.progress import Progress
from nemotron_sft.train.prompts import Prompts, load_prompts
from nemotron_sft.train.report import summarise
from nemotron_sft.train.signals import saving_on_sigterm
from nemotron_sft.train.start import Machine, log_to_file, start_bridge, this_machine
from nemotron_sft.train.step import ForwardStep
from nemotron_sft.train.topology import layers_of
from nemotron_sft.train.trial import AttentionTrial


@dataclass
class Run:
    """What a run is about, settled before Megatron is imported."""

    config: TrainConfig
    composed: DictConfig  # the same, as Hydra composed it
    machine: Machine
    data_dir: Path
    metadata: dict  # the data's metadata.json
    prompts: Prompts | None  # of heldout.path
    directory: Path
    created: bool  # whether this process created the directory


class Observer(Protocol):
    """What watches Bridge's loop: it registers callbacks with Bridge's CallbackManager."""

    def register(self, manager: Any) -> None: ...


@dataclass
class Observed:
    """What was seen of a finished training loop."""

    progress: Progress
    heldout: Heldout
    imported: float  # seconds from the start of the process until Megatron was imported


def train(
    config: TrainConfig,
    composed: DictConfig,
    forward_step: ForwardStep | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """Fine-tune as configured. Leaves a self-contained run directory:

    <run_dir>/
        config.yaml      the resolved config       command.txt   what was typed
        metrics.jsonl    a line per logged step    report.html   all of it, for a browser
        heldout.json     answers before and after  checkpoints/  Megatron checkpoints
        megatron.yaml    Bridge's full config      logs/         Megatron's own output, one file per rank
        lineage.json     where all of it is from   wandb/        Weights & Biases' own files

    forward_step and observers take part in Bridge's loop: a benchmark's, say. Raises UserError for what the user can
    fix.
    """
    if config.preflight:
        return plan(config)
    wandb.check(config.tracking)
    run = settle(config, composed, join_processes())
    with log_to_file(run.directory / "logs" / f"rank{run.machine.rank}.log") as terminal:
        start_bridge()
        container = configure(run, terminal)
        write_down(run)
        if not container.train.train_iters:
            return convert(run, container, terminal)
        observed = fit(run, container, terminal, forward_step or ForwardStep(), observers)
        conclude(run, observed, terminal)


def join_processes() -> Machine:
    """This process among those of the run; several are connected here."""
    # Idle OpenMP threads sleep instead of spinning: 5 % slower on an idle machine, 10 times faster on a shared one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    machine = this_machine()
    if machine.world_size > 1:
        torch.distributed.init_process_group(machine.backend)
    return machine


def settle(config: TrainConfig, composed: DictConfig, machine: Machine) -> Run:
    """Find data, weights and run directory, alike on every rank; rank 0 makes the directory."""
    rank = machine.rank
    tracked.resolve_names(config, rank, machine.world_size)
    data_dir = find_data(config.data.path, config.output_dir)
    metadata = check_data(data_dir, config.data.verify if rank == 0 else "sizes")
    prompts = load_prompts(config.heldout, metadata)
    run_dir = agree_on_run_dir(config, machine)
    resume.check_run_dir(run_dir)
    composed.data.path = str(data_dir)  # a resumed run, or an export, means the same data whatever is newest by then
    if config.peft.scheme or not resume_from(config, run_dir):
        config.init_from = starting_point(config.init_from) or "random"
    told = vocabulary.check(config, metadata)
    run = Run(
        config, composed, machine, data_dir, metadata, prompts, run_dir, created=rank == 0 and not run_dir.exists()
    )
    if rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run directory {run_dir} ({error.strerror}): set run_dir") from None
        print(f"data {data_dir}  run directory {run_dir}", flush=True)
        if told:
            print(told, flush=True)
    return run


def agree_on_run_dir(config: TrainConfig, machine: Machine) -> Path:
    """The run directory, the same on every rank: rank 0 names it."""
    name = config.run_dir
    if name is None:
        date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = str(Path(config.output_dir, "train", f"{config.name}-{date}"))
    if machine.world_size > 1:
        import torch

        box = [name]
        torch.distributed.broadcast_object_list(box, src=0)
        name = box[0]
    return Path(name)


def write_down(run: Run) -> None:
    """Leave what was asked for in the run directory, once it is known that it can be done."""
    if run.machine.rank == 0:
        with AtomicFile(run.directory / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(run.composed, resolve=True).encode())
        (run.directory / "command.txt").write_text(shlex.join([sys.executable, *TYPED]) + "\n")


def configure(run: Run, terminal: TextIO) -> Any:
    """Bridge's ConfigContainer for this machine. A refused config leaves no run directory behind."""
    try:
        container = build(
            run.config, run.metadata, run.data_dir, run.directory, run.machine, tell=lambda line: say(line, terminal)
        )
        if container.train.train_iters:
            check_with_bridge(container, replicas(container.model, run.machine.world_size), run.machine.on_cpu)
        else:
            checkpoints.check_conversion(run.config.init_from, run.machine.world_size)
        if run.machine.on_cpu:
            adapt(container)
        else:
            shorten_the_optimizers_step(container.optimizer)
        resume_at_another_rate()
        count_layers_of_metrics(len(layers_of(container.model)) + (container.model.mtp_num_layers or 0))
        evaluation.check(run.config.heldout, container)
        resume.check(container, run.directory, run.data_dir, run.metadata)
    except UserError:
        if run.created:
            shutil.rmtree(run.directory, ignore_errors=True)
        raise
    return container


def convert(run: Run, container: Any, terminal: TextIO) -> None:
    """Only write the starting weights as a Megatron checkpoint."""
    checkpoints.convert(container.model, run.config.init_from, run.directory / "checkpoints")
    export_if_asked(run, terminal)


def fit(
    run: Run, container: Any, terminal: TextIO, forward_step: ForwardStep, observers: Sequence[Observer]
) -> Observed:
    """Bridge's training loop, with our forward step, observers and records."""
    import torch
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    imported = time.time() - STARTED
    config, machine, rank = run.config, run.machine, run.machine.rank
    if machine.world_size == 1:  # with a store of its own: Bridge would listen on a port that only one run can have
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(machine.backend, store=store, rank=0, world_size=1)
    callbacks = CallbackManager()
    progress = Progress(run.metadata, run.directory, terminal, STARTED, rank, forward_step)
    heldout = Heldout(config.heldout, run.prompts, run.directory, rank, progress)
    trials = [] if machine.on_cpu else [AttentionTrial()]
    # In this order: Progress resets what others may look at, and keeps the record that Heldout adds to.
    for observer in (*trials, *observers, progress, heldout):
        observer.register(callbacks)
    loop = pretrain if config.init_from == "random" and not config.checkpoint.load else finetune
    record = tracked.Training(config, run.composed, run.metadata, run.data_dir, run.directory, rank, terminal)
    page = Page(run.directory, rank, lambda line: say(line, terminal))
    page.register(callbacks)
    with page, record as progress.tracked, saving_on_sigterm(container, run.directory, rank, terminal):
        record.register(callbacks)
        loop(container, forward_step, callbacks=callbacks)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return Observed(progress, heldout, imported)


def conclude(run: Run, observed: Observed, terminal: TextIO) -> None:
    """Export if asked to (every rank its share), and report."""
    export_if_asked(run, terminal)
    if run.machine.rank == 0:
        summarise(observed.progress, observed.heldout, run.directory, observed.imported, terminal)


def export_if_asked(run: Run, terminal: TextIO) -> None:
    """export.hf=true: the newest checkpoint as a Hugging Face directory."""
    if run.config.export.hf and (result := export.export(run.directory, run.config.export.path)):
        print(result, file=terminal)
