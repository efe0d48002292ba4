"""Answers of a Megatron model, in batches, token by token, with core's cache of keys, values and Mamba states.

Core's StaticInferenceContext keeps them; its engines do not fit: the static one decodes a Mamba batch as one row (core
0.19.2, see compat.mamba.decode_batches), the dynamic one needs FlashAttention and a GPU. What is left of an engine is
this loop. Prompts of a batch are read, some of about one length at once, but for the last token of each: from there on
every row takes one token at a time. A row whose prompt is shorter than the longest has a gap in the cache. Rows that
have ended are left out once they are half of all.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_sft.train.start import this_machine

# By how much prompts may be longer than the shortest: in tokens, or as a share of it.
IN_A_BATCH, READ_AT_ONCE = (64, 1.0), (24, 0.125)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else drawn with a seed.

    Every prompt has random numbers of its own, so its answer depends neither on its batch nor on other prompts.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    model: Sequence[Any],
    prompts: Sequence[np.ndarray],
    budget: Sequence[int],
    eos_id: int,
    sampling: Sampling,
    batch_size: int,
) -> list[list[int]]:
    """The new tokens of each prompt, without the end-of-turn token that ended them, at most budget[i] of them.

    model: the chunks of a Megatron-Core GPT or hybrid model on this rank, as Bridge wraps them; left in the mode it
    was in. prompts: int32 arrays. All ranks must call it together with the same prompts, and get the same answers.
    """  # fmt: skip
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    training = [chunk.training for chunk in model]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    spread = (0, 0) if _one_length(model) else IN_A_BATCH
    with torch.no_grad(), _for_inference(model):
        for start, end in _alike([len(prompts[i]) for i in order], batch_size, *spread):
            members = order[start:end]
            rows = _batch(model, [prompts[i] for i in members], [budget[i] for i in members], eos_id, sampling, members)
            for i, row in zip(members, rows, strict=True):
                answers[i] = row
    for chunk, mode in zip(model, training, strict=True):
        chunk.train(mode)
    return answers


def _one_length(model) -> bool:
    """Whether prompts of a batch must be of one length: attention is more than what compat.attention does with gaps."""
    from megatron.core.utils import get_model_config, unwrap_model

    config = get_model_config(unwrap_model(model[0]))
    more = (
        config.multi_latent_attention,
        config.flash_decode,
        config.window_size,
        config.apply_query_key_layer_scaling,
    )
    return any(more) or config.softmax_type != "vanilla"


def _alike(lengths, most: int, tokens: int, share: float) -> Iterator[tuple[int, int]]:
    """(start, end) of parts of ascending lengths: at most so many, and none much longer than the part's shortest."""
    start = 0
    for end in range(1, len(lengths) + 1):
        full = end == len(lengths) or end - start == most
        if full or lengths[end] - lengths[start] > max(tokens, share * lengths[start]):
            yield start, end
            start = end


def _batch(model, prompts, budget, eos_id: int, sampling: Sampling, numbers) -> list[list[int]]:
    """The new tokens of prompts of ascending lengths. numbers: of the prompts, for their random numbers."""
    import torch

    last, limits = torch.tensor([len(prompt) - 1 for prompt in prompts]), torch.tensor(budget)
    context, gap = _read(model, prompts, last, max(budget))
    generators = [np.random.default_rng([sampling.seed, i]) for i in numbers]
    new = torch.full((len(prompts), max(budget)), eos_id)
    rows, chosen = torch.arange(len(prompts)), torch.tensor([int(prompt[-1]) for prompt in prompts])
    open_ = limits > 0
    with _one_thread():
        for step in range(max(budget)):
            logits = _forward(model, chosen[:, None], last[rows] + step, context, gap)
            context.increment_sequence_len_offset(1)
            drawing = [generators[row] for row in rows]
            chosen = _agreed(_choose(logits, sampling, drawing) if logits is not None else None, len(rows))
            new[rows, step] = chosen
            open_ &= (chosen != eos_id) & (limits[rows] > step + 1)
            if not open_.any():
                break
            if 2 * open_.sum() <= len(rows):
                rows, chosen, gap = rows[open_], chosen[open_], gap if gap is None else gap[open_.to(gap.device)]
                _leave(context, open_)
                open_ = open_[open_]
    found = zip(new.tolist(), budget, strict=True)
    return [list(itertools.takewhile(lambda token: token != eos_id, row[:most])) for row, most in found]


def _leave(context, rows) -> None:
    """Leave in a cache of keys and values (t, rows, groups, d) and Mamba states (rows, ...) some rows: bool (rows,)."""
    cache = context.key_value_memory_dict
    for layer, (first, second) in cache.items():
        kept = rows.to(first.device)
        mamba = first.dim() == 3  # the convolution's state
        cache[layer] = (first[kept], second[kept]) if mamba else (first[:, kept], second[:, kept])


def _read(model, prompts, last, room: int):
    """The cache after all tokens of prompts but the last, and its gaps: (rows, 1, 1, length) bool, None without any.

    last: (rows,), the number of tokens that are read. room: for so many more. A shorter prompt is padded with itself:
    one token over and over would always go to the same experts. None of it is kept.
    """
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext

    longest = max(int(last[-1]), 1)
    context = StaticInferenceContext(len(prompts), longest + room)
    for start, end in _alike(last.tolist(), len(prompts), *READ_AT_ONCE):
        context.batch_size_offset = start
        context.lengths = last[start:end].to(_device())  # whereupon Mamba layers keep the states behind these
        upto = max(int(last[end - 1]), 1)
        tokens = torch.from_numpy(np.stack([np.resize(prompt, upto) for prompt in prompts[start:end]]).astype(np.int64))
        _forward(model, tokens, torch.arange(upto), context)
    context.batch_size_offset, context.sequence_len_offset = 0, longest
    context.enable_decode_mode()
    places = torch.arange(longest + room)
    gap = (places >= last[:, None]) & (places < longest)
    return context, gap[:, None, None].to(_device()) if gap.any() else None


def _forward(model, tokens, positions, context, gap=None):
    """Logits (rows, vocabulary) of the token behind `tokens` (rows, n), on the last pipeline stage; None elsewhere.

    positions: (n,) of a prompt's tokens, (rows,) of one token each. gap: true where a row has no tokens in the cache.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config, unwrap_model

    stages, stage = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    tokens, context.positions = tokens.to(_device()), positions.to(_device())
    places = (context.positions[:, None] if context.is_decode_only() else context.positions).expand(tokens.shape)
    hidden = None if gap is None else gap[..., : context.sequence_len_offset + tokens.shape[1]]
    out = None
    for number, chunk in enumerate(model):
        config = get_model_config(unwrap_model(chunk))
        if stages > 1 and (number, stage) != (0, 0):
            shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
            states = torch.empty(shape, dtype=config.pipeline_dtype or config.params_dtype, device=_device())
            torch.distributed.recv(states, ranks[stage - 1], group=group)
            unwrap_model(chunk).set_input_tensor(states)
        out = chunk(tokens, places, hidden, inference_context=context, runtime_gather_output=True)
        if stages > 1 and (number, stage) != (len(model) - 1, stages - 1):
            torch.distributed.send(out.contiguous(), ranks[(stage + 1) % stages], group=group)
    return out[:, -1].float() if stage == stages - 1 else None


def _choose(logits, sampling: Sampling, generators):
    """(rows,) int64 from logits (rows, vocabulary)."""
    import torch

    if not sampling.temperature:
        return logits.argmax(-1).cpu()
    probabilities, tokens = torch.softmax(logits / sampling.temperature, -1).sort(-1, descending=True)
    probabilities = probabilities.cpu().double()
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0  # the most likely one always stays
    drawn = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
    place = (probabilities.cumsum(-1) < (drawn * probabilities.sum(-1))[:, None]).sum(-1)
    return tokens.cpu().gather(-1, place.clamp(max=tokens.shape[-1] - 1)[:, None])[:, 0]


def _agreed(chosen, rows: int):
    """The chosen tokens on every rank: those of the first replica's last pipeline stage.

    Replicas compute the same, but not always in the same order, and one token's difference would end in a deadlock.
    """
    import torch

    if torch.distributed.get_world_size() == 1:
        return chosen
    from megatron.core import parallel_state

    box = torch.empty(rows, dtype=torch.int64) if chosen is None else chosen
    box = box.to(_device())
    source = torch.tensor([torch.distributed.get_rank() if _speaks(parallel_state) else -1], device=_device())
    torch.distributed.all_reduce(source, torch.distributed.ReduceOp.MAX)
    torch.distributed.broadcast(box, int(source))
    return box.cpu()


def _speaks(parallel_state) -> bool:
    return (
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank()
        == parallel_state.get_pipeline_model_parallel_world_size() - 1
    )


def _device():
    import torch

    return torch.device("cpu") if this_machine().on_cpu else torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On the CPU one token's products are too small to share: waiting for one another costs more."""
    import torch

    threads = torch.get_num_threads()
    if this_machine().on_cpu:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _for_inference(model) -> Iterator[None]:
    """Core's inference mode: caches are used, and no row is cut among tensor-parallel ranks, as one token can't be."""
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.utils import unwrap_model

    chunks = [unwrap_model(chunk) for chunk in model]
    cut = [each for chunk in chunks for each in _what_cuts(chunk)]
    for chunk in chunks:
        chunk.eval()
    try:
        for owner, name, value in cut:
            setattr(owner, name, not value)
        with InferenceMode.active():
            yield
    finally:
        for owner, name, value in cut:
            setattr(owner, name, value)


def _what_cuts(chunk) -> list[tuple[Any, str, bool]]:
    """(owner, attribute, value) of every switch of a model by which rows are cut among tensor-parallel ranks.

    Core's set_model_to_sequence_parallel is not for a model that goes on to train: it turns on afterwards what was off
    before, such as the layers of adapters, and leaves on what Bridge's adapters do themselves.
    """
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    owners = {id(each): each for module in chunk.modules() for each in (module, getattr(module, "config", None))}
    found = [(each, name, True) for each in owners.values() for name in names if getattr(each, name, None) is True]
    silent = [each for each in owners.values() if getattr(each, "disable_sequence_parallel_comm", None) is False]
    return found + [(adapter, "disable_sequence_parallel_comm", False) for adapter in silent]
