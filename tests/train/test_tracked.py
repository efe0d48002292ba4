"""The record of a run that was killed and is started again: what the run left alone would have."""

import json
from types import SimpleNamespace

import pytest

from nemotron_sft.config import Tracking
from nemotron_sft.record import lineage
from nemotron_sft.train import tracked

LOSSES = {4: 2.5, 8: 2.0, 12: 1.5}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that opens the record of a run, as at its start."""
    monkeypatch.setattr(lineage, "of_data", lambda path, metadata: {"artifact": "data", "digest": "d"})
    monkeypatch.setattr(lineage, "of_model", lambda *_: None)
    monkeypatch.setattr(tracked, "asdict", lambda model: {})
    tracking = Tracking("disabled", "p", None, None, None, [], None, 20.0, 1.0, True)
    config = SimpleNamespace(model=SimpleNamespace(name="m"), tracking=tracking, init_from="random", seed=1)
    monkeypatch.setattr(lineage, "plain", dict)
    monkeypatch.setattr(tracked, "sample_tag", lambda metadata: [])
    return lambda: tracked.Training(config, {}, {}, tmp_path, tmp_path, 0, None)


def save(run_dir, step):
    """A whole checkpoint of Bridge, and the path of its callback."""
    path = run_dir / "checkpoints" / f"iter_{step:07}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    (path / "run_config.yaml").write_text("model:\n  x: 1\nvalidation:\n  x: 1\n")
    checkpoint = SimpleNamespace(save=str(path.parent))
    return SimpleNamespace(state=SimpleNamespace(cfg=SimpleNamespace(checkpoint=checkpoint)))


def validate(record, run_dir, step):
    """As Progress: a line of metrics.jsonl, then the record is told."""
    line = {"step": step, "validation_loss": LOSSES[step]}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    record.log(**line)


def outputs(run_dir):
    found = lineage.read(run_dir)["outputs"]
    return [(output["aliases"], output["metadata"]["validation_loss"], output["digest"]) for output in found]


def straight(start, run_dir):
    """Three checkpoints; the last validation comes after the last save, as in Bridge."""
    with start() as record:
        for step in (4, 8):
            validate(record, run_dir, step)
            record.on_checkpoint_save(save(run_dir, step))
        record.on_checkpoint_save(save(run_dir, 12))
        validate(record, run_dir, 12)
    return outputs(run_dir)


def test_the_best_checkpoint_is_known_after_a_kill_behind_the_last_save(start, tmp_path):
    wanted = straight(start, tmp_path)
    assert [aliases for aliases, *_ in wanted] == [["iter-4"], ["iter-8"], ["best", "latest", "iter-12"]]
    record = lineage.read(tmp_path)
    for output in record["outputs"]:  # killed before the record had the last validation
        output["aliases"] = ["latest"] if output["metadata"]["step"] == 12 else []
    record["outputs"][-1]["metadata"]["validation_loss"] = None
    lineage.write(tmp_path, record)
    with start():
        pass  # Progress has the validation already, and does not tell it again
    assert outputs(tmp_path) == wanted


@pytest.mark.parametrize("known", [[], [4], [8], [4, 12]])
def test_checkpoints_that_were_saved_and_not_recorded_are_recorded(known, start, tmp_path):
    wanted = straight(start, tmp_path)
    record = lineage.read(tmp_path)
    record["outputs"] = [output for output in record["outputs"] if output["metadata"]["step"] in known]
    lineage.write(tmp_path, record)
    with start():
        pass
    assert outputs(tmp_path) == wanted


def test_what_will_be_trained_again_is_not_on_record(start, tmp_path):
    """The newest checkpoint is not whole: neither it nor its validation counts, until there is another."""
    wanted = straight(start, tmp_path)
    (tmp_path / "checkpoints/iter_0000012/run_config.yaml").unlink()
    with start():
        pass
    assert [(aliases, loss) for aliases, loss, _ in outputs(tmp_path)] == [
        (["iter-4"], LOSSES[4]),
        (["best", "latest", "iter-8"], LOSSES[8]),
    ]
    assert [digest for *_, digest in outputs(tmp_path)] == [digest for *_, digest in wanted[:2]]
