"""Multi-token prediction where logits are computed for some tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemotron_sft.train.compat.registry import patch


@patch(
    {
        "megatron.core.transformer.multi_token_prediction:_compute_mtp_acceptance_counts": (
            "(mtp_logits, mtp_labels, loss_mask, output_layer, runtime_gather_output, tp_group)"
        )
    },
    seen="megatron-core 0.19.2",
    until="core takes the positions of the tokens that need logits",
)
def count_predictions_of_kept_tokens(kept: Callable[[], Any]) -> None:
    """Core counts right guesses by comparing logits with all labels; here there are logits of the kept tokens only.

    kept: their positions in the row, (k,) int64, while a forward pass runs.
    """
    from megatron.core.transformer import multi_token_prediction as mtp

    whole = mtp._compute_mtp_acceptance_counts

    def count(logits, labels, loss_mask, *others):
        if len(logits) != labels.shape[1]:
            labels, loss_mask = (x.index_select(1, kept()) for x in (labels, loss_mask))
        return whole(logits, labels, loss_mask, *others)

    mtp._compute_mtp_acceptance_counts = count
