"""Exact match on held-out prompts, by greedy generation."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemotron_sft.config import TrainConfig
from nemotron_sft.data.opened import open_template, open_tokenizer
from nemotron_sft.errors import UserError
from nemotron_sft.files import write_json
from nemotron_sft.train.checkpoints import newest_iteration, trained_model


@dataclasses.dataclass
class Prompts:
    """Held-out prompts, rendered and tokenized as at inference."""

    records: list[dict]  # messages, answer, optionally tools and task
    ids: list[np.ndarray]  # int32, one array per prompt, ending in the generation prompt
    budget: list[int]  # tokens of the reference answer, plus its end and a little room for another spelling
    decode: Callable[[np.ndarray], str]
    eos_id: int


def load_prompts(path: Path, metadata: dict) -> Prompts:
    """Read a JSONL file of {"messages", "answer", optional "tools"}; template and tokenizer are the data's own."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"held-out prompts {path}: {error}; set heldout.path=null to train without them") from None
    template, tokenizer = open_template(metadata), open_tokenizer(metadata)
    texts = [template.generation_prompt(record["messages"], record.get("tools"), thinking=False) for record in records]
    flat, offsets = tokenizer.encode_batch(texts)
    ids = [flat[start:end] for start, end in itertools.pairwise(offsets)]
    lengths = np.diff(tokenizer.encode_batch([record["answer"] for record in records])[1])
    return Prompts(records, ids, [int(n) + 4 for n in lengths], tokenizer.decode, tokenizer.eos_id)


def answer(prompts: Prompts, model, max_new_tokens: int) -> list[str]:
    """The model's greedy answers, each up to its first end-of-turn token, or to where it can no longer be right.

    model: a Megatron-Core GPT or hybrid model. All unfinished prompts form one packed row per step; without a cache
    of keys and values the cost is quadratic in the answer's length, which short answers can afford.
    """
    import torch

    rows = [list(map(int, ids)) for ids in prompts.ids]
    unfinished = list(range(len(rows)))
    model.eval()
    with torch.no_grad():
        for _ in range(max_new_tokens):
            best = _next_tokens(model, [rows[i] for i in unfinished])
            for i, token in zip(unfinished, best, strict=True):
                rows[i].append(token)
            unfinished = [
                i
                for i in unfinished
                if rows[i][-1] != prompts.eos_id and len(rows[i]) < len(prompts.ids[i]) + prompts.budget[i]
            ]
            if not unfinished:
                break
    model.train()
    new = (row[len(ids) :] for row, ids in zip(rows, prompts.ids, strict=True))
    return [prompts.decode(np.array([t for t in tokens if t != prompts.eos_id], np.int32)).strip() for tokens in new]


def _next_tokens(model, rows: list[list[int]]) -> list[int]:
    """The most likely next token of each row; rows are packed into one THD batch."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int().cuda()
    longest = int(lengths.max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=int(ends[-1]),  # Mamba layers take the documents' boundaries from what this derives
    )
    tokens = torch.tensor([token for row in rows for token in row]).cuda()[None]
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()[None]
    with _logits_at((ends - 1).cuda(), model):
        logits = model(tokens, positions, None, packed_seq_params=packed)
    if get_tensor_model_parallel_world_size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits)
    if logits.shape[1] != len(rows):
        logits = logits[:, (ends - 1).cuda()]
    return logits[0].argmax(-1).tolist()


@contextlib.contextmanager
def _logits_at(places, model):
    """Compute no logits but those at `places` (k,), unless sequence parallelism divides the hidden states."""
    from megatron.core.utils import unwrap_model

    model = unwrap_model(model)
    if model.config.sequence_parallel or not model.post_process:
        yield
        return

    def select(layer, arguments):
        hidden, *others = arguments
        return hidden.index_select(0, places), *others

    hook = model.output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def exact_match(prompts: Prompts, answers: list[str]) -> float:
    """Share of answers that equal the reference after stripping white space."""
    right = [given == record["answer"].strip() for given, record in zip(answers, prompts.records, strict=True)]
    return sum(right) / len(right)


class Heldout:
    """Answers the held-out prompts before training (the model in memory) and after (the saved checkpoint)."""

    def __init__(self, config: TrainConfig, metadata: dict, run_dir: Path, rank: int):
        self.config, self.rank = config.heldout, rank
        self.file = run_dir / "heldout.json"
        self.prompts = load_prompts(Path(config.heldout.path), metadata) if config.heldout.path else None
        self.scores: dict[str, float] = {}
        self.answers: dict[str, list[str]] = {}
        if self.file.exists():  # resumed: the score from before the first start is the one to compare with
            saved = json.loads(self.file.read_text())
            asked = self.prompts and [record["messages"][-1]["content"] for record in self.prompts.records]
            if asked == [row["question"] for row in saved["prompts"]]:  # not other prompts than then
                self.scores["before"] = saved["exact_match"]["before"]
                self.answers["before"] = [row["before"] for row in saved["prompts"]]

    def register(self, manager) -> None:
        manager.register("on_train_start", self.on_train_start)

    def on_train_start(self, context) -> None:
        if self.prompts and "before" not in self.scores:
            self._score("before", context.model[0].module)

    def after(self, checkpoints: Path) -> None:
        """Load the newest checkpoint into a fresh model and score it."""
        if not self.prompts:
            return
        with trained_model(newest_iteration(checkpoints)) as model:
            self._score("after", model)

    def _score(self, when: str, model) -> None:
        answers = answer(self.prompts, model, self.config.max_new_tokens)
        self.answers[when], self.scores[when] = answers, exact_match(self.prompts, answers)
        if self.rank == 0:
            rows = [
                {"question": record["messages"][-1]["content"], "answer": record["answer"]}
                | {when: self.answers[when][i] for when in self.answers}
                for i, record in enumerate(self.prompts.records)
            ]
            write_json(self.file, {"exact_match": self.scores, "prompts": rows})
