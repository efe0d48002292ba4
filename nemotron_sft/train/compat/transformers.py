"""transformers' own models, where what they compute on the CPU is not what the published ones are."""

from __future__ import annotations

from typing import Any

from nemotron_sft.train.compat.registry import patch


@patch(
    {
        "transformers.models.nemotron_h.modeling_nemotron_h:NemotronHMamba2Mixer.torch_forward": (
            "(self, input_states, cache_params, attention_mask)"
        )
    },
    seen="transformers 5.12.1",
    until="NemotronHMamba2Mixer.torch_forward agrees with mamba-ssm beyond one chunk, and clamps no step",
)
def exact_scan(model: Any, length: int) -> None:
    """Without mamba-ssm, NemotronH's scan is right within one chunk only, and never lets a step be small.

    The sum over the chunks before a chunk is over the wrong axis, and steps below `time_step_min` are raised to it,
    which neither mamba-ssm nor Megatron does. Chunks as long as the input and a minimum of 0 give the same as those,
    for inputs up to `length` tokens, and for whatever is generated after them.
    """
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    for layer in model.modules():
        if isinstance(layer, NemotronHMamba2Mixer):
            layer.chunk_size, layer.time_step_min = max(layer.chunk_size, length), 0.0
