"""nemo-automodel's own Nemotron 3 at its best on one GPU: grouped experts, Transformer Engine, fused kernels."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from nemo_automodel.components.loss.te_parallel_ce import TEParallelCrossEntropy
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.nemotron_v3.model import NemotronHForCausalLM
from torch.nn.functional import cross_entropy

from nemotron.hugging_face import adam, every_row, slice_config

BEST = {"attn": "te", "linear": "te", "rms_norm": "te", "experts": "torch_mm", "dispatcher": "torch"}
INSTEAD = {"sdpa": {"attn": "sdpa"}, "torch": {"linear": "torch", "rms_norm": "torch"}, "rows": {}, "plain": {}}


def automodel(args: Namespace, details: list[str]) -> Iterator[dict]:
    """Every number of packs that a forward pass takes at once, in turn; details: words of INSTEAD.

    Without "rows" the packs lie behind one another and no document sees another, as nemo-automodel trains packed data;
    that needs Transformer Engine's attention. "plain": PyTorch's cross entropy, as for transformers; or else the fused
    one, which writes the gradient in place of the logits.
    """
    import mamba_ssm.ops.triton.ssd_combined  # noqa: F401 -- the model looks for both only when it needs them
    import transformer_engine.pytorch  # noqa: F401

    apart = "rows" not in details
    if apart and "sdpa" in details:
        raise ValueError("PyTorch's attention keeps no documents apart here: automodel-rows-sdpa")
    yield {}
    backend = backend_of(details)
    facts = {"nemo_automodel": version("nemo_automodel")} | {name: getattr(backend, name) for name in BEST}
    print(facts, flush=True)
    try:
        model = build(slice_config(), backend)
        result = every_row(args, model, adam(model, master=True), losses_of(model, "plain" not in details), apart)
    except Exception as error:
        error.add_note(f"in {args.name} with {facts}")
        raise
    yield result | facts


def backend_of(details: list[str]) -> BackendConfig:
    """Transformer Engine wherever there is a choice, unless details say otherwise.

    Experts are PyTorch's grouped products: nemo-automodel has them in Transformer Engine only behind a dispatcher that
    spreads them over several GPUs, and falls back to these on one (components/moe/layers.py).
    """
    choices = dict(BEST)
    for word in details:
        choices |= INSTEAD[word]
    return BackendConfig(**choices, enable_hf_state_dict_adapter=False)


def build(config: Any, backend: BackendConfig, device: str = "cuda") -> Any:
    """A model with random weights in bf16; A, D and the time step's bias of Mamba stay in fp32, as its authors want."""
    config.dtype = torch.bfloat16
    with torch.device(device):
        model = NemotronHForCausalLM(config, backend)
    model.initialize_weights(torch.device(device), torch.bfloat16)
    return model.train()


def losses_of(model: Any, fused: bool) -> Any:
    """The function of one forward pass: the sum of its losses, logits of trained tokens alone."""
    fused_entropy = TEParallelCrossEntropy(reduction="sum")

    def loss_of(tokens, labels, *documents):
        packed = {}
        if documents:
            tokens = tokens.flatten()
            packed = {"qkv_format": "thd", "cu_seqlens": documents[0], "max_seqlen": documents[1]}
        hidden = model.model(tokens, **packed)
        kept = labels.flatten() >= 0
        logits = model.lm_head(hidden.flatten(0, -2)[kept])
        if fused:
            return fused_entropy(logits[None], labels.flatten()[kept][None])
        return cross_entropy(logits.float(), labels.flatten()[kept], reduction="sum")

    return loss_of
