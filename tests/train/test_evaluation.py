"""Answering prompts in a run: it does not disturb training, and it comes back after a kill."""

import json

import pytest
from conftest import ROOT, SMALL, losses, recipe

HYBRID = [
    "model=tiny",
    "tracking=disabled",
    "train.train_iters=4",
    "validation.eval_interval=4",
    "checkpoint.save_interval=2",
]


@pytest.fixture(scope="module")
def few_prompts(tmp_path_factory):
    lines = (ROOT / "data/tiny/heldout.jsonl").read_text().splitlines()
    file = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    file.write_text("\n".join(lines[::20]))
    return file


@pytest.mark.slow
def test_losses_with_and_without_prompts_are_equal(tmp_path, tiny_data, few_prompts):
    asked, silent = tmp_path / "asked", tmp_path / "silent"
    for directory, settings in (
        (asked, [f"heldout.path={few_prompts}", "heldout.interval=2", "heldout.temperature=1", "heldout.batch_size=3"]),
        (silent, ["heldout.path=null"]),
    ):
        done = recipe("train", f"data={tiny_data}", f"run_dir={directory}", *HYBRID, *settings)
        assert done.returncode == 0, done.stderr
    assert len(losses(asked)) == 4 and losses(asked) == pytest.approx(losses(silent), rel=1e-6)
    assert sorted(losses(asked, "score/few")) == [0, 2, 4]
    saved = json.loads((asked / "heldout.json").read_text())
    assert [entry["step"] for entry in saved["asked"]] == [0, 4] and len(saved["prompts"]) == 8


def test_a_bad_prompt_file_ends_the_command_before_there_is_a_run(tmp_path, tiny_data):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "q"}], "answer": "a", "score": "best"}')
    done = recipe("train", f"data={tiny_data}", f"run_dir={tmp_path / 'run'}", *SMALL, f"heldout.path={file}")
    assert done.returncode == 2 and f"{file}:1: unknown scorer" in done.stderr
    assert not (tmp_path / "run").exists()
