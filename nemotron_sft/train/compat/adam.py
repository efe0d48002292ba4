"""Adam's update on a GPU, for weights in bf16 whose fp32 master copies are kept as the 16 bits that bf16 lacks."""

from __future__ import annotations

from typing import Any

from nemotron_sft.train.compat.registry import patch

LARGE = 1 << 16  # numbers from which a tensor is worth a launch of its own; smaller ones are left to one of theirs


@patch(
    {"transformer_engine_torch:multi_tensor_adam_param_remainder": "compiled | missing"},  # missing without a GPU
    seen="transformer-engine 2.20",
    until="Transformer Engine's kernel reads several numbers at a time, and takes a factor for the gradients",
)
def read_memory_at_full_speed(factors: Factors) -> None:
    """Stand in for the kernel of Transformer Engine's FusedAdam that keeps remainders of master weights.

    It moves 28 bytes per parameter, one number per thread and access, at 60 % of an H100's memory bandwidth, and the
    factor of the gradients (clipping, and one over the number of tokens) takes a pass over them before. Here both are
    one pass over wide accesses. Call it before the optimizer is made. The state stays what it was.
    """
    import transformer_engine_torch as extension

    from nemotron_sft.train.kernels.adam import update_together

    theirs = extension.multi_tensor_adam_param_remainder

    def adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
        corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        settings = (lr, beta1, 1 - beta1, beta2, 1 - beta2, *corrections, eps, decay)
        together: dict[tuple, list] = {}
        small = []
        for tensors in zip(*lists, strict=True):
            if not _is_large(tensors[0]):
                small.append(tensors)
                continue
            factor = factors.take(tensors[0])
            gradient, _, first, second, _ = tensors
            kind = (gradient.numel(), gradient.dtype, first.dtype, second.dtype, id(factor))
            together.setdefault(kind, [factor]).append(tensors)
        if small:
            theirs(chunk, overflow, list(map(list, zip(*small, strict=True))), lr, beta1, beta2, eps, step, mode,
                   bias_correction, decay)  # fmt: skip
        for factor, *several in together.values():
            update_together(several, factor, settings, bool(mode))

    extension.multi_tensor_adam_param_remainder = adam


class Factors:
    """Which gradients wait for a factor until Adam reads them: {address: (1,) float32 on the GPU}."""

    def __init__(self) -> None:
        self._waiting: dict[int, Any] = {}

    def put(self, gradients: list, factor: Any) -> list:
        """Let large gradients wait for `factor`; returns the others, which have to be scaled now.

        Raises RuntimeError where one still waits for its factor of the step before: Adam did not run on it.
        """
        large = {gradient.data_ptr(): factor for gradient in gradients if _is_large(gradient)}
        if self._waiting.keys() & large.keys():
            raise RuntimeError("gradients of the last step were not scaled: Adam did not take their factor")
        self._waiting |= large
        return [gradient for gradient in gradients if not _is_large(gradient)]

    def take(self, gradient: Any) -> Any:
        """The factor of a gradient, None if none was put; it is there once."""
        return self._waiting.pop(gradient.data_ptr(), None)


def _is_large(gradient: Any) -> bool:
    return LARGE <= gradient.numel() < 1 << 31 and gradient.is_contiguous()  # no larger one was tried
