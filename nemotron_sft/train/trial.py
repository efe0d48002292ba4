"""Attention on trial: some versions of cuDNN have wrong gradients for packed rows, and say nothing.

Seen: cuDNN 9.14 on an H100, heads of 192 and 256: off by 20 % and more, at times not a number (Transformer Engine 2.20;
its forward pass is right, and so is its backward pass where rows are not packed).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from nemotron_sft.errors import UserError
from nemotron_sft.train.compat.attention import attend

LENGTHS = (700, 3, 321)  # tokens of the documents of the row that is tried
ENDS = (0, *accumulate(LENGTHS))
TOLERANCE = 0.05  # bf16 rounds to 0.003


class AttentionTrial:
    """Asks attention, on a GPU, for the gradients of a small packed row before training begins."""

    def register(self, manager) -> None:
        """Before what asks the model anything."""
        manager.register("on_train_start", self.on_train_start)

    def on_train_start(self, context) -> None:
        """Raise UserError where the gradients are wrong. A stage of a pipeline may have no attention."""
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        parts = (part for chunk in context.model for part in chunk.modules())
        if layer := next((part for part in parts if isinstance(part, TEDotProductAttention)), None):
            check(layer.config)


def check(config: Any) -> None:
    """Raise UserError if Transformer Engine's attention errs for heads as a model has them.

    config: core's TransformerConfig. Multi-latent attention, whose keys are wider than its values, is not tried.
    """
    import torch
    from transformer_engine.pytorch import DotProductAttention

    if config.multi_latent_attention:
        return
    width, dtype = config.kv_channels, config.params_dtype
    keys = min(config.num_query_groups, 2)
    queries = config.num_attention_heads // config.num_query_groups * keys
    attention = DotProductAttention(
        queries, width, num_gqa_groups=keys, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal"
    )
    ends, longest = torch.tensor(ENDS, dtype=torch.int32, device="cuda"), max(LENGTHS)
    row = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}

    def theirs(query, key, value):
        return attention(query.cuda(), key.cuda(), value.cuda(), **row).view_as(query)

    with torch.random.fork_rng([torch.cuda.current_device()]):  # training draws the same numbers as without the trial
        errors = gradient_errors(theirs, queries, keys, width, dtype)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] < TOLERANCE:  # also where it is no number
        raise UserError(
            f"attention with heads of {width} has wrong gradients for packed rows on this GPU: those of the {worst} "
            f"differ by {errors[worst]:.0%} ({_versions()}); install another version of cuDNN, or flash-attn and set "
            "model.attention_backend=flash"
        )


def gradient_errors(attention: Callable, queries: int, keys: int, width: int, dtype: Any) -> dict[str, float]:
    """|theirs - reference| / |reference| of the gradients of query, key and value; nan where they hold one.

    attention: from query (t, queries, width), key and value (t, keys, width) of LENGTHS to (t, queries, width), given
    tensors on the CPU and free to move them. The reference is computed in fp32 on the CPU.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    total, ends = ENDS[-1], torch.tensor(ENDS)
    heads = {"queries": queries, "keys": keys, "values": keys}
    given = [torch.randn(total, number, width, generator=generator).to(dtype) for number in heads.values()]
    towards = torch.randn(total, queries, width, generator=generator).to(dtype)

    def gradients(attend_to: Callable, inputs: list) -> list:
        inputs = [each.detach().requires_grad_() for each in inputs]
        output = attend_to(*inputs)
        output.backward(towards.to(output))
        return [each.grad.double() for each in inputs]

    expected = gradients(lambda q, k, v: attend(q, k, v, ends, width**-0.5), [each.float() for each in given])
    pairs = zip(heads, gradients(attention, given), expected, strict=True)
    return {name: float((found - right).norm() / right.norm()) for name, found, right in pairs}


def _versions() -> str:
    import torch
    import transformer_engine
    from transformer_engine.pytorch.utils import get_cudnn_version

    cudnn = ".".join(map(str, get_cudnn_version()))
    return f"{torch.cuda.get_device_name()}, cuDNN {cudnn}, Transformer Engine {transformer_engine.__version__}"
