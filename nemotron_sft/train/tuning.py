"""What a GPU run sets that neither Bridge's recipes nor its defaults do; measured in docs/performance-method.md."""

from __future__ import annotations

import importlib.util

from nemotron_sft.errors import UserError
from nemotron_sft.train.estimate import memory

# Row length, in tokens, from which launching kernels no longer holds the GPU up.
LONG_ROW = 32768
MEMORY_SHARE = 0.9  # of the GPU that the estimate of a row may fill; it is good to a few percent
PROFILED = 3  # steps in the trace of profile=true
PRECISIONS = {"bf16": "bf16_mixed", "fp8": "bf16_with_fp8_current_scaling_mixed"}


def tune(container, world_size: int) -> None:
    """Choose the fast, equivalent form of what the recipe left open; the user's own keys are applied afterwards."""
    model, train, logger = container.model, container.train, container.logger
    model.apply_rope_fusion = True
    model.gradient_accumulation_fusion = True
    model.cross_entropy_loss_fusion, model.cross_entropy_fusion_impl = True, "te"  # one pass over the logits each way
    model.moe_router_fusion = bool(model.num_moe_experts)
    container.optimizer.use_distributed_optimizer = container.ddp.use_distributed_optimizer = True
    container.optimizer.use_precision_aware_optimizer = True  # Adam itself keeps the fp32 master weights
    container.ddp.grad_reduce_in_fp32 = True
    # Gradients travel while the backward pass still computes, and weights while the next forward pass does.
    container.ddp.overlap_grad_reduce = container.ddp.overlap_param_gather = world_size > 1
    container.optimizer.overlap_param_gather = False  # Bridge turns it on with that of ddp
    # Checks that wait for the GPU in every step. Progress looks at the loss whenever it is logged.
    container.ddp.check_for_nan_in_grad = False
    container.rerun_state_machine.check_for_nan_in_loss = False
    train.check_optimizer_step_success = False  # only fp16 skips steps
    train.skip_sync_grad_norm_across_mp = True  # the norm is already that of the whole model
    logger.skip_train_metrics_log = True  # reads the learning rate back from the GPU; Progress logs instead
    # A garbage collection in the middle of a step stalls every rank that waits for this one.
    train.manual_gc, train.manual_gc_interval, train.manual_gc_eval = True, 100, True
    use_what_is_installed(model)


def let_adam_keep_master_weights(container) -> None:
    """See that core obeys `use_precision_aware_optimizer`; call it when all settings are made.

    Transformer Engine's Adam then keeps of a master weight the 16 bits that the bf16 weight lacks, and writes both in
    one pass: the same fp32 arithmetic with 2 bytes per parameter less. Core leaves it to itself, without a word,
    where the FP8 recipe is not "delayed", which Bridge's bf16 setting names although it uses no FP8.
    """
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    precision = container.mixed_precision
    if isinstance(precision, str):
        precision = container.mixed_precision = get_mixed_precision_config(precision)
    if precision is not None and precision.bf16 and not precision.fp8:
        precision.fp8_recipe = "delayed"


def use_what_is_installed(model) -> None:
    """Where a recipe asks for a package that this machine lacks, take what Transformer Engine and core bring."""
    from megatron.core.transformer.enums import AttnBackend

    def lacks(package: str) -> bool:
        return importlib.util.find_spec(package) is None

    if (
        model.attention_backend in (AttnBackend.flash, "flash")
        and lacks("flash_attn")
        and lacks("flash_attn_interface")
    ):
        model.attention_backend = AttnBackend.auto
    if model.moe_token_dispatcher_type == "flex" and lacks("deep_ep"):
        model.moe_token_dispatcher_type = "alltoall"


def fit_dispatcher(model) -> None:
    """Tokens of experts that are all on one GPU go through the plain dispatcher: core's others insist on several."""
    group = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or model.tensor_model_parallel_size)
    if model.moe_token_dispatcher_type == "flex" and group == 1:
        model.moe_token_dispatcher_type = "alltoall"


def fuse_activation(model) -> None:
    """One kernel for the activation and its gate, where core has one: gated GELU and SiLU."""
    import torch.nn.functional as F

    known = (F.silu, F.gelu, "silu", "gelu")
    if model.gated_linear_unit and any(model.activation_func is f or model.activation_func == f for f in known):
        model.bias_activation_fusion = True


def mixed_precision(precision: str) -> str:
    """Bridge's name for `precision`."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision}: choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def packs_per_row(container, world_size: int, gpu_bytes: int) -> int:
    """Packs per micro batch: rows as long as a rank's share of the batch allows and memory holds, up to LONG_ROW."""
    model, train = container.model, container.train
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    share = train.global_batch_size // max(1, world_size // ranks)
    # Every stage of a pipeline needs a micro batch of its own to work on.
    share //= model.pipeline_model_parallel_size
    longest = LONG_ROW * model.context_parallel_size // model.seq_length
    for packs in range(min(share, longest), 1, -1):
        train.micro_batch_size = packs
        estimate = memory(container, world_size)
        if estimate is None:
            break
        if share % packs == 0 and estimate["total"] <= MEMORY_SHARE * gpu_bytes:
            return packs
    return 1


def profiling(train_iters: int):
    """Bridge's profiler settings for a trace of a few steps, past the first ten where the run is long enough."""
    from megatron.bridge.training.config import ProfilingConfig

    first = max(1, min(10, train_iters - PROFILED))
    return ProfilingConfig(use_pytorch_profiler=True, profile_step_start=first, profile_step_end=first + PROFILED)
