"""The forward step: Bridge's own, watched for what it consumed."""

from __future__ import annotations

import time
from collections.abc import Iterator


class ForwardStep:
    """Bridge's GPT forward step, which also adds up what its batches held since `reset`.

    tokens (with padding), trained (tokens with a loss), packs (their numbers, in order) and waited (seconds for
    batches) are this rank's. The loader counts on the host, where it is free; Bridge counts squared lengths on the
    GPU, and would wait for the sum in every step.

    Logits are computed for the tokens that have a loss and no others (`skip_untrained`): with a large vocabulary
    they cost as much as several layers, and much memory. without_logits counts the tokens that had none.
    """

    def __init__(self):
        self.skip_untrained = True
        self._hooked = False
        self._positions = None
        self.reset()

    def reset(self) -> None:
        self.tokens = self.trained = self.without_logits = 0
        self.packs: list[int] = []
        self.waited = 0.0

    def __call__(self, state, data_iterator, model, return_schedule_plan: bool = False):
        from megatron.bridge.training.gpt_step import forward_step

        if not self._hooked:
            self._hook(model)
        tokens, squares = getattr(state, "_flops_seqlen_sum", 0), getattr(state, "_flops_seqlen_sq_sum", 0)
        self._tokens = self._squares = 0
        watched = None if data_iterator is None else self._watch(data_iterator)
        result = forward_step(state, watched, model, return_schedule_plan)
        if self._tokens and state._flops_seqlen_sum is not tokens:  # Bridge counted: the same numbers, from the host
            state._flops_seqlen_sum, state._flops_seqlen_sq_sum = tokens + self._tokens, squares + self._squares
            # Every rank's packs are alike on average: no exchange between ranks in every step.
            state._flops_requires_global_reduce = False
        return result

    def _watch(self, data_iterator) -> Iterator[dict]:
        while True:
            start = time.perf_counter()
            batch = next(data_iterator)
            self.waited += time.perf_counter() - start
            counts = batch["counts"]
            self._tokens += counts["tokens"]
            self._squares += counts["squares"]
            self.tokens += counts["tokens"]
            self.trained += counts["trained"]
            self.packs += counts["packs"]
            positions = batch["trained_positions"]
            self._positions = None
            if self._hooked == "logits" and self.skip_untrained and len(positions):
                self._positions = positions.cuda(non_blocking=True)
                self.without_logits += counts["tokens"] - len(positions)
            yield batch

    def _hook(self, model) -> None:
        """Have the model hand its last hidden states to `_losses`, where nothing stands in the way.

        Sequence and context parallelism divide the row over ranks that would hold different numbers of trained
        tokens, and hybrid models have no such interface in core.
        """
        from megatron.core.models.gpt import GPTModel
        from megatron.core.utils import unwrap_model

        self._hooked = "nothing"
        gpt = unwrap_model(model)
        config = gpt.config
        divided = config.sequence_parallel or config.context_parallel_size > 1 or config.mtp_num_layers
        if type(gpt) is not GPTModel or not gpt.post_process or divided:
            return

        def give_processor(module, args, kwargs):
            if kwargs.get("labels") is not None and self._positions is not None:
                kwargs |= {"output_processor": self._losses, "output_processor_context": self._positions}
            return args, kwargs

        gpt.register_forward_pre_hook(give_processor, with_kwargs=True)
        self._hooked = "logits"

    @staticmethod
    def _losses(
        *, hidden_states, output_layer, output_weight, labels, context, compute_language_model_loss, scale_logits, **_
    ):
        """Losses (1, T) of a row's hidden states (T, 1, h); zero except at the positions in `context` (k,)."""
        logits, _ = output_layer(hidden_states.index_select(0, context), weight=output_weight)
        losses = compute_language_model_loss(labels.index_select(1, context), scale_logits(logits))
        return losses.new_zeros(labels.shape).index_copy(1, context, losses)
