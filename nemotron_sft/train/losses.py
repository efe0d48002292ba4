"""What each dataset's tokens cost, and what a step's losses are divided by where tokens have weights.

Both look at the losses and the loss mask that Bridge's own loss function gets, on the device and without waiting for
it, so they hold under data, tensor, pipeline, context and expert parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class WatchedLosses:
    """Wraps Bridge's loss function and, for weighted data, its division of the gradients.

    Bridge counts tokens in whole numbers: the sum of the loss mask, cut off. That is right for a mask of 0 and 1 only;
    with weights the sum itself is what the reported loss and the gradients are divided by.
    """

    def __init__(self):
        self._sums = None  # (datasets, 3) float64 on the device: loss x weight, weight, trained tokens
        self._weight = None  # () float64 on the device: of this step's tokens on this rank so far
        self._bridges = None  # Bridge's finalize_model_grads

    def reset(self) -> None:
        """Begin to add up anew."""
        if self._sums is not None:
            self._sums.zero_()

    def watch(self, state, model, loss_function: Callable, batch: dict) -> Callable:
        """`loss_function`, which Bridge has made for `batch` (see batches.collate), watched."""
        from megatron.bridge.training.utils.pg_utils import get_pg_collection
        from megatron.core.utils import get_model_config

        data, config = state.cfg.dataset, get_model_config(model)
        if data.weighted and config.finalize_model_grads_func != self._finalize:
            self._bridges, config.finalize_model_grads_func = config.finalize_model_grads_func, self._finalize
        return partial(self._loss, loss_function, batch, data, get_pg_collection(model).cp, model.training)

    def _loss(self, loss_function, batch: dict, data, context_group, training: bool, output):
        """Bridge's (loss, number of tokens, report), with a report that is not cut off."""
        import torch

        loss, tokens, report = loss_function(output)
        loss_mask = loss_function.args[0].reshape(-1).float()
        weight = loss_mask.sum(dtype=torch.float64)
        if training and data.weighted:
            self._weight = weight if self._weight is None else self._weight + weight
        if data.sources:
            sources = on_this_rank(batch["sources"].cuda(non_blocking=True), batch, context_group)
            self._add(output.detach().reshape(-1).float(), loss_mask, sources, data.sources)
        return loss, tokens, report | {"lm loss": torch.stack((loss.detach().reshape(()), weight.float()))}

    def _add(self, losses, loss_mask, sources, datasets: int) -> None:
        """Add the tokens of a row. losses, loss_mask: (T,) float32; sources: (T,) int32, below `datasets`."""
        import torch

        if self._sums is None:
            self._sums = torch.zeros(datasets, 3, dtype=torch.float64, device=losses.device)
        columns = torch.stack((losses * loss_mask, loss_mask, (loss_mask != 0).float()), 1)
        self._sums.index_add_(0, sources, columns.double())

    def _finalize(self, model, num_tokens=None, **groups) -> None:
        """Stands in for core's finalize_model_grads, and divides by weights instead of counts.

        Core broadcasts the last pipeline stage's number and adds up those of the ranks, whatever its type.
        """
        import torch

        if num_tokens is not None:
            num_tokens = torch.zeros((), device="cuda") if self._weight is None else self._weight.float()
        self._weight = None
        self._bridges(model, num_tokens, **groups)

    def totals(self, datasets: int) -> list[tuple[float, float, int]]:
        """(mean loss, weight, trained tokens) of each dataset, over all ranks since `reset`. All ranks call it.

        The weight is the loss mask's sum: the number of trained tokens, unless tokens are weighted. The mean of the
        losses by these weights is the loss that Bridge reports. Without tokens the loss is nan.
        """
        import torch
        from megatron.core.parallel_state import get_tensor_model_parallel_rank

        sums = torch.zeros(datasets, 3, dtype=torch.float64, device="cuda")
        if self._sums is not None and get_tensor_model_parallel_rank() == 0:  # all tensor-parallel ranks have the same
            sums += self._sums
        if torch.distributed.get_world_size() > 1:  # what is not on the last pipeline stage adds nothing
            torch.distributed.all_reduce(sums)
        return [(loss / weight if weight else float("nan"), weight, round(n)) for loss, weight, n in sums.tolist()]


def on_this_rank(values, batch: dict, context_group):
    """The part of a row's `values` (1, T) that a rank of the context-parallel group works on: (T / ranks,)."""
    if context_group.size() == 1:
        return values[0]
    from megatron.bridge.training.utils.packed_seq_utils import get_thd_cp_partition_indices

    indices = get_thd_cp_partition_indices(
        batch["cu_seqlens_q_padded"][0], total_tokens=values.shape[1], cp_group=context_group, device=values.device
    )
    return values[0].index_select(0, indices)
