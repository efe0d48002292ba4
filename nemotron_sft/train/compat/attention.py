"""Attention and rotary positions of packed (THD) rows, which core has only in Transformer Engine."""

from __future__ import annotations

from types import SimpleNamespace

from nemotron_sft.train.compat.registry import patch


def attend(query, key, value, cu_seqlens, scale: float):
    """Causal attention inside each document of a packed row, never across documents.

    query: (t, heads, d); key, value: (t, groups, d) with heads a multiple of groups; cu_seqlens: (n + 1,) int,
    from 0 to t. Returns (t, heads, d). Documents of similar length (the same power of two) are padded to one
    batch, so the cost follows the sum of squared lengths, not t squared.
    """
    import torch

    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    bucket = torch.ceil(torch.log2(lengths.clamp(min=1).double()))
    out = torch.empty_like(query)
    for size in torch.unique(bucket[lengths > 0]):
        members = (bucket == size) & (lengths > 0)
        longest = int(lengths[members].max())
        offsets = torch.arange(longest)
        rows = starts[members, None] + offsets  # (documents, longest): where each padded position comes from
        real = offsets < lengths[members, None]
        rows = torch.where(real, rows, starts[members, None])
        q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # (documents, heads, longest, d)
        # Padding follows the document, so a causal mask alone keeps real tokens from seeing it.
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[rows[real]] = context.transpose(1, 2)[real]
    return out


def share_of(rank: int, ranks: int, cu_seqlens):
    """Places in a packed row that context-parallel `rank` of `ranks` holds: (t / ranks,) int, ascending.

    Every document is cut into 2 * ranks equal pieces, of which a rank gets one from the front and one from the back
    (the zigzag of ring attention, which balances causal work).
    """
    import torch

    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    within = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(starts, lengths)
    piece = within // torch.repeat_interleave(lengths // (2 * ranks), lengths)
    return torch.nonzero(torch.minimum(piece, 2 * ranks - 1 - piece) == rank).squeeze(1)


def attend_across(query, key, value, cu_seqlens, scale: float, group):
    """`attend` where each rank of `group` holds its share of the row: gather it, attend, keep the share.

    A ring would move less; on the CPU this proves the sharding, and no one trains long contexts here.
    """
    import torch
    from torch.distributed.nn.functional import all_gather

    ranks, rank = group.size(), group.rank()
    shares = [share_of(r, ranks, cu_seqlens) for r in range(ranks)]
    back = torch.argsort(torch.cat(shares))
    whole = (torch.cat(all_gather(x.contiguous(), group=group))[back] for x in (query, key, value))
    return attend(*whole, cu_seqlens, scale)[shares[rank]]


@patch(
    {
        "megatron.core.utils:tex": "NoneType | module",
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__": (
            "(self, config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, "
            "cp_comm_type, pg_collection)"
        ),
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward": (
            "(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core's local attention takes packed rows, also in shares for context parallelism",
)
def accept_packed_attention() -> None:
    """Let core's local attention, which refuses packed sequences and context parallelism, hand them to `attend`.

    What answers need of it goes to `attend_rows` and `attend_next`.
    """
    import megatron.core.utils
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    # How core cuts a batch for the ranks is a function of Transformer Engine's.
    megatron.core.utils.tex = SimpleNamespace(
        thd_get_partitioned_indices=lambda cu_seqlens, total, ranks, rank: share_of(rank, ranks, cu_seqlens)
    )
    build, dense = DotProductAttention.__init__, DotProductAttention.forward

    def init(self, config, *args, **kwargs):
        ranks, config.context_parallel_size = config.context_parallel_size, 1
        try:
            build(self, config, *args, **kwargs)
        finally:
            config.context_parallel_size = ranks

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        if packed_seq_params is not None and self.config.context_parallel_size > 1:
            places = packed_seq_params.cu_seqlens_q_padded
            return attend_across(query, key, value, places, self.softmax_scale, get_context_parallel_group())
        if packed_seq_params is not None:
            return attend(query, key, value, packed_seq_params.cu_seqlens_q, self.softmax_scale)
        if attention_mask is not None and len(query) == 1:
            return attend_next(query, key, value, attention_mask, self.softmax_scale)
        more = self.training or self.config.window_size or self.config.apply_query_key_layer_scaling
        if more or self.softmax_offset is not None or attention_mask is not None or len(query) != len(key):
            return dense(self, query, key, value, attention_mask, **kwargs)
        return attend_rows(query, key, value, self.softmax_scale)

    DotProductAttention.__init__, DotProductAttention.forward = init, forward


@patch(
    {
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd": (
            "(t, cu_seqlens, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, cp_group, "
            "multi_latent_attention)"
        ),
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd": (
            "(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, multi_latent_attention)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core rotates a packed row without a loop",
)
def vectorise_packed_rope() -> None:
    """Rotate all documents of a packed row at once; core's unfused version loops over them in Python."""
    from megatron.core.models.common.embeddings import rope_utils

    def rotate(
        t,
        cu_seqlens,
        freqs,
        rotary_interleaved=False,
        mla_rotary_interleaved=False,
        mscale=1.0,
        cp_group=None,
        multi_latent_attention=None,
    ):
        import torch

        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        positions = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        if cp_group is not None and cp_group.size() > 1:
            positions = positions[share_of(cp_group.rank(), cp_group.size(), cu_seqlens)]
        return rope_utils._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1),
            freqs[positions],
            rotary_interleaved,
            mla_rotary_interleaved,
            mscale,
            multi_latent_attention,
        ).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = rotate


def attend_rows(query, key, value, scale: float):
    """Causal attention inside rows of one length, for which core writes out all scores.

    query: (t, n, heads, d); key: (t, n, groups, d); value: (t, n, groups, e). Returns (t, n, heads * e).
    """
    import torch

    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return context.permute(2, 0, 1, 3).flatten(2)


def attend_next(query, key, value, hidden, scale: float):
    """Attention of one token of every row to the row's own tokens.

    query: (1, n, heads, d); key: (t, n, groups, d); value: (t, n, groups, e); hidden: (n, 1, 1, t) bool, true for what
    is no token of the row. Returns (1, n, heads * e). The heads that share a key are to it what tokens are to a head,
    so that nothing is repeated.
    """
    import torch

    query = query[0].unflatten(1, (key.shape[2], -1))  # (n, groups, heads / groups, d)
    key, value = (each.permute(1, 2, 0, 3) for each in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=~hidden, scale=scale)
    return out.flatten(1)[None]


@patch(
    {
        "megatron.core.extensions.transformer_engine:TEDotProductAttention.forward": (
            "(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, num_splits) "
            "| missing"  # missing: without a GPU
        ),
    },
    seen="megatron-core 0.19.2",
    until="core passes on the mask of a static batch that decodes, and Transformer Engine takes one without copies",
)
def accept_hidden_tokens() -> None:
    """Let each row of a static batch attend to its own tokens while answers are generated.

    Core turns masks off there, as if all prompts were of one length. And Transformer Engine 2.20 takes what begins
    where its memory begins for contiguous, whatever its strides are: the queries of a model with a key for every head
    and without rotary embeddings, the cache of some of the rows.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    whole = TEDotProductAttention.forward

    def forward(self, query, key, value, attention_mask, *args, **kwargs):
        if attention_mask is not None and len(query) == 1:
            return attend_next(query, key, value, attention_mask, self.softmax_scale)
        if not self.training and query.untyped_storage().data_ptr() != key.untyped_storage().data_ptr():
            query, key, value = (each.contiguous() for each in (query, key, value))
        return whole(self, query, key, value, attention_mask, *args, **kwargs)

    TEDotProductAttention.forward = forward


@patch(
    {
        "megatron.core.transformer.attention:Attention._adjust_key_value_for_inference": (
            "(self, inference_context, query, key, value, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin, "
            "rotary_pos_cos_sin, sequence_len_offset, *, inference_params)"
        ),
        "megatron.core.transformer.attention:Attention._allocate_memory": (
            "(self, inference_max_sequence_length, batch_size, dim, dtype)"
        ),
        "megatron.core.models.common.embeddings.rope_utils:apply_rotary_pos_emb": (
            "(t, freqs, config, cu_seqlens, mscale, cp_group, mla_rotary_interleaved)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core keeps rotated keys in a static batch, and lets its rows stand at different positions",
)
def keep_rotated_keys() -> None:
    """Rotate a key once, where its row stands, before it is cached.

    Core caches keys as they come and rotates all of them for every new token, by their place in the cache. The
    context's `positions` are those of the tokens given: (t,) of a prompt's, (rows,) of one token of each row. Of the
    gaps between rows' tokens nothing may come through: 0 times NaN, which core's empty memory may hold, is NaN.
    """
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.transformer.attention import Attention

    whole, allocate = Attention._adjust_key_value_for_inference, Attention._allocate_memory

    def rotate(self, each, angles, decoding):
        # A fused kernel has one position for all rows: rows take the place of tokens.
        each = each.transpose(0, 1) if decoding else each
        mscale, group = self._yarn_concentration_factor, self.pg_collection.cp
        each = apply_rotary_pos_emb(each, angles, config=self.config, mscale=mscale, cp_group=group)
        return each.transpose(0, 1) if decoding else each

    def adjust(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs):
        positions = getattr(inference_context, "positions", None)
        if rotary_pos_emb is not None and positions is not None:
            decoding = inference_context.is_decode_only()
            angles = [each[positions] for each in rotary_pos_emb]
            query, key = (rotate(self, *pair, decoding) for pair in zip((query, key), angles, strict=True))
            rotary_pos_emb = None
        return whole(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)

    Attention._adjust_key_value_for_inference = adjust
    Attention._allocate_memory = lambda self, *args: allocate(self, *args).zero_()
