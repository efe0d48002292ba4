"""Answering prompts in a run: it does not disturb training, and it comes back after a kill."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SMALL, SMALL_HYBRID, losses, recipe, run

from nemotron_sft.data import packed
from nemotron_sft.data.opened import open_tokenizer
from nemotron_sft.record import lineage
from nemotron_sft.train import plan

HYBRID = [
    *SMALL_HYBRID,
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
    assert not (silent / "wandb").exists() and lineage.read(silent)["outputs"]  # tracking=disabled
    assert len(losses(asked)) == 4 and losses(asked) == losses(silent)
    assert losses(asked, "grad_norm") == losses(silent, "grad_norm")
    assert losses(asked, "validation_loss") == losses(silent, "validation_loss")
    assert sorted(losses(asked, "score/few")) == [0, 2, 4]
    saved = json.loads((asked / "heldout.json").read_text())
    assert [entry["step"] for entry in saved["asked"]] == [0, 4] and len(saved["prompts"]) == 8


@pytest.mark.slow
def test_a_kill_while_prompts_are_answered_is_resumed_from_the_checkpoint(tmp_path, tiny_data, few_prompts):
    """Killed when step 3 is logged, while its answers are generated; nothing is half-written, no step is lost."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "recipes/train.py", f"data={tiny_data}", f"run_dir={run_dir}", *HYBRID]
    command += [f"heldout.path={few_prompts}", "heldout.interval=3", "heldout.max_new_tokens=64"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while 3 not in losses(run_dir):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert 3 not in losses(run_dir, "score/few")  # it was in the middle of them
    for file in ("heldout.json", "lineage.json"):
        json.loads((run_dir / file).read_text())
    assert (run_dir / "report.html").read_text().rstrip().endswith("</html>")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(run_dir)) == [1, 2, 3, 4] and sorted(losses(run_dir, "score/few")) == [0, 3, 4]


def test_a_bad_prompt_file_ends_the_command_before_there_is_a_run(tmp_path, tiny_data):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "q"}], "answer": "a", "score": "best"}')
    done = recipe("train", f"data={tiny_data}", f"run_dir={tmp_path / 'run'}", *SMALL, f"heldout.path={file}")
    assert done.returncode == 2 and f"{file}:1: unknown scorer" in done.stderr
    assert not (tmp_path / "run").exists()


def test_preflight_tells_the_level_of_chance_and_refuses_prompts(tmp_path, tiny_data, few_prompts):
    pack, _, cu = packed.read_pack(tiny_data / "training.npy", 0)
    text = open_tokenizer(packed.read_metadata(tiny_data)).decode(pack[: cu[1]])
    seen = tmp_path / "seen.jsonl"
    message = {"role": "user", "content": re.search(r"user\n(.*?)<\|im_end", text, re.DOTALL)[1]}
    seen.write_text(json.dumps({"messages": [message], "answer": "x"}))
    done = recipe("train", f"data={tiny_data}", "preflight=true", f"heldout.path={{few: {few_prompts}, seen: {seen}}}")
    assert done.stdout.count("warning: ") == 1 and "1 of 1 seen prompt occurs" in done.stdout
    answers = [json.loads(line)["answer"] for line in few_prompts.read_text().splitlines()]
    level = max(map(answers.count, answers)) / len(answers)
    assert done.returncode == 0 and f"8 prompts; {level:.1%} are right by chance" in done.stdout, done.stderr
    found = re.search(r"trains pack (\d+), .*between « and »: trained\):\n(.*)", done.stdout, re.DOTALL)
    ids, mask, _ = packed.read_pack(tiny_data / "training.npy", int(found[1]))
    text = open_tokenizer(packed.read_metadata(tiny_data)).decode(ids[: plan.LOOK])
    assert re.sub("[«»\\s]", "", found[2]) == re.sub(r"\s", "", text)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[: plan.LOOK] != 0, [0]])) == 1)
    assert found[2].count("«") == len(edges)  # every trained stretch is marked once
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "?"}], "answer": "1", "score": "taste"}')
    done = recipe("train", f"data={tiny_data}", "preflight=true", f"heldout.path={bad}")
    assert done.returncode == 2 and f"{bad}:1: unknown scorer" in done.stderr and done.stderr.count("\n") == 1
