"""A trained checkpoint as a Hugging Face directory, checked against the model that it came from."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nemotron_sft.config import TrainConfig
from nemotron_sft.data.opened import open_template, open_tokenizer
from nemotron_sft.data.packed import open_packs, read_metadata
from nemotron_sft.errors import UserError
from nemotron_sft.train import hf
from nemotron_sft.train.checkpoints import is_hf, newest_iteration, trained_model
from nemotron_sft.train.start import log_to_file, start_bridge

SAMPLE = 256  # tokens on which an export is compared with the model it came from
# Largest difference of two logits, relative to the largest logit: fp32 differs by the order of additions, bf16 by
# the rounding of every layer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


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


def export(run_dir: Path, path: str | None) -> Export:
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
        with trained_model(iteration) as model:
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
    from_hub = config.init_from.count("/") == 1 and not Path(config.init_from).exists()
    source = config.init_from if from_hub or is_hf(config.init_from) else config.model.hf
    if source:
        return hf.auto_bridge(source)
    return hf.bridge_for(model.config)


def _save_tokenizer(directory: Path, metadata: dict) -> None:
    """The tokenizer of the training data, where the source of the weights had none; and the data's chat template."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(open_tokenizer(metadata).file.parent).save_pretrained(directory)
    if not AutoTokenizer.from_pretrained(directory).chat_template:
        (directory / "chat_template.jinja").write_text(open_template(metadata).source)


def sample_tokens(data_dir: Path, model):
    """Token ids (1, n) int64 with n <= SAMPLE: the first document of the training data, or random ones without it."""
    import numpy as np
    import torch

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


def export_run(config: TrainConfig) -> None:
    """export=RUN_DIR: write the newest checkpoint of a finished run as a Hugging Face directory."""
    run_dir = Path(config.export.run)
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"export={run_dir} is not a run directory: it has no config.yaml")
    with log_to_file(run_dir / "logs" / "export.log"):
        start_bridge()
        result = export(run_dir, config.export.path)
    print(result)
