"""Where weights come from and where they go: Megatron checkpoints and Hugging Face directories.

Megatron-Bridge converts in both directions. Weights of a Hugging Face directory are read straight into the
training model, each rank its own part, so no converted copy lies about that could go stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotron_sft.errors import UserError
from nemotron_sft.lineage import newest_checkpoint, newest_iteration
from nemotron_sft.packed import read_metadata

SAMPLE = 256  # tokens on which an export is compared with the model it came from
# Largest difference of two logits, relative to the largest logit: fp32 differs by the order of additions, bf16 by
# the rounding of every layer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


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
                return str(newest)
            if (root / "run_config.yaml").exists():
                return str(root)
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
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"init_from={init_from} could not be downloaded: {reason}") from None


def is_hf(directory: str | None) -> bool:
    return directory is not None and Path(directory, "config.json").exists()


def convert(model, init_from: str, checkpoints: Path, on_cpu: bool) -> None:
    """Write the weights of a Hugging Face directory as a Megatron checkpoint of iteration 0, in this process alone.

    model: Bridge's model provider. Raises UserError for other sources.
    """
    if not is_hf(init_from):
        raise UserError("train.train_iters=0 converts Hugging Face weights: set init_from to a directory or hub id")
    from megatron.bridge.training.model_load_save import save_megatron_model

    with alone(on_cpu):
        save_megatron_model(_with_hf_weights(model, init_from, on_cpu), str(checkpoints))


@contextlib.contextmanager
def alone(on_cpu: bool) -> Iterator[None]:
    """Megatron's distributed set-up for this process alone, also under torchrun."""
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    with temporary_distributed_context("gloo" if on_cpu else "nccl"):
        yield


def _with_hf_weights(model, directory: str, on_cpu: bool) -> list:
    """Build a model provider's model and fill it from a Hugging Face directory."""
    from nemotron_sft.megatron import hf

    model.perform_initialization = False
    model.finalize()
    built = model.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=on_cpu)
    hf.auto_bridge(directory).load_hf_weights(built)
    return built


# --- a trained model in memory -------------------------------------------------------------------------------


@contextlib.contextmanager
def trained_model(iteration: Path, on_cpu: bool) -> Iterator:
    """The Megatron model of a checkpoint directory iter_*, adapters in place, in a set-up of this process alone."""
    from megatron.bridge.training.utils.checkpoint_utils import read_run_config

    run = read_run_config(str(iteration / "run_config.yaml"))
    with alone(on_cpu):
        model = _adapted(iteration, run, on_cpu) if run.get("peft") else _load(iteration, on_cpu)
        yield model[0].eval()


def _load(iteration: Path, on_cpu: bool) -> list:
    from megatron.bridge.training.model_load_save import load_megatron_model

    model = load_megatron_model(str(iteration), use_cpu_init=on_cpu, skip_temp_dist_context=True)
    return model if isinstance(model, list) else [model]


def _adapted(iteration: Path, run: dict, on_cpu: bool) -> list:
    """The model that a LoRA run started from, with the adapters of one of its checkpoints, which holds only those."""
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.checkpointing import (
        _generate_model_state_dict,
        apply_peft_adapter_filter_to_state_dict,
    )
    from megatron.bridge.training.model_load_save import load_model_config
    from megatron.core import dist_checkpointing

    base = run["checkpoint"]["pretrained_checkpoint"]
    if is_hf(base):
        provider, _ = load_model_config(str(iteration))
        for name in ("tensor", "pipeline", "expert"):
            setattr(provider, f"{name}_model_parallel_size", 1)
        provider.context_parallel_size, provider.expert_tensor_parallel_size = 1, 1
        provider.sequence_parallel, provider.virtual_pipeline_model_parallel_size = False, None
        model = _with_hf_weights(provider, base, on_cpu)
    else:
        model = _load(newest_checkpoint(Path(base)), on_cpu)
    known = {field.name for field in dataclasses.fields(LoRA) if field.init}
    given = {key: value for key, value in run["peft"].items() if key in known and not isinstance(value, dict)}
    lora = LoRA(**given)
    model = lora(model, training=False)
    wanted = apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(model, {}), lora)
    state = dist_checkpointing.load(wanted, str(iteration))
    model[0].load_state_dict(state["model"], strict=False)
    return model


# --- export ----------------------------------------------------------------------------------------------------


@dataclass
class Export:
    """What an export left: its directory, and how far its logits are from Megatron's."""

    path: Path
    difference: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"exported {self.path}  largest difference of a logit from Megatron's {self.difference:.3g} "
            f"(at most {self.tolerance:.3g})"
        )


def export(run_dir: Path, path: str | None, on_cpu: bool) -> Export:
    """Write a run's newest checkpoint as a Hugging Face directory: config, tokenizer, safetensors, chat template.

    The directory appears under its name only when transformers, given the same tokens, computes the same logits as
    Megatron. Raises UserError when the run has no checkpoint or no Hugging Face architecture, or the logits differ.
    """
    from omegaconf import OmegaConf

    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml")
    iteration = newest_iteration(run_dir / "checkpoints")
    if iteration is None:
        raise UserError(f"{run_dir} has no checkpoint to export")
    config = OmegaConf.load(run_dir / "config.yaml")
    metadata = read_metadata(Path(config.data.path))
    path = Path(path or run_dir / "hf")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with trained_model(iteration, on_cpu) as model:
            _bridge(config, model).save_hf_pretrained([model], str(partial), show_progress=False)
            _save_tokenizer(partial, metadata)
            result = Export(path, *compare(model, partial, sample_tokens(Path(config.data.path), model)))
            if not result.difference <= result.tolerance:
                raise UserError(
                    f"not exported: its logits differ by {result.difference:.3g}, more than {result.tolerance:.3g}"
                )
        _replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _bridge(config, model):
    """The AutoBridge that knows the names of the model's weights in transformers."""
    from nemotron_sft.megatron import hf

    from_hub = config.init_from.count("/") == 1 and not Path(config.init_from).exists()
    source = config.init_from if from_hub or is_hf(config.init_from) else config.model.hf
    if source:
        return hf.auto_bridge(source)
    return hf.bridge_for(model.config)


def _save_tokenizer(directory: Path, metadata: dict) -> None:
    """The tokenizer of the training data, where the source of the weights had none; and the data's chat template."""
    from transformers import AutoTokenizer

    from nemotron_sft.chat import load_template

    if not (directory / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(metadata["tokenizer"]["model"]).save_pretrained(directory)
    if not AutoTokenizer.from_pretrained(directory).chat_template:
        (directory / "chat_template.jinja").write_text(load_template(metadata["template"]["name"]).source)


def sample_tokens(data_dir: Path, model):
    """Token ids (1, n) int64 with n <= SAMPLE: the first document of the training data, or random ones without it."""
    import numpy as np
    import torch

    from nemotron_sft.packed import open_packs

    with contextlib.suppress(UserError, OSError):
        pack = open_packs(data_dir / "training.npy")[0]
        return torch.from_numpy(pack["input_ids"][: min(SAMPLE, pack["cu_seqlens"][1])].astype(np.int64))[None]
    return torch.from_numpy(np.random.default_rng(0).integers(0, model.vocab_size, (1, SAMPLE)))


def compare(model, directory: Path, tokens) -> tuple[float, float]:
    """Largest difference between the logits of Megatron's model and of transformers', and how much is tolerable."""
    import torch
    from transformers import AutoModelForCausalLM

    weights = next(model.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=weights.dtype).to(weights.device).eval()
    tokens = tokens.to(weights.device)
    positions = torch.arange(tokens.shape[1], device=weights.device)[None]
    with torch.no_grad():
        ours = model(tokens, positions, None).float()
        logits = theirs(tokens).logits.float()
    width = min(ours.shape[-1], logits.shape[-1])  # Megatron's vocabulary may be padded
    difference = (ours[..., :width] - logits[..., :width]).abs().max().item()
    return difference, TOLERANCE[str(weights.dtype).removeprefix("torch.")] * logits.abs().max().item()


def _replace(partial: Path, path: Path) -> None:
    """Put a finished directory in the place of an older export."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
