"""The forward step: Bridge's own, watched for what it consumed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from nemotron_sft.train.losses import WatchedLosses


class ForwardStep:
    """Bridge's GPT forward step, which also adds up what its batches held since `reset`.

    tokens (with padding), trained (tokens with a loss), packs (their numbers, in order) and waited (seconds for
    batches) are this rank's. The loader counts on the host, where it is free; Bridge counts squared lengths on the
    GPU, and would wait for the sum in every step.

    The last layer's MLP and the logits are computed for the tokens that have a loss and no others
    (`skip_untrained`): with a large vocabulary they cost as much as several layers, and much memory. skipped_flops
    adds up what this rank left out, forward and backward. losses: by dataset, see `WatchedLosses`.
    """

    def __init__(self):
        self.skip_untrained = True
        self._hooked = False
        self._positions = None  # of the next row's trained tokens
        self._kept = None  # the same, while a forward pass with labels runs
        self._flops_per_token = 0.0
        self._batch = None
        self.losses = WatchedLosses()
        self.reset()

    def reset(self) -> None:
        self.tokens = self.trained = 0
        self.skipped_flops = 0.0
        self.packs: list[int] = []
        self.waited = 0.0

    def __call__(self, state, data_iterator, model, return_schedule_plan: bool = False):
        from megatron.bridge.training.gpt_step import forward_step

        if not self._hooked:
            self._hook(model)
        tokens, squares = getattr(state, "_flops_seqlen_sum", 0), getattr(state, "_flops_seqlen_sq_sum", 0)
        self._tokens = self._squares = 0
        watched = None if data_iterator is None else self._watch(data_iterator)
        self._batch = None
        output, loss_function = forward_step(state, watched, model, return_schedule_plan)
        if self._batch is not None:
            loss_function = self.losses.watch(state, model, loss_function, self._batch)
        if self._tokens and state._flops_seqlen_sum is not tokens:  # Bridge counted: the same numbers, from the host
            state._flops_seqlen_sum, state._flops_seqlen_sq_sum = tokens + self._tokens, squares + self._squares
            # Every rank's packs are alike on average: no exchange between ranks in every step.
            state._flops_requires_global_reduce = False
        return output, loss_function

    def _watch(self, data_iterator) -> Iterator[dict]:
        while True:
            start = time.perf_counter()
            batch = next(data_iterator)
            self.waited += time.perf_counter() - start
            self._batch, counts = batch, batch["counts"]
            self._tokens += counts["tokens"]
            self._squares += counts["squares"]
            self.tokens += counts["tokens"]
            self.trained += counts["trained"]
            self.packs += counts["packs"]
            positions = batch["trained_positions"]
            self._positions = None
            if self._hooked == "logits" and self.skip_untrained and len(positions):
                self._positions = positions.cuda(non_blocking=True)
                self.skipped_flops += self._flops_per_token * (counts["tokens"] - len(positions))
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
            self._kept = self._positions if kwargs.get("labels") is not None else None
            if self._kept is not None:
                kwargs |= {"output_processor": self._losses, "output_processor_context": self._kept}
            return args, kwargs

        gpt.register_forward_pre_hook(give_processor, with_kwargs=True)
        self._hooked = "logits"
        self._flops_per_token = 6 * config.hidden_size * gpt.vocab_size / config.tensor_model_parallel_size
        self._shorten_last_mlp(gpt.decoder.layers[-1])

    def _shorten_last_mlp(self, layer) -> None:
        """Give the last layer's MLP the kept tokens only: no later attention looks at the others.

        Not experts, whose balance counts every token, and not where the layer is run again in the backward pass,
        by when the positions are those of another row.
        """
        from megatron.core.transformer.mlp import MLP
        from megatron.core.transformer.transformer_layer import TransformerLayer

        config = layer.config
        run_again = config.recompute_granularity == "full" or getattr(config, "cuda_graph_impl", "none") != "none"
        if type(layer) is not TransformerLayer or not isinstance(layer.mlp, MLP) or run_again:
            return
        whole = layer._forward_mlp

        def forward_mlp(hidden_states, *args, **kwargs):
            if self._kept is not None:
                hidden_states = hidden_states.index_select(0, self._kept)
            return whole(hidden_states, *args, **kwargs)

        layer._forward_mlp = forward_mlp
        matrices = sum(parameter.numel() for parameter in layer.mlp.parameters() if parameter.dim() == 2)
        self._flops_per_token += 6 * matrices

    @staticmethod
    def _losses(
        *, hidden_states, output_layer, output_weight, labels, context, compute_language_model_loss, scale_logits, **_
    ):
        """Losses (1, T) of a row's hidden states (T, 1, h), or (k, 1, h) if the last layer kept only those of
        `context` (k,); zero except at these positions."""
        if len(hidden_states) != len(context):
            hidden_states = hidden_states.index_select(0, context)
        logits, _ = output_layer(hidden_states, weight=output_weight)
        losses = compute_language_model_loss(labels.index_select(1, context), scale_logits(logits))
        return losses.new_zeros(labels.shape).index_copy(1, context, losses)
