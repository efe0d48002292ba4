"""Progress lines: a loss that is no number stops the run and names the packs; shares and waits are of the interval."""

import json
import math
from types import SimpleNamespace

import pytest

from nemotron_sft.errors import UserError
from nemotron_sft.train.progress import Progress
from nemotron_sft.train.step import ForwardStep


def run_steps(tmp_path, losses, monkeypatch):
    consumed = ForwardStep()
    split = {"tokens": 800, "packs": 10}
    terminal = SimpleNamespace(isatty=lambda: False, write=lambda text: None, flush=lambda: None)
    blend = {"datasets": [{"name": "a"}, {"name": "b"}]}
    progress = Progress(
        {"version": 1, "blend": blend, "splits": {"training": split}}, tmp_path, terminal, 0.0, 0, consumed
    )
    progress.tracked = SimpleNamespace(log=lambda **values: None)
    monkeypatch.setattr(progress, "_gpu", lambda *arguments: {})
    monkeypatch.setattr("nemotron_sft.train.progress.from_last_stage", lambda loss: loss)
    train = SimpleNamespace(train_iters=len(losses), global_batch_size=4, manual_gc=False)
    logger = SimpleNamespace(log_interval=2, skip_train_metrics_log=False)
    state = SimpleNamespace(
        cfg=SimpleNamespace(train=train, logger=logger),
        train_state=SimpleNamespace(step=0, floating_point_operations_so_far=0),
        tensorboard_logger=None,
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    context = SimpleNamespace(state=state, optimizer=optimizer, grad_norm=1.0, loss_dict=None)
    progress.on_train_start(context)
    for step, loss in enumerate(losses):
        consumed.tokens, consumed.trained = consumed.tokens + 100, consumed.trained + 25
        consumed.packs += [7 + step]
        context.loss_dict, state.train_state.step = loss, step
        progress.on_train_step_end(context)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_the_share_of_trained_tokens(tmp_path, monkeypatch):
    lines = run_steps(tmp_path, [3.0, 2.0, 1.5, 1.0], monkeypatch)
    assert [(line["step"], line["loss"], line["trained_fraction"]) for line in lines] == [
        (2, 2.0, 0.25),
        (4, 1.0, 0.25),
    ]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_packs(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"step 4 is nan: look at packs \[9, 10\]"):
        run_steps(tmp_path, [3.0, 2.0, 1.5, math.nan], monkeypatch)


def test_every_rank_takes_part_where_ranks_add_up_their_losses(tmp_path, monkeypatch):
    """The first rank of a run started again knows its last validation and test already, from metrics.jsonl."""
    monkeypatch.setattr("nemotron_sft.train.progress.from_last_stage", lambda losses: 2.0)
    blend = {"datasets": [{"name": "a"}, {"name": "b"}]}
    metadata = {"version": 2, "blend": blend, "splits": {"training": {"tokens": 800, "packs": 10}}}
    terminal = SimpleNamespace(isatty=lambda: False, write=lambda text: None, flush=lambda: None)
    calls = {}
    for rank in (0, 1):
        consumed, asked = ForwardStep(), calls.setdefault(rank, [])
        monkeypatch.setattr(consumed.losses, "totals", lambda n, asked=asked: asked.append(n) or [(2.0, 1.0, 1)] * n)
        progress = Progress(metadata, tmp_path, terminal, 0.0, rank, consumed)
        monkeypatch.setattr(progress, "_write", lambda state, **values: None)
        monkeypatch.setattr(progress, "_start_interval", lambda state: None)
        train_state, data = SimpleNamespace(step=4), SimpleNamespace(weighted=False)
        state = SimpleNamespace(train_state=train_state, cfg=SimpleNamespace(dataset=data))
        if rank == 0:
            progress.validation, progress.test = [(4, 2.0)], 2.0
        progress.on_eval_end(SimpleNamespace(state=state, total_loss_dict=None))
        progress.on_test_end(SimpleNamespace(state=state, total_loss_dict=None))
    assert calls[0] == calls[1] == [2, 2]
