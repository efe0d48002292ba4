"""An exported model's logits beside those of the Megatron model that it came from."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron_sft.data.packed import open_packs
from nemotron_sft.errors import UserError
from nemotron_sft.train import checkpoints
from nemotron_sft.train.compat.transformers import exact_scan
from nemotron_sft.train.start import this_machine

SAMPLE = 256  # tokens on which an export is compared with the model it came from
# Largest difference of two logits, relative to the largest logit: fp32 differs by the order of additions, bf16 by
# the rounding of every layer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
# Deep models with experts make more of it: where two experts are nearly as good, a rounding chooses. Then a token may
# be this many times as far from Megatron's as it moves when nothing but the embeddings is rounded otherwise.
AS_ROUNDING = 2.0


@dataclass
class Comparison:
    """How far an export's logits are from Megatron's, and how far rounding alone would move them."""

    largest: float  # difference of two logits
    tolerance: float  # as much of it is always fine
    typical: float  # distance of a token's logits relative to their size, the median of the tokens
    noise: float | None = None  # the same of the export, its embeddings rounded otherwise; None: not looked at

    @property
    def equal(self) -> bool:
        """Whether it is the same model, as far as its precision lets one see. Not if anything is NaN."""
        return self.largest <= self.tolerance or (self.noise is not None and self.typical <= AS_ROUNDING * self.noise)

    def __str__(self) -> str:
        line = f"largest difference of a logit from Megatron's {self.largest:.3g}"
        if self.noise is None:
            return f"{line} (at most {self.tolerance:.3g})"
        return (
            f"{line}, more than {self.tolerance:.3g}; half of the tokens are within {self.typical:.2%} of Megatron's, "
            f"and within {self.noise:.2%} of themselves when only the embeddings are rounded otherwise"
        )


def compare(iteration: Path, directory: Path, data_dir: Path) -> Comparison:
    """Compare the logits of a checkpoint's Megatron model with those of transformers' on a few tokens of the data.

    One model after the other is in memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokens, ours, dtype = _of_megatron(iteration, data_dir)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(tokens.device).eval()
    exact_scan(model, tokens.shape[1])

    def theirs():
        return model(tokens).logits.float()[..., : ours.shape[-1]]

    with torch.no_grad():
        logits = theirs()
        ours = ours[..., : logits.shape[-1]]  # Megatron's vocabulary may be padded
        tolerance = TOLERANCE[str(dtype).removeprefix("torch.")] * logits.abs().max().item()
        result = Comparison((ours - logits).abs().max().item(), tolerance, _middle(ours, logits))
        if result.largest > tolerance:
            with _rounded_otherwise(model):
                result.noise = _middle(theirs(), logits)
    return result


def _of_megatron(iteration: Path, data_dir: Path):
    """Token ids (1, n), their logits float32 (1, n, vocabulary), and the dtype of the weights that gave them."""
    import torch

    with checkpoints.trained_model(iteration) as model, torch.no_grad():
        weights = next(model.parameters())
        dtype, device = weights.dtype, weights.device
        tokens = sample_tokens(data_dir, model.vocab_size).to(device)
        logits = model(tokens, torch.arange(tokens.shape[1], device=device)[None], None).float()
        del model, weights
    gc.collect()
    if not this_machine().on_cpu:
        torch.cuda.empty_cache()
    return tokens, logits, dtype


def _middle(logits, others) -> float:
    """How far the logits of a token are apart, relative to their size: the median of the tokens."""
    distances = (logits - others).norm(dim=-1) / others.norm(dim=-1)
    return distances.median().item()


@contextlib.contextmanager
def _rounded_otherwise(model) -> Iterator[None]:
    """Move the embeddings that a transformers model computes by up to half of their precision, at random."""
    import torch

    def moved(module, given, embedded):
        change = (torch.rand(embedded.shape, generator=random, device=embedded.device) - 0.5) * step
        return (embedded.float() * (1 + change)).to(embedded.dtype)

    weight = model.get_input_embeddings().weight
    random, step = torch.Generator(weight.device).manual_seed(0), torch.finfo(weight.dtype).eps
    hook = model.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def sample_tokens(data_dir: Path, vocabulary: int):
    """Token ids (1, n) int64 with n <= SAMPLE: the first document of the training data, or random ones without it."""
    import torch

    with contextlib.suppress(UserError, OSError):
        pack = open_packs(data_dir / "training.npy")[0]
        return torch.from_numpy(pack["input_ids"][: min(SAMPLE, pack["cu_seqlens"][1])].astype(np.int64))[None]
    return torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (1, SAMPLE)))
