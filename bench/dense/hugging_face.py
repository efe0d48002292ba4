"""transformers with what a careful user would set: varlen attention, torch.compile, fused AdamW, autocast."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from common.clock import Clock
from dense import FFN, GROUPS, HEADS, HIDDEN, LAYERS, PACK, STEP_PACKS, VOCABULARY

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def hugging_face(args: Namespace) -> Iterator[dict]:
    """Every row length in turn, by one model."""
    transformers.AttentionInterface.register("varlen", attention())
    yield {}
    torch.set_float32_matmul_precision("high")
    model = build(json.loads(args.size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=ON_GPU)
    loss_of = losses_of(model)
    compiled = torch.compile(loss_of, dynamic=False) if ON_GPU else loss_of
    result: dict[str, Any] = {"rows": {}, "transformers": transformers.__version__, "torch": torch.__version__}
    for row in args.rows:
        clock = Clock([""], args.warm_up, args.steps, args.profiled if row == args.rows[-1] else 0)
        train(clock, model, optimizer, compiled, batches_of(args, row // PACK, clock.total))
        result["rows"][str(row)] = clock.results()
        torch.cuda.empty_cache()
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))  # in case time runs out
    yield result


def attention() -> Callable:
    """An attention function for transformers that keeps packed documents apart."""
    if ON_GPU:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

        def attend(query, key, value, boundaries, scale):
            return varlen_attn(query, key, value, boundaries, boundaries, PACK, PACK, scale=scale, **causal)
    else:
        from nemotron_sft.train.compat.attention import attend

    def varlen(module, query, key, value, attention_mask, scaling=None, **options):
        query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embedding leaves them in fp32
        return attend(query, key, value, options["cu_seq_lens_q"], scaling)[None], None

    return varlen


def build(changes: dict) -> Any:
    """The dense model with random weights, in fp32."""
    size = {
        "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    } | changes  # fmt: skip
    config = transformers.LlamaConfig(
        **size, rope_theta=500000.0, tie_word_embeddings=False, attn_implementation="varlen"
    )
    with torch.device(DEVICE):
        return transformers.LlamaForCausalLM(config).train()


def losses_of(model: Any) -> Callable:
    """The function of one row that is compiled: the sum of its losses."""

    def loss_of(tokens, positions, labels, boundaries):
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(
                input_ids=tokens, position_ids=positions, use_cache=False,
                cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=PACK, max_length_k=PACK,
            ).logits  # fmt: skip
        return cross_entropy(logits[0].float(), labels[0], ignore_index=-100, reduction="sum")

    return loss_of


def batches_of(args: Namespace, packs: int, steps: int) -> Iterator[list[tuple]]:
    """The rows of each step, `packs` packs long; from a process of its own, as ours are."""
    from nemotron_sft.train.batches import PackedDataset, collate

    def collated(records):
        batch = collate(records)
        labels = torch.where(batch["loss_mask"] > 0, batch["labels"], -100)
        boundaries = batch["cu_seqlens_q"][0]
        return batch["tokens"], batch["position_ids"], labels, boundaries, batch["counts"]["trained"]

    dataset = PackedDataset(args.data / "training.npy", steps * STEP_PACKS, seed=1234)
    dataset.collate_fn = collated
    sampler = torch.utils.data.BatchSampler(range(len(dataset)), packs, drop_last=True)
    rows = iter(
        torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, collate_fn=collated, num_workers=1, pin_memory=ON_GPU, prefetch_factor=16
        )
    )
    for _ in range(steps):
        yield [next(rows) for _ in range(STEP_PACKS // packs)]


def train(clock: Clock, model: Any, optimizer: Any, loss_of: Callable, batches: Iterator[list[tuple]]) -> None:
    """Steps over batches, timed."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    for step in batches:
        trained = sum(row[-1] for row in step)
        for *tensors, _ in step:
            tensors = [x.to(DEVICE, non_blocking=True) for x in tensors]
            torch._dynamo.mark_dynamic(tensors[-1], 0)  # every row has another number of documents
            loss = loss_of(*tensors) / trained
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(all=0.0)
        clock.losses.append(loss.detach())
