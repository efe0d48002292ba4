"""Where weights come from and where they go: Megatron checkpoints and Hugging Face directories.

Megatron-Bridge converts in both directions. Weights of a Hugging Face directory are read straight into the
training model, each rank its own part, so no converted copy lies about that could go stale.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

from nemotron_sft.errors import UserError, first_line
from nemotron_sft.train import hf, peft
from nemotron_sft.train.compat.bridge import adapter_state
from nemotron_sft.train.compat.cpu import adapt_model
from nemotron_sft.train.start import this_machine

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TORCHRUNS = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")  # in its processes' environment
PATIENCE = datetime.timedelta(hours=12)  # that processes wait for one another: one may have much more to write


def starting_point(init_from: str) -> str | None:
    """The directory whose weights training starts from; None for random ones.

    init_from: a Megatron checkpoint, a run directory of ours, a Hugging Face directory, a hub id (downloaded into
    the hub cache; every rank may ask, one per machine fetches), or "random". Raises UserError for anything else.
    """
    if init_from == "random":
        return None
    path = Path(init_from)
    if path.is_dir():
        if (path / "config.json").exists() and any(file for kind in WEIGHTS for file in path.glob(kind)):
            return str(path)
        for root in (path, path / "checkpoints"):
            if newest := newest_iteration(root):
                return str(_whole_model(newest, init_from))
            if (root / "run_config.yaml").exists():
                return str(_whole_model(root, init_from))
        raise UserError(
            f"init_from={init_from} holds neither a Megatron checkpoint nor a Hugging Face model (config.json and "
            "safetensors)"
        )
    if init_from.count("/") != 1 or init_from.startswith((".", "/", "~")):
        raise UserError(f"init_from={init_from}: no such directory, and not a hub id such as Qwen/Qwen3-8B")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(init_from, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.py"])
    except Exception as error:  # of the network, of access rights, of a name that does not exist
        raise UserError(f"init_from={init_from} could not be downloaded: {first_line(error)}") from None


def _whole_model(iteration: Path, init_from: str) -> Path:
    """The same checkpoint. Raises UserError for one of adapters alone."""
    if (iteration / "run_config.yaml").exists() and run_of(iteration).get("peft"):
        raise UserError(
            f"init_from={init_from} holds adapters alone: export that run, which merges them with their base, and "
            "start from the export"
        )
    return iteration


def is_hf(directory: str | None) -> bool:
    """Whether a directory is a Hugging Face model."""
    return directory is not None and Path(directory, "config.json").exists()


def check_conversion(init_from: str, world_size: int) -> None:
    """Raise UserError where train.train_iters=0 has nothing that it could convert."""
    if not is_hf(init_from):
        raise UserError("train.train_iters=0 converts Hugging Face weights: set init_from to a directory or hub id")
    if world_size > 1:
        raise UserError("train.train_iters=0 only converts weights, in one process: start it without torchrun")


def convert(model, init_from: str, checkpoints: Path) -> None:
    """Write the weights of a Hugging Face directory as a Megatron checkpoint of iteration 0, in this process alone.

    model: Bridge's model provider.
    """
    from megatron.bridge.training.model_load_save import save_megatron_model

    with alone():
        save_megatron_model(_with_hf_weights(model, init_from), str(checkpoints))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Megatron's distributed set-up for this process alone, also under torchrun.

    What torchrun tells its processes is put aside meanwhile: by the last of TORCHRUNS PyTorch 2.11 takes torchrun to
    serve every address, and waits for it in vain at the one that Bridge chooses.
    """
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    theirs = {name: os.environ.pop(name) for name in TORCHRUNS if name in os.environ}
    try:
        with temporary_distributed_context(this_machine().backend):
            yield
    finally:
        os.environ.update(theirs)


def _with_hf_weights(model, directory: str) -> list:
    """Build a model provider's model and fill it from a Hugging Face directory."""
    model.perform_initialization = False
    model.finalize()
    built = model.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=this_machine().on_cpu)
    hf.auto_bridge(directory).load_hf_weights(built)
    return built


@contextlib.contextmanager
def together() -> Iterator[tuple[int, int]]:
    """Megatron's distributed set-up for all processes of torchrun, each a replica of the whole; (rank, world size).

    Over gloo, and apart from whatever group the processes had before.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    rank, world_size = this_machine().rank, this_machine().world_size
    store = dist.HashStore()
    if world_size > 1:
        found, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=PATIENCE))
        store = dist.PrefixStore("together", found)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)  # Mamba layers ask for its state while they are built
        yield rank, world_size
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def provider_of(iteration: Path):
    """The model provider of a checkpoint directory iter_*, for one process of this machine."""
    from megatron.bridge.training.model_load_save import load_model_config

    provider, _ = load_model_config(str(iteration))
    for name in ("tensor", "pipeline", "expert"):
        setattr(provider, f"{name}_model_parallel_size", 1)
    provider.context_parallel_size, provider.expert_tensor_parallel_size = 1, 1
    provider.sequence_parallel, provider.virtual_pipeline_model_parallel_size = False, None
    provider.pipeline_model_parallel_layout = None
    provider.num_layers_in_first_pipeline_stage = provider.num_layers_in_last_pipeline_stage = None
    provider.hierarchical_context_parallel_sizes = None
    provider.overlap_moe_expert_parallel_comm = provider.delay_wgrad_compute = False
    provider.perform_initialization = False
    if pattern := getattr(provider, "hybrid_layer_pattern", None):
        provider.hybrid_layer_pattern = pattern.replace("|", "")
    if provider.moe_token_dispatcher_type == "flex":
        provider.moe_token_dispatcher_type = "allgather"
    if this_machine().on_cpu:
        adapt_model(provider)
    return provider


def run_of(iteration: Path) -> dict:
    """Bridge's full config of the run that wrote a checkpoint directory iter_*."""
    import yaml

    return yaml.load((iteration / "run_config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def base_of(run: dict) -> Path:
    """Where the frozen weights of a run with adapters are. Raises UserError if they are there no more."""
    base = Path(run["checkpoint"]["pretrained_checkpoint"])
    if not base.is_dir():
        raise UserError(f"{base}, the model that this run's adapters were trained on, is not there: put it back")
    return base if is_hf(str(base)) else newest_checkpoint(base)


@contextlib.contextmanager
def trained_model(iteration: Path) -> Iterator:
    """The Megatron model of a checkpoint directory iter_*, adapters in place, in a set-up of this process alone.

    Without the wrapper that Bridge puts around a model in bf16.
    """
    from megatron.core.utils import unwrap_model

    run = run_of(iteration)
    with alone():
        model = _adapted(iteration, run) if run.get("peft") else _load(iteration)
        yield unwrap_model(model[0]).eval()


def _load(iteration: Path) -> list:
    from megatron.bridge.training.model_load_save import build_and_load_model

    provider, on_cpu = provider_of(iteration), this_machine().on_cpu
    model = build_and_load_model(str(iteration), provider, use_cpu_init=on_cpu, skip_temp_dist_context=True)
    return model if isinstance(model, list) else [model]


def _adapted(iteration: Path, run: dict) -> list:
    """The model that a run with adapters started from, with those of one of its checkpoints, which holds only them."""
    from megatron.core import dist_checkpointing

    base = base_of(run)
    model = _with_hf_weights(provider_of(iteration), str(base)) if is_hf(str(base)) else _load(base)
    adapters = peft.restored(run["peft"])
    model = adapters(model, training=False)
    state = dist_checkpointing.load(adapter_state(model, adapters), str(iteration))
    model[0].load_state_dict(state["model"], strict=False)
    return model


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that would be loaded from `path`: the newest whole one in it, or itself."""
    return newest_iteration(path) or path


def newest_iteration(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint in a directory of them.

    Megatron-Bridge names a checkpoint in `latest_*` files and then still writes its run_config.yaml, whose sections
    are sorted, validation last; a process killed in between leaves a name without a checkpoint. So the directories
    themselves are looked at. One of Megatron-LM, which has neither file, is whole if it is named.
    """
    for path in sorted(checkpoints.glob("iter_*"), reverse=True):
        if _is_whole(path):
            return path
    try:
        name = (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip()
        named = checkpoints / (name if name == "release" else f"iter_{int(name):07d}")
    except (OSError, ValueError):
        return None
    return named if named.is_dir() and not (named / "train_state.pt").exists() else None


def whole_iterations(checkpoints: Path) -> list[Path]:
    """All whole checkpoints of Megatron-Bridge in a directory of them, the oldest first."""
    return [path for path in sorted(checkpoints.glob("iter_*")) if _is_whole(path)]


def _is_whole(iteration: Path) -> bool:
    """Whether Bridge finished a checkpoint directory: the file that it writes last is there to its end."""
    config = iteration / "run_config.yaml"
    return config.exists() and "\nvalidation:\n" in config.read_text()


def step_of(iteration: Path) -> int:
    """The step of a checkpoint directory iter_*; 0 of another."""
    number = iteration.name.removeprefix("iter_")
    return int(number) if number.isdigit() else 0
