"""Answers of a Megatron model, in batches, token by token, with core's cache of keys, values and Mamba states.

Core's StaticInferenceContext keeps them; its engines do not fit: the static one decodes a Mamba batch as one row (core
0.19.2, see compat.mamba.decode_batches), the dynamic one needs FlashAttention and a GPU. What is left of an engine is
this loop. Prompts of a batch differ in length: the shortest one's tokens are read at once, then one column at a time,
each row taking its own token while its prompt lasts and the model's from there on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_sft.train.start import this_machine

SPREAD = 24  # tokens by which prompts of one batch may differ


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
    with torch.no_grad(), _for_inference(model):
        for members in _batches(prompts, budget, batch_size):
            rows = _batch(model, [prompts[i] for i in members], [budget[i] for i in members], eos_id, sampling, members)
            for i, row in zip(members, rows, strict=True):
                answers[i] = row
    for chunk, mode in zip(model, training, strict=True):
        chunk.train(mode)
    return answers


def _batches(prompts, budget, batch_size: int) -> Iterator[list[int]]:
    """Prompts by length, so that few columns are read one by one."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    members: list[int] = []
    for i in order:
        if members and (len(members) == batch_size or len(prompts[i]) - len(prompts[members[0]]) > SPREAD):
            yield members
            members = []
        members.append(i)
    if members:
        yield members


def _batch(model, prompts, budget, eos_id: int, sampling: Sampling, numbers) -> list[list[int]]:
    """The new tokens of prompts of ascending lengths. numbers: of the prompts, for their random numbers."""
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext

    ends = [len(prompt) + new for prompt, new in zip(prompts, budget, strict=True)]
    context = StaticInferenceContext(len(prompts), max(ends))
    tokens = torch.full((len(prompts), max(ends)), eos_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
    lengths, limits = torch.tensor([len(prompt) for prompt in prompts]), torch.tensor(ends)
    generators = [np.random.default_rng([sampling.seed, i]) for i in numbers]
    open_ = torch.ones(len(prompts), dtype=torch.bool)
    read, upto = 0, int(lengths.min())
    while True:
        logits = _forward(model, tokens[:, read:upto], read, context)
        context.increment_sequence_len_offset(upto - read)
        context.enable_decode_mode()
        chosen = _agreed(_choose(logits, sampling, generators) if logits is not None else None, len(prompts))
        answering = open_ & (lengths <= upto)
        tokens[answering, upto] = chosen[answering]
        limits[answering & (chosen == eos_id)] = upto  # the end-of-turn token is no part of the answer
        open_ &= limits > upto + 1
        if not open_.any():
            break
        read, upto = upto, upto + 1
    return [tokens[i, lengths[i] : limits[i]].tolist() for i in range(len(prompts))]


def _forward(model, tokens, offset: int, context):
    """Logits (rows, vocabulary) of the token behind `tokens` (rows, n), on the last pipeline stage; None elsewhere."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config, unwrap_model

    stages, stage = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    positions = torch.arange(offset, offset + tokens.shape[1]).expand(tokens.shape)
    out = None
    for number, chunk in enumerate(model):
        config = get_model_config(unwrap_model(chunk))
        if stages > 1 and (number, stage) != (0, 0):
            shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
            hidden = torch.empty(shape, dtype=config.pipeline_dtype or config.params_dtype, device=_device())
            torch.distributed.recv(hidden, ranks[stage - 1], group=group)
            unwrap_model(chunk).set_input_tensor(hidden)
        out = chunk(
            tokens.to(_device()), positions.to(_device()), None, inference_context=context, runtime_gather_output=True
        )
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
def _for_inference(model) -> Iterator[None]:
    """Core's inference mode: caches are used, and no row is cut among tensor-parallel ranks, as one token can't be."""
    import torch
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.utils import unwrap_model

    chunks = [unwrap_model(chunk) for chunk in model]
    cut = [each for chunk in chunks for each in _what_cuts(chunk)]
    for chunk in chunks:
        chunk.eval()
    threads = torch.get_num_threads()
    if this_machine().on_cpu:
        torch.set_num_threads(1)  # one token's products are too small to share: waiting for one another costs more
    try:
        for owner, name, value in cut:
            setattr(owner, name, not value)
        with InferenceMode.active():
            yield
    finally:
        torch.set_num_threads(threads)
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
