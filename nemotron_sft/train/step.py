"""The forward step: Bridge's own, watched for what it consumed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from nemotron_sft.train.compat.last_layer import shorten_last_layer, take
from nemotron_sft.train.compat.mtp import count_predictions_of_kept_tokens
from nemotron_sft.train.losses import WatchedLosses, on_this_rank


class ForwardStep:
    """Bridge's GPT forward step, which also adds up what its batches held since `reset`.

    tokens (with padding), trained (tokens with a loss), packs (their numbers, in order) and waited (seconds for
    batches) are this rank's: of an interleaved pipeline's model chunks, which all read the same batches, the first
    one's. The loader counts on the host, where it is free; Bridge counts squared lengths on the GPU, and would wait for
    the sum in every step.

    The last layer's MLP or experts and the logits are computed for the tokens that have a loss and no others
    (`skip_untrained`): with a large vocabulary they cost as much as several layers, and much memory. skipped_flops
    adds up what this rank left out, forward and backward. losses: by dataset, see `WatchedLosses`.
    """

    def __init__(self):
        self.skip_untrained = True
        self._hooked: dict[int, bool] = {}  # model chunk (its id) -> whether it computes logits
        self._positions = None  # of the next row's trained tokens
        self._loss_mask = None  # of the next row
        self._kept = None  # the same, while a forward pass with labels runs
        self._flops_per_token = 0.0
        self._batch = None
        self.losses = WatchedLosses()
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.tokens = self.trained = 0
        self.skipped_flops = 0.0
        self.packs: list[int] = []
        self.waited = 0.0

    def __call__(self, state, data_iterator, model, return_schedule_plan: bool = False):
        from megatron.bridge.training.gpt_step import forward_step

        if id(model) not in self._hooked:
            self._hooked[id(model)] = self._hook(model)
        tokens, squares = getattr(state, "_flops_seqlen_sum", 0), getattr(state, "_flops_seqlen_sq_sum", 0)
        self._tokens = self._squares = 0
        watched = None if data_iterator is None else self._watch(data_iterator, model)
        self._batch = None
        output, loss_function = forward_step(state, watched, model, return_schedule_plan)
        if self._batch is not None:
            loss_function = self.losses.watch(state, model, loss_function, self._batch)
        if self._tokens and state._flops_seqlen_sum is not tokens:  # Bridge counted: the same numbers, from the host
            state._flops_seqlen_sum, state._flops_seqlen_sq_sum = tokens + self._tokens, squares + self._squares
            # Every rank's packs are alike on average: no exchange between ranks in every step.
            state._flops_requires_global_reduce = False
        return output, loss_function

    def _watch(self, data_iterator, model) -> Iterator[dict]:
        from megatron.bridge.training.utils.flop_utils import get_model_chunk_vp_stage

        first = not get_model_chunk_vp_stage(model)  # None where the pipeline is not interleaved
        while True:
            start = time.perf_counter()
            batch = next(data_iterator)
            self.waited += time.perf_counter() - start
            self._batch, counts = batch, batch["counts"]
            self._tokens += counts["tokens"]
            self._squares += counts["squares"]
            if first:
                self.tokens += counts["tokens"]
                self.trained += counts["trained"]
                self.packs += counts["packs"]
            self._positions, self._loss_mask = None, batch["loss_mask"]
            if self._hooked[id(model)] and self.skip_untrained:
                self._take_positions(batch["trained_positions"], counts)
            yield batch

    def _take_positions(self, positions, counts: dict) -> None:
        """positions: those of every context-parallel rank, one after another; counts["kept"] says how many each has."""
        from megatron.core.parallel_state import get_context_parallel_rank

        rank, kept = get_context_parallel_rank(), counts["kept"]
        before = sum(kept[:rank])
        own = positions[before : before + kept[rank]]
        if len(own):
            self._positions = own.cuda(non_blocking=True)
            self.skipped_flops += self._flops_per_token * (counts["tokens"] // len(kept) - len(own))

    def _hook(self, model) -> bool:
        """Have the model compute logits and losses for the kept tokens only, in every call of its output layer.

        The losses of all others are zero, which is what their loss mask makes of them anyway. Heads that predict
        further tokens are given that mask; Bridge forgets to, and core then trains them on prompts, too. Returns
        whether this chunk of a model makes logits.
        """
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.hybrid.hybrid_model import HybridModel
        from megatron.core.utils import unwrap_model

        language_model = unwrap_model(model)
        if type(language_model) not in (GPTModel, HybridModel) or not language_model.post_process:
            return False

        def keep(module, args, kwargs):
            trains = kwargs.get("labels") is not None
            self._kept = self._positions if trains else None
            if trains and module.config.mtp_num_layers:
                return args, kwargs | {"loss_mask": self._mask_on_this_rank(module.pg_collection.cp)}

        language_model.register_forward_pre_hook(keep, with_kwargs=True)
        self._shorten_output_layer(language_model.output_layer)
        self._scatter_losses(language_model)
        if language_model.config.mtp_num_layers:
            count_predictions_of_kept_tokens(lambda: self._kept)
        config = language_model.config
        heads = 1 + (config.mtp_num_layers or 0)
        head = 6 * config.hidden_size * language_model.vocab_size / config.tensor_model_parallel_size
        self._flops_per_token = heads * head
        if language_model.decoder.layers:  # a stage may have the head alone
            self._flops_per_token += shorten_last_layer(language_model.decoder.layers[-1], lambda: self._kept)
        return True

    def _mask_on_this_rank(self, context_group):
        """The row's loss mask, (1, T) float32, or a context-parallel rank's share of it."""
        mask = self._loss_mask.cuda(non_blocking=True)
        return on_this_rank(mask, self._batch, context_group)[None]

    def _shorten_output_layer(self, layer) -> None:
        """Give the output layer the kept rows of its input (T, 1, h), gathered first where tensor parallelism has cut
        the sequence: the ranks' pieces hold different numbers of kept tokens."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        whole = layer.forward

        def forward(hidden_states, *args, **kwargs):
            if self._kept is None:
                return whole(hidden_states, *args, **kwargs)
            divided, layer.sequence_parallel = layer.sequence_parallel, False
            try:
                if divided:
                    hidden_states = gather_from_sequence_parallel_region(hidden_states, False, group=layer.tp_group)
                if len(hidden_states) != len(self._kept):  # else the last layer has kept no others
                    hidden_states = take(hidden_states, self._kept)
                return whole(hidden_states, *args, **kwargs)
            finally:
                layer.sequence_parallel = divided

        layer.forward = forward

    def _scatter_losses(self, language_model) -> None:
        """Losses (1, T) from the logits (k, 1, v) of the kept tokens: zero except at their positions."""
        whole = language_model.compute_language_model_loss

        def losses_of(labels, logits):
            if self._kept is None or len(logits) == labels.shape[1]:
                return whole(labels, logits)
            losses = whole(labels.index_select(1, self._kept), logits)
            return losses.new_zeros(labels.shape).index_copy(1, self._kept, losses)

        language_model.compute_language_model_loss = losses_of
