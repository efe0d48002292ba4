"""Run Megatron-Core and Megatron-Bridge, unmodified, on a machine without a GPU.

Both address CUDA by name. `use_cpu()` sends those requests to the CPU, supplies stand-ins for the CUDA-only
packages that Bridge imports unconditionally, and adds the one thing core cannot do without Transformer Engine:
attention over packed (THD) batches. On a machine with a GPU nothing here runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from types import SimpleNamespace

from nemotron_sft.errors import UserError
from nemotron_sft.train.compat.slim import placeholder

CUDA_ONLY = ("transformer_engine", "nvidia_resiliency_ext")
_active = None  # the TorchFunctionMode in force, kept so that a second use_cpu() is a no-op


def use_cpu() -> None:
    """Redirect CUDA to the CPU for this process. Call once, before anything imports megatron."""
    global _active
    if _active is not None:
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile would need minutes for a model this small
    _redirect_cuda()
    # Core first, while Transformer Engine is truly absent: it decides once, at import, what it may use.
    import megatron.core.dist_checkpointing
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt
    import megatron.core.utils

    megatron.core.utils.get_te_version()  # remembers 0.0.0
    for name in CUDA_ONLY:
        if importlib.util.find_spec(name) is None:
            placeholder(name)
    skip_helper_build()
    _adapters_without_transformer_engine()
    _accept_packed_attention()
    _vectorise_packed_rope()


def skip_helper_build() -> None:
    """Bridge runs `make` for core's dataset index helpers, but core's wheel ships them built, without a Makefile."""
    import megatron.bridge.training.initialize as initialize
    import megatron.core.datasets.utils as core_utils

    core_utils.compile_helpers = lambda: None
    if hasattr(initialize, "compile_helpers"):
        initialize.compile_helpers = lambda: None


def _adapters_without_transformer_engine() -> None:
    """Bridge takes core's names of Transformer Engine layers, which are None here, for a sign that it is present."""
    import megatron.bridge.peft.utils as peft

    peft.HAVE_TE = False


# --- CUDA by name ------------------------------------------------------------------------------------------


def _redirect_cuda() -> None:
    """Make torch.cuda look like one device that is the CPU, and rewrite `device=` arguments that ask for CUDA."""
    global _active
    import torch
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    def is_cuda(device) -> bool:
        if isinstance(device, bool):
            return False
        return isinstance(device, int) or (
            isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"
        )

    class CudaToCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if is_cuda(kwargs.get("device")):
                kwargs["device"] = cpu
            name = getattr(func, "__name__", "")
            if name in ("cuda", "pin_memory") and args and isinstance(args[0], torch.Tensor):
                return args[0]
            if name == "to" and len(args) > 1 and not isinstance(args[1], torch.dtype) and is_cuda(args[1]):
                args = (args[0], cpu, *args[2:])
            if name == "type" and args and isinstance(args[0], torch.Tensor):
                if len(args) == 1 and "dtype" not in kwargs:  # core finds a tensor's dtype in this name
                    return func(*args).replace("torch.", "torch.cuda.", 1)
                if isinstance(args[1], str):
                    args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
            return func(*args, **kwargs)

    class Event:
        def __init__(self, *args, **kwargs):
            self.seconds = 0.0

        def record(self, *args):
            import time

            self.seconds = time.perf_counter()

        def elapsed_time(self, end) -> float:
            return (end.seconds - self.seconds) * 1000

        def synchronize(self):
            pass

        def wait(self, *args):
            pass

        def query(self) -> bool:
            return True

    class Stream:
        cuda_stream = 0

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def synchronize(self):
            pass

        def wait_stream(self, *args):
            pass

        def wait_event(self, *args):
            pass

        def record_event(self, event=None):
            return event or Event()

    stream = Stream()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=total, multi_processor_count=os.cpu_count(), warp_size=1
    )
    cuda = torch.cuda
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "initial_seed": torch.initial_seed,
        "default_generators": (torch.default_generator,),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream=None: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "device": lambda device=None: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (total, total),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_name": lambda device=None: "CPU",
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **kwargs: function(),
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "initial_seed"):
        setattr(cuda.random, name, replacements[name])
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None
    _active = CudaToCpu()
    _active.__enter__()


# --- what a config needs on the CPU ------------------------------------------------------------------------


def adapt(container) -> None:
    """Turn off in a ConfigContainer what needs a GPU: NCCL, mixed precision, fused kernels, distributed optimizer."""
    import torch

    container.dist.distributed_backend = "gloo"
    container.dist.disable_jit_fuser = True
    container.mixed_precision = container.comm_overlap = None
    container.optimizer.use_distributed_optimizer = container.ddp.use_distributed_optimizer = False
    container.optimizer.use_precision_aware_optimizer = False
    container.optimizer.bf16 = container.optimizer.fp16 = False
    container.optimizer.params_dtype = torch.float32
    container.checkpoint.async_save = False
    container.checkpoint.use_persistent_ckpt_worker = False
    adapt_model(container.model)


def adapt_model(model) -> None:
    """The same for a model provider alone: core's own layers, in fp32, with nothing fused."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    if not isinstance(model, GPTModelProvider):
        raise UserError("Mamba layers need a GPU: on the CPU choose a model without them, such as llama32_1b")
    model.bf16 = model.fp16 = False
    model.params_dtype = torch.float32
    for fusion in vars(model):
        if fusion.endswith("_fusion"):
            setattr(model, fusion, False)
    model.persist_layer_norm = False
    model.transformer_layer_spec = local_layer_spec


# --- packed attention ------------------------------------------------------------------------------------


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


def _accept_packed_attention() -> None:
    """Let core's local attention, which refuses packed sequences and context parallelism, hand them to `attend`."""
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
        if packed_seq_params is None:
            return dense(self, query, key, value, attention_mask, **kwargs)
        if self.config.context_parallel_size > 1:
            places = packed_seq_params.cu_seqlens_q_padded
            return attend_across(query, key, value, places, self.softmax_scale, get_context_parallel_group())
        return attend(query, key, value, packed_seq_params.cu_seqlens_q, self.softmax_scale)

    DotProductAttention.__init__, DotProductAttention.forward = init, forward


def _vectorise_packed_rope() -> None:
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
    ):
        import torch

        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        positions = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        if cp_group is not None and cp_group.size() > 1:
            positions = positions[share_of(cp_group.rank(), cp_group.size(), cu_seqlens)]
        return rope_utils._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1), freqs[positions], rotary_interleaved, mla_rotary_interleaved, mscale
        ).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = rotate
