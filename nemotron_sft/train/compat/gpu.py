"""What Megatron lacks, or does slowly, on a GPU.

Nothing is replaced on a GPU: Transformer Engine, its attention and its optimizer are used as they are. The one
supplied module is APEX's fused weight-gradient kernel, where APEX is missing, through Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from nemotron_sft.train.compat.adapters import add_adapters_inside_their_products
from nemotron_sft.train.compat.attention import accept_hidden_tokens, keep_rotated_keys
from nemotron_sft.train.compat.bandwidth import (
    add_up_embeddings_in_place,
    convolve_in_one_pass,
    normalise_in_one_pass,
    sum_squares_in_one_launch,
)
from nemotron_sft.train.compat.bridge import skip_helper_build
from nemotron_sft.train.compat.conversion import load_all_or_nothing
from nemotron_sft.train.compat.experts import use_grouped_products
from nemotron_sft.train.compat.mamba import (
    decode_batches,
    documents_reach_mamba,
    number_documents_without_waiting,
    read_to_each_end,
)
from nemotron_sft.train.compat.registry import patch


def use_gpu() -> None:
    """Prepare this process for Megatron on a GPU. Call once, before anything imports megatron."""
    import torch

    torch.cuda.set_device(torch.cuda.current_device())  # Transformer Engine wants torch, and its context, first
    supply_wgrad_kernel()  # before core looks for it, at import
    skip_helper_build()
    agree_on_signals_on_the_host()
    documents_reach_mamba()
    number_documents_without_waiting()
    decode_batches()
    read_to_each_end()
    keep_rotated_keys()
    accept_hidden_tokens()
    load_all_or_nothing()
    reuse_logits_for_their_gradient()
    use_grouped_products()
    normalise_in_one_pass()
    convolve_in_one_pass()
    sum_squares_in_one_launch()
    add_up_embeddings_in_place()
    add_adapters_inside_their_products()


@patch(
    {},  # it supplies a whole module, which core looks for by name at import
    seen="megatron-core 0.19.2, transformer-engine 2.12",
    until="core's output layer fuses through Transformer Engine by itself",
)
def supply_wgrad_kernel() -> None:
    """Let core add weight gradients into the fp32 buffer inside the matrix product.

    Transformer Engine's layers do so themselves, but core's output layer insists on APEX's
    `fused_weight_gradient_mlp_cuda`, and refuses the fusion for the whole model without it.
    """
    name = "fused_weight_gradient_mlp_cuda"
    if name in sys.modules or importlib.util.find_spec(name):
        return

    def accumulate(inputs, gradients, main_grad) -> None:
        """main_grad (out, in) += gradients (t, out)^T inputs (t, in)"""
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(
            inputs, gradients, out_dtype=main_grad.dtype, layout="NT", out=main_grad, accumulate=True, grad=True
        )

    module = ModuleType(name)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[name] = module


@patch(
    {
        "megatron.bridge.training.utils.sig_utils:DistributedSignalHandler.signals_received": "(self)",
        "megatron.bridge.training.utils.sig_utils:DistributedSignalHandler.__init__": "(self, sig)",
    },
    seen="megatron-bridge 0.6.2",
    until="Bridge gathers its signals on the host, or less often than at every step",
)
def agree_on_signals_on_the_host() -> None:
    """Let ranks tell each other of a SIGTERM through the CPU.

    Bridge gathers that flag on the GPU after every step, and so waits for the step before it can start the next.
    """
    import torch
    from megatron.bridge.training.utils.sig_utils import DistributedSignalHandler

    groups = []

    def signals_received(self) -> list[bool]:
        flag = torch.tensor([self._signal_received], dtype=torch.int32)
        if torch.distributed.get_world_size() > 1:
            if not groups:
                groups.append(torch.distributed.new_group(backend="gloo"))
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=groups[0])
        return [bool(flag)]

    DistributedSignalHandler.signals_received = signals_received


@patch(
    {
        "megatron.core.models.common.language_module.language_module:te_parallel_cross_entropy": (
            "(logits, labels, tp_group, is_cg_capturable) | NoneType"
        ),
        "transformer_engine.pytorch.cross_entropy:parallel_cross_entropy": (
            "(inp, target, label_smoothing, reduce_loss, dist_process_group, ignore_idx, is_cg_capturable, *, "
            "overwrite_input, _input) | missing | class"  # class: the stand-in of a machine without a GPU
        ),
    },
    seen="megatron-core 0.19.2, transformer-engine 2.20",
    until="core passes overwrite_input on, and Transformer Engine reads logits from memory once",
)
def reuse_logits_for_their_gradient() -> None:
    """Let the gradient of the logits take the place of the logits, which nothing reads after the loss.

    Logits are the largest tensors of a step (2 bytes x vocabulary x trained tokens): core keeps both, and Transformer
    Engine reads them for the loss and once more for the gradient.
    """
    from megatron.core.models.common.language_module import language_module
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    from nemotron_sft.train.kernels import cross_entropy

    def losses_of(logits, labels, tp_group, is_cg_capturable=False):
        if cross_entropy.eligible(logits, labels, tp_group):
            return cross_entropy.losses_of(logits, labels)
        return parallel_cross_entropy(logits, labels, 0.0, False, tp_group, overwrite_input=True)

    language_module.te_parallel_cross_entropy = losses_of
