"""Settings that a running Bridge job can be switched to; all of them are read anew in every step."""

from __future__ import annotations

import gc
from typing import Any

ONE_FIELD = {
    "no NaN check of the loss": ("rerun_state_machine", "check_for_nan_in_loss", False),
    "no signal check": ("train", "exit_signal_handler", False),
    "no losses by dataset": ("dataset", "sources", 0),
}


def change(name: str, context: Any, step: Any = None) -> None:
    """Switch on the setting `name`; settings add up. step: this repository's ForwardStep, for what it alone decides."""
    config = context.state.cfg
    model = context.model[0].config if hasattr(context.model[0], "config") else config.model
    for target in (model, config.model):
        _fuse(name, target)
    if name.startswith("wgrad fusion "):
        _fuse_weight_gradients(context.model[0], name.endswith("on"))
    if name == "manual gc":
        gc.collect()
        gc.disable()
    if name in ONE_FIELD:
        section, field, value = ONE_FIELD[name]
        setattr(getattr(config, section), field, value)
    if name == "no NaN check of gradients":
        _do_not_check_gradients(context.model)
    if name in ("no metrics readback", "Bridge's logging"):
        bridges = name == "Bridge's logging"
        config.logger.skip_train_metrics_log = not bridges
        config.train.check_optimizer_step_success = bridges
        config.train.skip_sync_grad_norm_across_mp = not bridges
    if name == "logits of every token":
        step.skip_untrained = False


def _fuse(name: str, model: Any) -> None:
    """The settings of fused kernels that are fields of a model's config or provider."""
    if name == "rope fusion":
        model.apply_rope_fusion = True
    if name.startswith("cross entropy "):
        model.cross_entropy_loss_fusion = name.split()[-1] != "unfused"
        if model.cross_entropy_loss_fusion:
            model.cross_entropy_fusion_impl = name.split()[-1]


def _fuse_weight_gradients(model: Any, fused: bool) -> None:
    for module in model.modules():
        for attribute in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion"):
            if hasattr(module, attribute):
                setattr(module, attribute, fused)


def _do_not_check_gradients(chunks: list) -> None:
    for chunk in chunks:
        chunk.ddp_config.check_for_nan_in_grad = False
        for group in chunk.bucket_groups:
            group.ddp_config.check_for_nan_in_grad = False
