"""EleutherAI's lm-eval on an export, and the difference to another model: what recipes/evaluate.py does.

    evaluation-TASKS.json in the run directory:
    {"format": "nemotron-sft-evaluation", "version": 1, "made": UTC time, "model", "against": path or null, "limit",
     "chat", "thinking", "max_new_tokens": number or null, "seconds", "packages": {name: version},
     "scores": [{"task", "metric", "samples", "score", "error", "before", "before_error", "difference",
                 "difference_error"}]}

`before` and what follows it are null without --against. A short entry is added to "evaluations" of lineage.json.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_sft.config import Tracking
from nemotron_sft.console import say
from nemotron_sft.errors import UserError, first_line
from nemotron_sft.files import write_json
from nemotron_sft.paths import ROOT
from nemotron_sft.record import lineage
from nemotron_sft.record.wandb import Tracker
from nemotron_sft.train.checkpoints import is_hf, newest_iteration
from nemotron_sft.train.comparison import Compared, Score, cells, compare, print_scores, scores_of
from nemotron_sft.train.compat.transformers import exact_scan
from nemotron_sft.train.prompts import after_reasoning
from nemotron_sft.train.tasks import known, name_of, prompts_of, task_of

FORMAT, VERSION = "nemotron-sft-evaluation", 1


@dataclass(frozen=True)
class Settings:
    """How the tasks are asked.

    limit: only the first so many samples of each; chat: lm-eval's own tasks in the chat template; thinking: the model
    is to reason, and what follows its reasoning is scored; max_new_tokens: of an answer, None leaves it to the task.
    """

    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int
    chat: bool
    thinking: bool = False
    max_new_tokens: int | None = None


def evaluate(model: Path, against: str | None, settings: Settings) -> None:
    """Run the tasks on a run or a Hugging Face directory, print a table, and keep the scores beside the run.

    against: another of these, or a hub id. Raises UserError, before anything is computed where that can be known.
    """
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("lm-eval is not installed: install the extra `eval` (docs/evaluation.md)")
    started = time.time()
    theirs = [task for task in settings.tasks if not prompts_of(task)]
    if settings.thinking and theirs and not settings.chat:
        raise UserError(
            f"--thinking: {theirs[0]} is asked without the chat template, which opens reasoning: add --chat"
        )
    if not model.is_dir():
        raise UserError(f"{model}: no such directory")
    home = run_of(model) or model
    if not os.access(home, os.W_OK):
        raise UserError(f"{home} cannot be written to, and the scores belong there")
    # Before PyTorch is loaded: idle threads sleep instead of spinning, which a busy machine's other processes feel.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    manager = known(settings.tasks)
    before = _directory(Path(against)) if against and Path(against).exists() else against
    after = _directory(model)
    base = _scores(before, settings, manager, template=after) if before else []
    scores = compare(_scores(after, settings, manager), base)
    print_scores(scores, str(after), str(before) if before else None)
    about = {
        "format": FORMAT, "version": VERSION, "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": str(after), "against": str(before) if before else None, "limit": settings.limit,
        "chat": settings.chat, "thinking": settings.thinking, "max_new_tokens": settings.max_new_tokens,
        "seconds": round(time.time() - started, 1),
        "packages": lineage.packages() | {"lm-eval": version("lm-eval")},
        "scores": [asdict(score) for score in scores],
    }  # fmt: skip
    file = home / file_name(settings.tasks)
    write_json(file, about)
    record(home, file.name, about, scores)
    print(f"Wrote {file}")


def file_name(tasks: tuple[str, ...]) -> str:
    """The name of the file for these tasks."""
    short = "+".join(re.sub(r"[^\w.-]", "_", name_of(task)) for task in tasks)
    return f"evaluation-{short[:200]}.json"


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or whose export it is."""
    places = (path, path.resolve().parent)
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def _directory(path: Path) -> Path:
    """The Hugging Face directory of a model; that of a run is exported if its newest checkpoint is not yet."""
    if is_hf(str(path)):
        return path
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a run directory nor a Hugging Face directory (no config.json in it)")
    newest, hf = newest_iteration(path / "checkpoints"), path / "hf"
    try:
        exported = Path(json.loads((hf / "export.json").read_text())["checkpoint"]).name
    except (OSError, ValueError, LookupError):
        exported = None
    if exported is None or (newest and exported != newest.name):
        # In a process of its own: Megatron makes PyTorch believe in a GPU where there is none.
        command = [sys.executable, str(ROOT / "recipes" / "export.py"), str(path)]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"{path} cannot be exported: {reason.removeprefix('error: ')}")
    return hf


# --- models ------------------------------------------------------------------------------------------------


def _scores(source: Path | str, settings: Settings, manager: Any, template: Path | None = None) -> list[Score]:
    """The scores of one model. template: of the model whose chat template it gets if it has none."""
    from lm_eval import simple_evaluate

    model = _loaded(source, settings, template)
    longest = settings.max_new_tokens
    found = []
    for task in settings.tasks:
        asked: Any = task
        if path := prompts_of(task):
            asked = task_of(name_of(task), path, model.tokenizer, _ends(model), settings.thinking, longest)
        model.add_bos_token = False if path else None  # the chat template has put there what belongs there
        model.tok_decode = decoder(model.tokenizer, path is not None, settings.thinking)
        try:
            results = simple_evaluate(
                model, tasks=[asked], limit=settings.limit, task_manager=manager,
                apply_chat_template=settings.chat and not path, log_samples=True,
                gen_kwargs={"max_gen_toks": longest} if longest and not path else None,
            )  # fmt: skip
        except (OSError, ImportError) as error:  # no network, or a package that this task wants
            raise UserError(f"task {task} cannot be run: {first_line(error)}") from None
        except ValueError as error:
            if not settings.thinking or "enable_thinking" not in str(error):
                raise
            raise UserError(f"--thinking: {task} has the model choose among given answers, without reasoning") from None
        found += list(scores_of(results))
    del model
    gc.collect()
    _empty_cache()
    return found


def _loaded(source: Path | str, settings: Settings, template: Path | None) -> Any:
    """lm-eval's model of a Hugging Face directory or hub id. Raises UserError where it cannot be loaded."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"device_map": "auto"} if torch.cuda.is_available() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.chat_template is None and template:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(template).chat_template
        chats = settings.chat or any(map(prompts_of, settings.tasks))
        if chats and not isinstance(tokenizer.chat_template, str):
            raise UserError(f"{source} has no chat template, or several")
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **place).eval()
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source} cannot be loaded by transformers: {first_line(error)}") from None
    model.register_forward_pre_hook(_scan_exactly, with_kwargs=True)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size,
                   chat_template_args={"enable_thinking": settings.thinking})  # fmt: skip
    wrapped.enable_thinking = settings.thinking  # it refuses likelihoods then
    if (settings.max_new_tokens or 0) >= wrapped.max_length:
        raise UserError(f"--max-new-tokens: {source} takes {wrapped.max_length} tokens, the question included")
    return wrapped


def _ends(model: Any) -> list[str]:
    """The tokens that end an answer: all of the model's own, and the tokenizer's."""
    ids = model.model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ends = [model.tokenizer.decode([token]) for token in ids if token is not None]
    return list(dict.fromkeys([*ends, model.tokenizer.eos_token]))


def decoder(tokenizer: Any, whole: bool, thinking: bool) -> Any:
    """What makes text of a model's new tokens, or of one special token, for lm-eval.

    whole: special tokens stay, since a tool call's tags may be such; thinking: only what follows the reasoning.
    """

    def decode(tokens: Any, skip_special_tokens: bool = True) -> str:
        if thinking and not isinstance(tokens, int):
            text = after_reasoning(tokenizer.decode(tokens, skip_special_tokens=False))
            tokens = tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens and not whole)

    return decode


def _scan_exactly(model: Any, arguments: tuple, named: dict) -> None:
    tokens = named.get("input_ids", arguments[0] if arguments else None)
    if tokens is not None and tokens.shape[1] > 1:
        exact_scan(model, tokens.shape[1])


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- records -----------------------------------------------------------------------------------------------


def record(home: Path, file: str, about: dict, scores: list[Compared]) -> None:
    """A small entry in the run's lineage.json, if it has one, and a W&B run of its own if the run had one.

    An earlier entry of the same tasks is replaced.
    """
    if lineage.read(home) is None:
        return
    entry = {"file": file} | {key: about[key] for key in ("made", "model", "against", "limit")}
    entry["scores"] = {f"{row.task}/{row.metric}": row.score for row in scores}
    entry["tracking"] = _track(home, about, scores)
    found = lineage.read(home) or {}  # again: W&B takes a while, and the run may still be going on
    kept = [other for other in found.get("evaluations", []) if other["file"] != file]
    lineage.write(home, found | {"evaluations": [*kept, entry]})


def _track(home: Path, about: dict, scores: list[Compared]) -> dict | None:
    """A W&B run with the scores, whose input is the model that was evaluated; tracked as the training run was."""
    settings = OmegaConf.to_container(OmegaConf.load(home / "config.yaml"), resolve=True).get("tracking")
    if not settings or settings.get("mode") == "disabled":
        return None
    cfg = replace(Tracking(**settings), name=f"{settings['name'] or home.name}-evaluation")
    model = about["model"]
    newest = newest_iteration(home / "checkpoints")
    source = newest if newest and Path(model) == home / "hf" else Path(model)
    values = {key: about[key] for key in ("model", "against", "limit", "chat", "thinking")}
    inputs = [lineage.of_model(str(source), source, None, 0, cfg.digests)]
    made = lineage.record("evaluate", values, inputs, [])
    tracker = Tracker(cfg, made, home, [], say)
    tracker.start()
    tracker.inputs()
    tracker.log({f"evaluation/{row.task}/{row.metric}": row.score for row in scores}, 0)
    columns, rows = cells(scores, about["against"] is not None)
    tracker.table("evaluation", columns, rows, 0)
    tracker.close(0)
    return made["tracking"]
