"""recipes/evaluate.py: lm-eval on an export answers as the run itself did; differences and their errors; bad input."""

import json
import math
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL_HYBRID, recipe

from nemotron_sft.config import Heldout
from nemotron_sft.data.opened import open_template, open_tokenizer
from nemotron_sft.data.packed import read_metadata
from nemotron_sft.errors import UserError
from nemotron_sft.record import lineage
from nemotron_sft.train import comparison, harness, tasks
from nemotron_sft.train.comparison import Score
from nemotron_sft.train.prompts import load_prompts, read_prompts

NEEDED = "needs the extra `eval` (make setup EXTRAS=dev,eval)"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_data):
    """A run whose answers became the prompts of an evaluation, every second with another answer than the run's."""
    pytest.importorskip("lm_eval", reason=NEEDED)
    root = tmp_path_factory.mktemp("harness")
    run, own = root / "run", root / "own.jsonl"
    records = [json.loads(line) for line in (ROOT / "data/tiny/heldout.jsonl").read_text().splitlines()[::20]]
    asked = root / "asked.jsonl"
    asked.write_text("\n".join(json.dumps(record) for record in records))
    prompts = [f"heldout.path={asked}", "heldout.batch_size=7"]
    short = ["train.train_iters=2", "validation.eval_interval=2", "train.global_batch_size=2"]
    short += ["optimizer.lr=1e-5", "optimizer.min_lr=0"]  # a random model has more to say than a poor one
    done = recipe("train", f"data={tiny_data}", f"run_dir={run}", *SMALL_HYBRID, *short, *prompts)
    assert done.returncode == 0, done.stderr
    answers = json.loads((run / "heldout.json").read_text())["asked"][-1]["answers"]
    assert len(set(answers)) > 2, "a model that says one thing tells nothing"
    expected = [answer if i % 2 else "something else" for i, answer in enumerate(answers)]
    lines = [record | {"answer": answer, "score": "contains"} for record, answer in zip(records, expected, strict=True)]
    own.write_text("\n".join(map(json.dumps, lines)))
    return run, own, len(lines)


def random_base(run, directory):
    """A model like the run's with other weights, and without a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "hf")).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_transformers_answers_as_the_run_did_and_the_scores_are_on_record(evaluated, tmp_path):
    run, own, count = evaluated
    first = recipe("evaluate", run, "--tasks", own, "--limit", 2)
    assert first.returncode == 0, first.stderr
    base = random_base(run, tmp_path / "base")
    done = recipe("evaluate", run / "hf", "--tasks", own, "--against", base)
    assert done.returncode == 0 and "difference" in done.stdout, done.stderr

    about = json.loads((run / "evaluation-own.json").read_text())
    (score,) = about["scores"]
    assert (score["samples"], score["score"], score["before"]) == (count, 0.5, 0)  # the run's answers, and only those
    assert score["difference"] == 0.5
    assert score["difference_error"] == pytest.approx(math.sqrt(0.25 * count / (count - 1) / count))
    (entry,) = lineage.read(run)["evaluations"]  # the second replaced the first
    assert entry["scores"] == {"own/acc": 0.5} and entry["against"] == str(base)
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 3  # of the training, and of two evaluations
    assert entry["tracking"]["mode"] == "offline"


def test_errors_of_differences_are_those_of_pairs_where_there_are_pairs():
    after = Score("t", "acc", 4, 0.75, 0.25, {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0})
    before = Score("t", "acc", 4, 0.25, 0.25, {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0})
    (row,) = comparison.compare([after], [before])
    assert row.difference == 0.5 and row.difference_error == pytest.approx(math.sqrt(1 / 3 / 4))
    other = Score("t", "acc", 2, 0.25, 0.25, {7: 0.0, 8: 0.5})
    (row,) = comparison.compare([after], [other])
    assert row.difference_error == pytest.approx(math.hypot(0.25, 0.25))
    (row,) = comparison.compare([after], [Score("t", "f1", 4, 0.1, 0.1, {})])
    assert row.before is None and row.difference is None
    assert comparison.cells([row], against=True)[1] == [["t", "acc", "4", "-", "0.7500 ± 0.2500", "-"]]


def test_every_metric_of_a_result_is_read():
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.5, "em,strict": 1.0, "em_stderr,strict": "N/A"},
            "g": {"acc,none": 0.5, "acc_stderr,none": 0.1},
        },
        "groups": {"g": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "samples": {"a": [
            {"doc_id": 0, "filter": "none", "acc": 1.0}, {"doc_id": 1, "filter": "none", "acc": 0.0},
            {"doc_id": 0, "filter": "strict", "em": 0.0},
        ]},
    }  # fmt: skip
    found = {(score.task, score.metric): score for score in comparison.scores_of(results)}
    assert found.keys() == {("a", "acc"), ("a", "em (strict)"), ("g", "acc")}
    assert found["a", "acc"].each == {0: 1.0, 1: 0.0} and found["a", "acc"].samples == 2
    assert found["a", "em (strict)"].error is None and not found["a", "em (strict)"].each  # no mean of its samples


@pytest.mark.parametrize(
    ("model", "names", "against", "words"),
    [
        ("nowhere", "tiny", None, "nowhere: no such directory"),
        ("empty", "tiny", None, "neither a run directory nor a Hugging Face directory"),
        ("empty", "missing.jsonl", None, "--tasks: missing.jsonl: No such file"),
        ("empty", "bad.jsonl", None, "bad.jsonl:1: unknown scorer"),
        ("empty", "tiny,a/tiny.jsonl", None, "two tasks are called tiny"),
        ("empty", "gsm8kk", None, "did you mean gsm8k?"),
        ("empty", "tiny,gsm8k", None, "--thinking: gsm8k is asked without the chat template"),
        ("hf", "tiny", None, "hf cannot be loaded by transformers"),
        ("empty", "tiny", "run", "cannot be exported: .*has no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, model, names, against, words):
    pytest.importorskip("lm_eval", reason=NEEDED)
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "hf", "run", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "run/config.yaml").write_text("data: {path: data}\ninit_from: random\nmodel: {hf: null}\n")
    (tmp_path / "bad.jsonl").write_text('{"messages": [], "answer": "1", "score": "taste"}\n')
    settings = harness.Settings(tuple(names.split(",")), None, 16, False, "--thinking" in words)
    with pytest.raises(UserError, match=words) as error:
        harness.evaluate(tmp_path.joinpath(model).relative_to(tmp_path), against, settings)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("evaluation-*"))


def test_wrong_numbers_and_no_tasks_are_refused_by_the_command(tmp_path):
    for arguments in (["--tasks", ","], ["--tasks", "tiny", "--limit", "0"], ["--tasks", "tiny", "--batch-size", "x"]):
        done = recipe("evaluate", tmp_path, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_are_asked_as_in_training(thinking, tiny_data):
    """The text that the export's template makes of a prompt is the one that the training template makes."""
    metadata = read_metadata(tiny_data)
    tokenizer = open_tokenizer(metadata)
    theirs = SimpleNamespace(special_tokens_map=tokenizer.special_tokens, chat_template=open_template(metadata).source)
    settings = Heldout(str(tasks.TINY), None, 3, 64, 128, thinking, 0, 1, 0)
    ids = load_prompts(settings, metadata).ids
    texts = tasks.rendered(theirs, read_prompts(tasks.TINY, "--tasks"), thinking)
    assert [tokenizer.decode(each) for each in ids] == texts


@pytest.mark.parametrize("whole", [False, True])
def test_what_follows_the_reasoning_is_scored(whole):
    """As in a run: of an answer whose reasoning has no end that is nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny/tokenizer")
    silent, thinking = (harness.decoder(tokenizer, whole, each) for each in (False, True))
    end = tokenizer.eos_token
    for text, after in (
        (f"6 x 7 is</think>42{end}", "42"),
        (f"so</think>\n\na</think>b{end}", "\n\na</think>b"),
        ("42", ""),
    ):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert thinking(tokens) == (after + end if whole and after else after)
        assert silent(tokens) == (text if whole else text.removesuffix(end))
    assert thinking(tokenizer.eos_token_id, skip_special_tokens=False) == end  # lm-eval asks what ends an answer
