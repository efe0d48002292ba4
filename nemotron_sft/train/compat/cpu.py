"""Run Megatron-Core and Megatron-Bridge, unmodified, on a machine without a GPU.

Both address CUDA by name. `use_cpu()` sends those requests to the CPU, supplies stand-ins for the CUDA-only
packages that Bridge imports unconditionally, and adds what core cannot do without Transformer Engine and mamba-ssm:
attention over packed (THD) batches, and Mamba layers. Kernels that are installed are not seen, so that a container of
NVIDIA's computes the same without a GPU. On a machine with a GPU nothing here runs.
"""

from __future__ import annotations

import os
import queue
import sys

from nemotron_sft.train.compat.attention import (
    accept_packed_attention,
    keep_rotated_keys,
    vectorise_packed_rope,
)
from nemotron_sft.train.compat.bridge import skip_helper_build
from nemotron_sft.train.compat.conversion import load_all_or_nothing
from nemotron_sft.train.compat.cuda import redirect_cuda
from nemotron_sft.train.compat.mamba import (
    decode_batches,
    documents_reach_mamba,
    number_documents_without_waiting,
    read_to_each_end,
    use_mamba,
    use_mamba_states,
)
from nemotron_sft.train.compat.registry import patch
from nemotron_sft.train.compat.slim import placeholder

CUDA_ONLY = ("transformer_engine", "nvidia_resiliency_ext")  # what Bridge imports whether it is there or not
# What core and Bridge would compute with where it is installed, as in NVIDIA's containers.
KERNELS = ("apex", "causal_conv1d", "deep_ep", "fla", "flash_attn", "flash_attn_3", "flash_mla", "flashinfer",
           "mamba_ssm")  # fmt: skip
_active = None  # the TorchFunctionMode in force, kept so that a second use_cpu() is a no-op


def use_cpu() -> None:
    """Redirect CUDA to the CPU for this process. Call once, before anything imports megatron."""
    global _active
    if _active is not None:
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile would need minutes for a model this small
    _active = redirect_cuda()
    for name in (*CUDA_ONLY, *KERNELS):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # as if it were not installed
    _decide_without_transformer_engine()
    for name in CUDA_ONLY:
        if sys.modules[name] is None:
            del sys.modules[name]
            placeholder(name)
    skip_helper_build()
    _adapters_without_transformer_engine()
    accept_packed_attention()
    vectorise_packed_rope()
    use_mamba()
    use_mamba_states()
    documents_reach_mamba()
    number_documents_without_waiting()
    decode_batches()
    read_to_each_end()
    keep_rotated_keys()
    load_all_or_nothing()
    _split_sizes_as_numbers()
    _results_of_saves_stay_here()


@patch(
    {"megatron.core.utils:get_te_version": "()"},
    seen="megatron-core 0.19.2",
    until="core asks whether Transformer Engine works, not whether it can be imported",
)
def _decide_without_transformer_engine() -> None:
    """Core decides once, at import, what it may use of Transformer Engine: before the placeholder stands in for it."""
    import megatron.core.dist_checkpointing
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt
    import megatron.core.utils

    megatron.core.utils.get_te_version()  # remembers 0.0.0


@patch(
    {
        "megatron.bridge.peft.utils:HAVE_TE": "bool",
        "megatron.core.tensor_parallel.layers:ColumnParallelLinear.tp_size": "missing",
    },
    seen="megatron-bridge 0.6.2, megatron-core 0.19.2",
    until="Bridge asks core's HAVE_TE",
)
def _adapters_without_transformer_engine() -> None:
    """Bridge takes core's names of Transformer Engine layers, which are None here, for a sign that it is present."""
    import megatron.bridge.peft.utils as peft
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    peft.HAVE_TE = False
    ColumnParallelLinear.tp_size = property(lambda self: self.tp_group.size())  # asked of a Mamba mixer's in_proj


@patch(
    {"megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": ("(tensor, as_numpy, record_stream)")},
    seen="megatron-core 0.19.2",
    until="core takes numbers from a tensor that is on the CPU already",
)
def _split_sizes_as_numbers() -> None:
    """Core makes numbers of the sizes that experts exchange only while it copies them from a GPU."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def move(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    dispatcher.maybe_move_tensor_to_cpu = move


@patch(
    {"megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue": "(mp_mode)"},
    seen="megatron-core 0.19.2",
    until="core starts that process for asynchronous saves alone",
)
def _results_of_saves_stay_here() -> None:
    """What a save has written goes through a process of core's, which imports PyTorch first: 2 to 4 s per run. Saves
    are not asynchronous here (`adapt`), so writer and reader are threads of one process."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

    results: queue.Queue = queue.Queue()
    writer.get_write_results_queue = lambda mp_mode="spawn": results


def adapt(container) -> None:
    """Turn off in a ConfigContainer what needs a GPU: NCCL, mixed precision, fused kernels, distributed optimizer."""
    import torch

    # From its first call on MKL takes exactly so many threads, and so may add in another order. Called here, a run that
    # generates answers, which calls it too, has the losses of one that does not.
    torch.set_num_threads(torch.get_num_threads())
    container.dist.distributed_backend = "gloo"
    container.dist.disable_jit_fuser = True
    container.mixed_precision = container.comm_overlap = None
    container.optimizer.use_distributed_optimizer = container.ddp.use_distributed_optimizer = False
    container.optimizer.use_precision_aware_optimizer = False
    container.ddp.overlap_grad_reduce = container.ddp.overlap_param_gather = False
    container.optimizer.overlap_param_gather = False
    container.optimizer.bf16 = container.optimizer.fp16 = False
    container.optimizer.params_dtype = torch.float32
    container.checkpoint.async_save = False
    container.checkpoint.use_persistent_ckpt_worker = False
    adapt_model(container.model)


def adapt_model(model) -> None:
    """The same for a model provider alone: core's own layers, in fp32, with nothing fused."""
    import torch
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.core.transformer.enums import AttnBackend

    model.bf16 = model.fp16 = False
    model.params_dtype = model.pipeline_dtype = torch.float32
    for fusion in vars(model):
        if fusion.endswith("_fusion"):
            setattr(model, fusion, False)
    model.persist_layer_norm = False
    if isinstance(model, HybridModelProvider):
        model.attention_backend = AttnBackend.auto  # as GPT has it: core forbids one process to change it
        model.moe_grouped_gemm = model.moe_shared_expert_overlap = False
        model.moe_token_dispatcher_type = "alltoall"
    else:
        model.transformer_layer_spec = local_layer_spec
