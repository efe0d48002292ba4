"""transformers' NemotronHForCausalLM at its best: grouped experts, Mamba kernels, fused Adam."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from common import ROOT
from common.clock import Clock
from nemotron import PACK, PATTERN

ARCHITECTURE = ROOT / "conf/model/architecture/NVIDIA-Nemotron-3-Nano-30B-A3B.json"


def hugging_face(args: Namespace, master: bool, compiled: bool) -> Iterator[dict]:
    """Every number of packs that a forward pass takes at once, in turn.

    Packs are rows of a batch, without any isolation between the documents in them: transformers has none for Mamba.
    master: fp32 master weights (Transformer Engine's Adam), or else weights and moments in bf16 alone.
    """
    import mamba_ssm.ops.triton.selective_state_update
    import mamba_ssm.ops.triton.ssd_combined  # noqa: F401 -- transformers looks for both, and computes slowly without

    yield {}
    model = build()
    loss_of = torch.compile(losses_of(model)) if compiled else losses_of(model)
    yield every_row(args, model, adam(model, master), loss_of)


def every_row(args: Namespace, model: Any, optimizer: Any, loss_of: Any, apart: bool = False) -> dict:
    """Train on every number of packs in turn; the results so far lie in NAME.json. apart: see `batches_of`."""
    result: dict[str, Any] = {"rows": {}, "transformers": transformers.__version__, "torch": torch.__version__}
    for row in args.rows:
        clock = Clock([""], args.warm_up, args.steps, 0)
        try:
            train(clock, model, optimizer, loss_of, batches_of(args, row // PACK, clock.total, apart))
            result["rows"][str(row)] = clock.results()
        except torch.OutOfMemoryError:
            print(f"{row}: out of memory", flush=True)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    return result


def slice_config() -> Any:
    """transformers' config of the slice."""
    known = ("architectures", "model_type", "transformers_version", "torch_dtype", "num_hidden_layers")
    fields = {key: value for key, value in json.loads(ARCHITECTURE.read_text()).items() if key not in known}
    fields["hybrid_override_pattern"] = PATTERN
    return transformers.NemotronHConfig(**fields, num_hidden_layers=len(PATTERN))


def build() -> Any:
    """The slice with random weights, in bf16."""
    config = slice_config()
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.NemotronHForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.bfloat16().train()


def adam(model: Any, master: bool) -> Any:
    """Fused AdamW: with fp32 master weights and moments, or PyTorch's with moments in the weights' bf16."""
    options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if not master:
        return torch.optim.AdamW(model.parameters(), fused=True, **options)
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(model.parameters(), master_weights=True, store_param_remainders=True, **options)


def losses_of(model: Any) -> Any:
    """The function of one forward pass: the sum of its losses, logits of trained tokens alone."""

    def loss_of(tokens, labels):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        kept = labels.flatten() >= 0
        logits = model.lm_head(hidden.flatten(0, 1)[kept])
        return cross_entropy(logits.float(), labels.flatten()[kept], reduction="sum")

    return loss_of


def batches_of(args: Namespace, packs: int, steps: int, apart: bool = False) -> Iterator[list[tuple]]:
    """The forward passes of each step: tokens, labels (-100 without a loss), trained tokens.

    apart: before the trained tokens also the boundaries of the documents in all packs, one behind the other
    (m,) int32, and the longest document.
    """
    from nemotron_sft.train.batches import PackedDataset, collate

    dataset = PackedDataset(args.data / "training.npy", steps * args.step_packs, seed=1234)
    for step in range(steps):
        found = []
        for first in range(0, args.step_packs, packs):
            start = step * args.step_packs + first
            batch = collate(dataset.__getitems__(list(range(start, start + packs))))
            labels = torch.where(batch["loss_mask"] > 0, batch["labels"], -100)
            given = [x.view(packs, PACK).cuda() for x in (batch["tokens"], labels)]
            if apart:
                given += [batch["cu_seqlens_q"][0].cuda(), int(batch["max_seqlen_q"])]
            found.append((*given, batch["counts"]["trained"]))
        yield found


def train(clock: Clock, model: Any, optimizer: Any, loss_of: Any, batches: Iterator[list[tuple]]) -> None:
    """Steps over batches, timed."""
    torch.cuda.reset_peak_memory_stats()
    for step in batches:
        trained = sum(given[-1] for given in step)
        for *given, _ in step:
            loss = loss_of(*given) / trained
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(all=0.0)
        clock.losses.append(loss.detach())
