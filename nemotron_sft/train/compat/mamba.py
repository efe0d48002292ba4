"""Mamba-2 layers on the CPU, where mamba-ssm and causal-conv1d, of which core makes its mixer, do not exist.

`use_mamba` gives core's mixer a convolution and a scan in plain PyTorch. What tells documents apart is for GPUs, too.
"""

from __future__ import annotations

from nemotron_sft.train.compat.registry import patch


@patch(
    {
        "megatron.core.ssm.mamba_mixer:MambaMixer.forward": (
            "(self, hidden_states, inference_context, *, inference_params, packed_seq_params)"
        ),
        "megatron.core.packed_seq_params:PackedSeqParams.__post_init__": "(self)",
    },
    seen="megatron-core 0.19.2, megatron-bridge 0.6.2",
    until="core derives seq_idx from cu_seqlens alone, or refuses a packed row without it",
)
def documents_reach_mamba() -> None:
    """Let no Mamba layer run over a packed row without knowing where its documents begin.

    Core derives that (`seq_idx`) from the `total_tokens` of PackedSeqParams; whoever leaves it out gets one state for
    the whole row, and documents see each other without a word. Bridge leaves it out where `is_hybrid_model` is not set.
    """
    from megatron.core.ssm.mamba_mixer import MambaMixer

    whole = MambaMixer.forward

    def forward(self, hidden_states, inference_context=None, *, packed_seq_params=None, **kwargs):
        if packed_seq_params is not None and packed_seq_params.seq_idx is None:
            packed_seq_params.total_tokens = int(_boundaries(packed_seq_params)[-1])
            packed_seq_params.__post_init__()
        return whole(self, hidden_states, inference_context, packed_seq_params=packed_seq_params, **kwargs)

    MambaMixer.forward = forward


@patch(
    {"megatron.core.packed_seq_params:PackedSeqParams.__post_init__": "(self)"},
    seen="megatron-core 0.19.2",
    until="core numbers the documents of a packed row without waiting for the GPU",
)
def number_documents_without_waiting() -> None:
    """Core moves a number to the GPU, and asks it for the length of the result, before every row of a hybrid model.

    Each waits until all that was launched before has run, so the GPU then idles until the next kernels are launched.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    reference = PackedSeqParams.__post_init__

    def number_documents(self):
        ends = _boundaries(self)
        if not isinstance(ends, torch.Tensor) or self.total_tokens is None:
            return
        if parallel_state.get_context_parallel_world_size() > 1:  # total_tokens are then those of the rank
            return reference(self)
        places = torch.arange(self.total_tokens, dtype=ends.dtype, device=ends.device)
        self.seq_idx = torch.searchsorted(ends[1:], places, right=True, out_int32=True)[None]

    PackedSeqParams.__post_init__ = number_documents


def _boundaries(packed):
    """Where documents' places in a row begin and end, (documents + 1,), of core's PackedSeqParams."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded


@patch(
    {
        "megatron.core.ssm.mamba_mixer:HAVE_MAMBA_SSM": "bool",
        "megatron.core.ssm.mamba_mixer:_check_mamba_sequence_packing_support": "(for_inference_not_training)",
        "megatron.core.ssm.mamba_mixer:mamba_split_conv1d_scan_combined": "NoneType",
        "megatron.core.ssm.mamba_mixer:ExtendedRMSNorm": "class | (*args, **kwargs)",  # a mock
        "megatron.core.models.hybrid.hybrid_block:TENorm": "NoneType | class",
        "megatron.core.post_training.modelopt.hybrid.model_specs:Norm": "class",
        "megatron.core.post_training.modelopt.hybrid.model_specs:get_hybrid_stack_modelopt_spec": (
            "(local_core_attention, remap_te_layernorm, use_default_te_spec, moe_grouped_gemm)"
        ),
        "megatron.bridge.models.hybrid.hybrid_provider:get_default_hybrid_stack_spec": "(config)",
        "megatron.core.ssm.mamba_context_parallel:tex": "NoneType | module",
        "megatron.core.ssm.mamba_context_parallel:is_te_min_version": "(version, check_equality)",
    },
    seen="megatron-core 0.19.2, megatron-bridge 0.6.2",
    until="core has a Mamba mixer that runs without mamba-ssm",
)
def use_mamba() -> None:
    """Core's Mamba mixer and hybrid stacks are made of CUDA-only parts: supply PyTorch's and core's own, unfused ones.

    They are set where Bridge looks up its default, so that a checkpoint does not name them; weights are saved under
    the names that Transformer Engine's layers have, so a GPU reads them. Nothing is put into sys.modules, where
    transformers would take it for the real packages. Call after attention.accept_packed_attention.
    """
    import megatron.bridge.models.hybrid.hybrid_provider as provider
    import megatron.core.models.hybrid.hybrid_block as hybrid_block
    import megatron.core.post_training.modelopt.hybrid.model_specs as model_specs
    import megatron.core.ssm.mamba_context_parallel as context_parallel
    import megatron.core.ssm.mamba_mixer as mixer
    from megatron.core.utils import tex

    mixer.HAVE_MAMBA_SSM = True
    mixer._check_mamba_sequence_packing_support = lambda for_inference_not_training: (True, None)
    mixer.mamba_split_conv1d_scan_combined = conv_and_scan
    mixer.ExtendedRMSNorm = _grouped_norm()
    hybrid_block.TENorm = model_specs.Norm = _norm
    provider.get_default_hybrid_stack_spec = lambda config: model_specs.get_hybrid_stack_modelopt_spec(
        local_core_attention=True, remap_te_layernorm=True
    )
    context_parallel.tex, context_parallel.is_te_min_version = tex, lambda version: True


def _norm(config, hidden_size: int, eps: float = 1e-5):
    """PyTorch's norm. Core's wrapper of it refuses sequence parallelism, which only has to know of its weights."""
    import torch

    norm = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization](hidden_size, eps)
    for weight in norm.parameters():
        weight.sequence_parallel = config.sequence_parallel
    return norm


def _grouped_norm() -> type:
    """RMSNorm within each group of channels, as a Mamba mixer has it before its output projection."""
    import torch
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class GroupedRMSNorm(torch.nn.Module):
        def __init__(self, hidden_size, eps, group_size, norm_before_gate, device, dtype):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))
            self.eps, self.group_size = eps, group_size

        def forward(self, hidden, gate=None):
            hidden = hidden if gate is None else hidden * torch.nn.functional.silu(gate)
            groups = hidden.unflatten(-1, (-1, self.group_size))
            return torch.nn.functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * self.weight

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
                tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip

    return GroupedRMSNorm


def conv_and_scan(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, *, D, chunk_size, headdim, ngroups, seq_idx=None, activation="silu",
    norm_before_gate=False,
):  # fmt: skip
    """mamba-ssm's `mamba_split_conv1d_scan_combined`: causal convolution, scan, skip connection, gate.

    zxbcdt: (n, t, 2 * d + 2 * g * s + h) of gate z (d = h * p), input x (d), B and C (g * s) and step dt (h);
    conv_weight: (d + 2 * g * s, width); conv_bias: (d + 2 * g * s,); dt_bias, A (negative), D: (h,);
    headdim: p; ngroups: g; seq_idx: (1, t) int, ascending: the document of each token, None for one document.
    Returns (n, t, d). Neither the convolution nor the state sees beyond a document's first token.
    """
    import torch

    heads, channels = len(A), len(conv_weight)
    d = heads * headdim
    z, mixed, dt = zxbcdt.split([d, channels, heads], dim=-1)
    document = zxbcdt.new_zeros(1, zxbcdt.shape[1], dtype=torch.int64) if seq_idx is None else seq_idx
    convolved = torch.nn.functional.silu(convolve(mixed, conv_weight, conv_bias, document))
    x, B, C = convolved.split([d, *[(channels - d) // 2] * 2], dim=-1)
    x, B, C = (each.unflatten(-1, (count, -1)) for each, count in ((x, heads), (B, ngroups), (C, ngroups)))
    y = scan(x, torch.nn.functional.softplus(dt + dt_bias), A, B, C, document, chunk_size) + x * D[:, None]
    return y.flatten(-2) * torch.nn.functional.silu(z)


def convolve(x, weight, bias, document):
    """Causal convolution of every channel over time, within each document.

    x: (n, t, c); weight: (c, width), its last column for the token itself; bias: (c,); document: (1, t).
    Returns (n, t, c). Zeros are put before every document, so many that no window holds tokens of two.
    """
    import torch

    room = weight.shape[1] - 1
    starts = torch.nn.functional.pad(document[0].diff() != 0, (1, 0), value=True)
    places = torch.arange(x.shape[1]) + room * starts.cumsum(0)
    spread = x.new_zeros(x.shape[0], x.shape[1] + room * int(starts.sum()), x.shape[2]).index_copy(1, places, x)
    out = torch.nn.functional.conv1d(spread.transpose(1, 2), weight[:, None], bias, groups=len(weight))
    return out.transpose(1, 2).index_select(1, places - room)


def scan(x, dt, A, B, C, document, chunk_size: int):
    """The recurrence of Mamba-2 (Dao and Gu 2024, section 6), from a zero state at the start of every document:

        state[t] = exp(dt[t] * A) * state[t - 1] + dt[t] * outer(x[t], B[t]);  y[t] = state[t] @ C[t]

    x: (n, t, h, p); dt: (n, t, h); A: (h,); B, C: (n, t, g, s), shared by the h / g heads of a group;
    document: (1, t). Returns (n, t, h, p). Inside a chunk the recurrence is one masked matrix product, as attention
    is; what a chunk leaves behind is then handed to the chunks in which its last document goes on.

    The logarithms of decays are summed by products with 0/1 masks, so nothing of another document is ever added and
    taken away again, and in double precision, because differences of long sums follow.
    """
    import torch

    n, t, heads, p = x.shape
    size = min(chunk_size, t)

    def chunks(each, value=0):  # (n, t, ...) -> (n, chunks, size, ...)
        padding = (*[0, 0] * (each.dim() - 2), 0, -t % size)
        return torch.nn.functional.pad(each, padding, value=value).unflatten(1, (-1, size))

    def per_head(each):  # (n, chunks, g, ...) -> (n, chunks, 1 or h, ...)
        return each if each.shape[2] in (1, heads) else each.repeat_interleave(heads // each.shape[2], 2)

    document = chunks(document, -1)  # (1, chunks, size)
    seen = (document[..., :, None] == document[..., None, :]).tril()
    total = (seen.double() @ chunks(dt * A).double()).transpose(
        2, 3
    )  # (n, chunks, h, size): since the document's start
    x = chunks(x * dt[..., None]).transpose(2, 3)  # (n, chunks, h, size, p)
    B, C = (chunks(each).transpose(2, 3) for each in (B, C))  # (n, chunks, g, size, s)

    decay = _exp(total[..., :, None] - total[..., None, :], seen[:, :, None], x)
    y = (per_head(C @ B.transpose(-1, -2)) * decay) @ x
    if x.shape[1] > 1:
        decay = _exp(total[..., -1:] - total, seen[:, :, None, -1], x)
        left = per_head(B).transpose(-1, -2) @ (x * decay[..., None])  # (n, chunks, h, s, p)
        goes_on = (document[:, :, None, 0] == document[:, None, :, -1]).tril(-1)  # from chunk j to the start of chunk i
        before = goes_on.double() @ total[..., -1]  # (n, chunks, h): of this document, before the chunk
        after = torch.nn.functional.pad(before[:, 1:], (0, 0, 0, 1))  # the same before the next
        decay = _exp(before[:, :, None] - after[:, None], goes_on[..., None], x)
        start = torch.einsum("nijh,njhsp->nihsp", decay, left)
        decay = _exp(total, (document == document[..., :1])[:, :, None], x)
        y = torch.addcmul(y, per_head(C) @ start, decay[..., None])
    return y.transpose(2, 3).reshape(n, -1, heads, p)[:, :t]


def _exp(exponent, where, like):
    """exp(exponent) `where` true, else 0. (Masked first: elsewhere it may overflow.)"""
    return exponent.to(like.dtype).masked_fill(~where, float("-inf")).exp()


@patch(
    {
        "megatron.core.ssm.mamba_mixer:MambaMixer._decode": (
            "(self, hidden_states, conv_state, ssm_state, batch_indices)"
        ),
        "megatron.core.ssm.mamba_mixer:MambaMixer._ssm_decode": (
            "(self, zxBCdt, conv_state, ssm_state, batch_indices, intermediate_conv_state, intermediate_ssm_state)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core's static batching decodes a token of each row instead of a row of tokens",
)
def decode_batches() -> None:
    """Let a Mamba layer decode one token of every row of a static batch.

    `_ssm_decode` wants (rows, tokens, channels). Core transposes for it under dynamic batching alone, so that in a
    static batch the rows become tokens of one another.
    """
    from megatron.core.ssm.mamba_mixer import MambaMixer

    whole = MambaMixer._decode

    def decode(self, hidden_states, conv_state, ssm_state, batch_indices=None):
        if batch_indices is not None:
            return whole(self, hidden_states, conv_state, ssm_state, batch_indices)
        projected, _ = self.in_proj(hidden_states)  # (1, rows, channels)
        y = self._ssm_decode(projected.transpose(0, 1), conv_state=conv_state, ssm_state=ssm_state)
        return self.out_proj(y.transpose(0, 1))

    MambaMixer._decode = decode


@patch(
    {
        "megatron.core.ssm.mamba_mixer:MambaMixer._get_states_from_cache": (
            "(self, inference_context, batch_size, *, inference_params)"
        ),
        "megatron.core.ssm.mamba_mixer:MambaMixer._ssm_prefill": (
            "(self, zxBCdt, conv_state, ssm_state, seq_idx, cu_seqlens, batch_indices, intermediate_chunk_indices, "
            "intermediate_abs_positions, intermediate_real_count, intermediate_ssm_out, intermediate_conv_out, "
            "cu_chunk_seqlens, last_chunk_indices, seq_idx_for_varlen, cu_seqlens_list, real_token_count, "
            "conv_seq_idx, conv_seq_start)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core reads the prompts of a static batch up to the end of each",
)
def read_to_each_end() -> None:
    """Leave, of prompts read at once, the states behind the last token of each, in their rows of the batch.

    The context's `lengths`, (rows,), say where they end. What pads them there goes through with a step of 0, which
    leaves the state as it is, and the convolution's state is cut out before it. Core has one length for all rows, and
    no rows but all of them.
    """
    import torch
    from megatron.core.ssm.mamba_mixer import MambaMixer

    states, whole = MambaMixer._get_states_from_cache, MambaMixer._ssm_prefill

    def get_states(self, inference_context, batch_size, **kwargs):
        self.lengths = getattr(inference_context, "lengths", None)
        if self.lengths is None:
            return states(self, inference_context, batch_size, **kwargs)
        if self.layer_number not in inference_context.key_value_memory_dict:
            states(self, inference_context, inference_context.max_batch_size)
        start = inference_context.batch_size_offset
        return [each[start : start + batch_size] for each in inference_context.key_value_memory_dict[self.layer_number]]

    def prefill(self, zxBCdt, conv_state, ssm_state, *args, **kwargs):  # zxBCdt: (t, rows, channels)
        lengths = self.lengths if conv_state is not None else None
        if lengths is None:
            return whole(self, zxBCdt, conv_state, ssm_state, *args, **kwargs)
        *inputs, dt = zxBCdt.split([self.d_inner_local_tp, len(self.conv1d_weight), self.nheads_local_tp], -1)
        padding = torch.arange(len(dt), device=dt.device)[:, None] >= lengths
        dt = dt.masked_fill(padding[..., None], -1e4)  # softplus makes 0 of it
        y = whole(self, torch.cat([*inputs, dt], -1), conv_state, ssm_state, *args, **kwargs)
        window = torch.arange(-self.d_conv, 0, device=dt.device)[:, None] + lengths  # (width, rows)
        last = inputs[1].take_along_dim(window.clamp(min=0)[..., None], 0).masked_fill((window < 0)[..., None], 0)
        conv_state.copy_(last.permute(1, 2, 0))
        return y

    MambaMixer._get_states_from_cache, MambaMixer._ssm_prefill = get_states, prefill


@patch(
    {
        "megatron.core.ssm.mamba_mixer:mamba_chunk_scan_combined": "NoneType",
        "megatron.core.ssm.mamba_mixer:causal_conv1d_fn": "NoneType",
        "megatron.core.ssm.mamba_mixer:causal_conv1d_update": (
            "(x, conv_state, weight, bias, silu_activation, conv_state_indices, intermediate_conv_states)"
        ),
        "megatron.core.ssm.mamba_mixer:selective_state_update": (
            "(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, intermediate_ssm_states)"
        ),
    },
    seen="megatron-core 0.19.2",
    until="core has a Mamba mixer that runs without mamba-ssm and Triton",
)
def use_mamba_states() -> None:
    """The kernels with which core's mixer answers: the scan that keeps its last state, and one step of both states."""
    import megatron.core.ssm.mamba_mixer as mixer

    mixer.mamba_chunk_scan_combined = scan_to_state
    mixer.causal_conv1d_update, mixer.selective_state_update = convolve_next, scan_next


def scan_to_state(x, dt, A, B, C, chunk_size, *, D, z, dt_bias, dt_softplus, return_final_states, initial_states=None):
    """mamba-ssm's `mamba_chunk_scan_combined` without a gate (z) and from a zero state; shapes as in `scan`.

    D, dt_bias: (h,). Returns (n, t, h, p), and with return_final_states also the last state, (n, h, p, s).
    """
    import torch

    assert z is None and initial_states is None and dt_softplus
    dt = torch.nn.functional.softplus(dt + dt_bias)
    one = x.new_zeros(1, x.shape[1], dtype=torch.int64)
    y = scan(x, dt, A, B, C, one, chunk_size) + x * D[:, None]
    if not return_final_states:
        return y
    total = (dt * A).double().cumsum(1)
    kept = (total[:, -1:] - total).exp().to(x.dtype)  # (n, t, h): what is left at the end of each token's share
    B = B.repeat_interleave(x.shape[2] // B.shape[2], 2)
    return y, torch.einsum("nthp,nths->nhps", x * (dt * kept)[..., None], B)


def convolve_next(x, conv_state, weight, bias, activation, conv_state_indices=None, intermediate_conv_states=None):
    """causal-conv1d's `causal_conv1d_update` of one token: x (n, 1, c); conv_state (n, c, width), changed in place."""
    import torch

    conv_state.copy_(torch.cat([conv_state[..., 1:], x.transpose(1, 2)], -1))
    return torch.nn.functional.silu((conv_state * weight).sum(-1) + bias)[:, None]


def scan_next(state, x, dt, A, B, C, D, *, z, dt_bias, dt_softplus, **unused):
    """mamba-ssm's `selective_state_update` of one token, without a gate (z).

    state: (n, h, p, s), changed in place; x, dt: (n, 1, h, p); A: (h, p, s); B, C: (n, 1, g, s); D, dt_bias: (h, p).
    Returns (n, 1, h, p).
    """
    import torch

    assert z is None and dt_softplus
    dt = torch.nn.functional.softplus(dt + dt_bias)[:, 0]
    B, C = (each[:, 0].repeat_interleave(state.shape[1] // each.shape[2], 1) for each in (B, C))  # (n, h, s)
    state.mul_((dt[..., None] * A).exp()).add_((dt * x[:, 0])[..., None] * B[:, :, None])
    return ((state * C[:, :, None]).sum(-1) + D * x[:, 0])[:, None]
