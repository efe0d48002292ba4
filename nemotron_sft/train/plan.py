"""preflight=true: what a run will need, and divisions of the model that fit, without a GPU and without weights."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from nemotron_sft.config import TrainConfig
from nemotron_sft.console import console, say
from nemotron_sft.data.opened import open_tokenizer
from nemotron_sft.data.packed import find_data
from nemotron_sft.data.shown import described, marked_text
from nemotron_sft.data.whole import check_data
from nemotron_sft.errors import UserError
from nemotron_sft.train import evaluation, propose, resume
from nemotron_sft.train.batches import PackedDataset
from nemotron_sft.train.checkpoints import check_conversion, starting_point
from nemotron_sft.train.container import build, check_division, replicas
from nemotron_sft.train.estimate import GIB, held, memory, tokens_with_logits
from nemotron_sft.train.limits import check_with_bridge
from nemotron_sft.train.overlap import overlap
from nemotron_sft.train.prompts import load_prompts
from nemotron_sft.train.sizes import sizes
from nemotron_sft.train.speed import seconds_per_step
from nemotron_sft.train.start import Machine, log_to_file, start_bridge, this_machine

LOOK = 300  # tokens of a pack of the first step that are shown
DIVISION = {
    f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
}


def plan(config: TrainConfig) -> None:
    """Print what the run would need, on any machine and without weights. Data may still be missing.

    Where the division that was asked for cannot work, or does not fit, or none was asked for, divisions that fit are
    listed, too. Raises UserError if it cannot work, or the data is there and a prompt cannot be asked or scored.
    """
    world_size = _world_size(config)
    data_dir = metadata = None
    with contextlib.suppress(UserError):  # it may not have been prepared yet
        data_dir = find_data(config.data.path, config.output_dir)
    if data_dir and data_dir.exists():
        metadata = check_data(data_dir, config.data.verify)
    prompts = load_prompts(config.heldout, metadata) if metadata else None
    with log_to_file(Path(os.devnull)):
        start_bridge()
        machine = Machine(int(config.gpu.memory * GIB), world_size=world_size)
        where = Path(config.run_dir or config.output_dir)
        told: list[str] = []
        container = build(config, metadata, data_dir, where, machine, checked=False, tell=told.append)
        _check_start(config, container, where, data_dir, metadata)
        refused, rows = None, {}
        try:
            check_division(container, world_size)
        except UserError as error:
            refused = error
        else:
            if container.train.train_iters:
                check_with_bridge(container, replicas(container.model, world_size), this_machine().on_cpu, planned=True)
            rows = describe(container, metadata, world_size, config.gpu)
        proposals = _proposals(config, container, metadata, world_size, refused)
    if refused:
        print(*proposals, sep="\n")
        raise refused
    rows["data"] = str(data_dir) if metadata else "none yet"
    rows["starts from"] = config.init_from
    for name, about in (prompts.about() if prompts else {}).items():
        rows[f"score/{name}"] = f"{about['prompts']:,} prompts; {about['chance']:.1%} are right by chance"
    print(f"Preflight of {config.name}: nothing was allocated or written")
    shared = overlap(prompts, metadata, data_dir) if prompts else []
    for line in [*(f"  {name:<16} {text}" for name, text in rows.items()), *proposals, *told, *shared]:
        say(line, sys.stdout)
    if metadata:
        _first_look(data_dir, metadata, config.seed)


def _check_start(config: TrainConfig, container, run_dir: Path, data_dir: Path | None, metadata: dict | None) -> None:
    """Raise UserError for what is here and cannot be started from, or asked on the way. Weights may be elsewhere."""
    evaluation.check(config.heldout, container)
    start = Path(config.init_from)
    if start.exists() and not (start / "config.json").exists():
        starting_point(config.init_from)
    if not container.train.train_iters and (start.exists() or config.init_from == "random"):
        check_conversion(config.init_from, 1)
    if config.checkpoint.load and Path(config.checkpoint.load).exists():
        resume.check_load(Path(config.checkpoint.load))
    if config.run_dir:
        resume.check_run_dir(run_dir)
        if metadata:
            resume.check(container, run_dir, data_dir, metadata)


def _first_look(data_dir: Path, metadata: dict, seed: int) -> None:
    """Print the beginning of a pack of the first step, decoded, with what is trained marked."""
    path = data_dir / metadata["splits"]["training"]["file"]
    number = PackedDataset(path, 1, seed).pack_number(0)
    try:
        tokenizer = open_tokenizer(metadata)
    except UserError as error:  # a run needs none, unless it asks prompts
        print(f"The first step cannot be shown: {error}")
        return
    out, shown = console(), described(path, number, metadata, tokenizer, LOOK)
    marks = "between « and »" if out.color_system is None else "green"
    print(f"The first step trains pack {number}, among others. It begins so ({marks}: trained):")
    for sequence in shown["sequences"]:
        out.print(marked_text(sequence["runs"], out.color_system is not None))


def _world_size(config: TrainConfig) -> int:
    tasks = config.cluster.get("tasks_per_node") or config.cluster.get("gpus_per_node") or 1
    given = config.cluster.get("nodes", 1) * tasks
    return config.world_size or int(os.environ.get("WORLD_SIZE", given))


def describe(container, metadata: dict | None, world_size: int, gpu) -> dict[str, str]:
    """The rows that preflight=true prints, name -> text. gpu: the config's section about GPUs."""
    model, train = container.model, container.train
    rows = _parameters(container)
    ranks = replicas(model, world_size)
    rows["processes"] = (
        f"{world_size} = {ranks} data x {model.tensor_model_parallel_size} tensor x "
        f"{model.pipeline_model_parallel_size} pipeline x {model.context_parallel_size} context; "
        f"experts over {model.expert_model_parallel_size}"
    )
    logits = tokens_with_logits(model, metadata)
    if estimate := memory(container, world_size, logits):
        shares = ", ".join(f"{name} {size / GIB:.3g}" for name, size in estimate.items() if name != "total")
        rows["memory per GPU"] = f"about {estimate['total'] / GIB:.3g} of {gpu.memory:g} GiB ({shares})"
    accumulated = train.global_batch_size // (train.micro_batch_size * ranks)
    rows["step"] = (
        f"{train.global_batch_size} packs of {model.seq_length:,} tokens: {ranks} data-parallel ranks x "
        f"{accumulated} micro batches x {train.micro_batch_size} packs"
    )
    rows["steps"] = f"{train.train_iters:,}"
    if seconds := seconds_per_step(container, world_size, gpu.tflops, logits):
        whole = propose.duration(seconds * train.train_iters)
        rows["time"] = f"about {propose.duration(seconds)} a step, {whole} in all"
    return rows | _tokens(container, metadata)


def _parameters(container) -> dict[str, str]:
    parts = sizes(container.model, container.peft)
    if parts is None:
        return {"parameters": "not counted: the model has multi-latent attention"}
    whole = parts.total
    rows = {"parameters": f"{whole.dense + whole.experts:,} total, {whole.active:,} active for a token"}
    if container.peft is not None:
        rows["trained"] = f"{whole.adapters:,} in adapters"
    most = max(dense + experts for dense, experts, _ in held(container.model, parts))
    return rows | {"on one GPU": f"at most {most:,.0f} of the parameters"}


def _tokens(container, metadata: dict | None) -> dict[str, str]:
    """How much data the run reads."""
    train, size = container.train, container.model.seq_length
    split = metadata["splits"]["training"] if metadata else None
    if not split or not split["packs"]:
        return {"tokens": f"at most {train.train_iters * train.global_batch_size * size:,}; no data yet"}
    packs = train.train_iters * train.global_batch_size
    return {
        "tokens": f"{packs * split['tokens'] / split['packs']:,.0f}; the data has {split['tokens']:,}",
        "epochs": f"{packs / split['packs']:.2f}",
    }


def _proposals(
    config: TrainConfig, container, metadata: dict | None, world_size: int, refused: UserError | None
) -> list[str]:
    """Lines about the best divisions that fit, if there is a reason to list them."""
    gpu, logits = config.gpu, tokens_with_logits(container.model, metadata)
    reason = None
    if refused:
        reason = "Not as asked. "
    elif (estimate := memory(container, world_size, logits)) is None:
        return []
    elif estimate["total"] > gpu.memory * GIB:
        reason = "It does not fit. "
    elif world_size > 1 and not DIVISION & set(config.model.bridge):
        reason = ""  # the recipe's division is one of many
    if reason is None:
        return []
    given = f"{world_size} GPU{'s' if world_size > 1 else ''} of {gpu.memory:g} GiB"
    fitting = propose.propose(container, world_size, gpu.memory * GIB, gpu.tflops, logits)
    if not fitting:
        more = propose.enough(container, world_size, gpu.memory * GIB, gpu.tflops, logits)
        needed = f"{more} such GPUs would do" if more else "neither does it on up to 4,096 of them"
        return [f"{reason}No division fits {given}: {needed}"]
    lines = [f"{reason}These fit {given}, the fastest first; add their keys to the command:"]
    for number, division in enumerate(fitting, 1):
        lines.append(f"  {number}  {propose.text(division, container.model.seq_length)}")
        lines.append(f"     {' '.join(propose.overrides(container, division)) or '(as it is)'}")
    return lines
