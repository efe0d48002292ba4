"""What stands beside the weights of an export: tokenizer, chat template, and where generation stops.

All three are those of the training data, whatever the base model came with: a server that asks in another format than
the trained one, or waits for another end of turn, gets nonsense or no end. Reinforcement learning starts from the same
files (docs/rl.md).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_sft.data.opened import open_template, open_tokenizer
from nemotron_sft.data.packed import open_packs
from nemotron_sft.data.tokens import Tokenizer
from nemotron_sft.errors import UserError
from nemotron_sft.files import write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
PACKS_READ = 64  # packs in which ends of answers are looked for
FREQUENT = 0.02  # share of the answers that must end with a token for it to count


def write(directory: Path, metadata: dict, data_dir: Path, base: Path | None) -> list[str]:
    """Write tokenizer, chat_template.jinja and generation_config.json of the data into `directory`.

    base: the directory of the model that training started from, whose sampling settings are kept, or None.
    Returns a line for every thing in which the base differed. Raises UserError if the data's tokenizer or template
    are gone or have changed.
    """
    tokenizer, template = open_tokenizer(metadata), open_template(metadata)
    ends = turn_ends(data_dir, tokenizer)
    told = [
        _write_generation(directory, base, tokenizer, ends),
        _write_tokenizer(directory, tokenizer, ends, settable="eos_token" not in template.source),
    ]
    (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    theirs = base_template(base)
    if theirs is not None and theirs.strip() != template.source.strip():
        told.append(f"chat template: the data's ({template.name}), not the base model's")
    return [line for line in told if line]


def turn_ends(data_dir: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that trained answers end with, most frequent first; the tokenizer's eos where there is none.

    An answer's end is its last token that is not white space (many templates train a line break after it). Only added
    tokens count: a truncated answer ends in the middle of a word.
    """
    special = {int(token) for token in tokenizer.added_ids}
    blank: dict[int, bool] = {}
    found: Counter[int] = Counter()
    for answer in _answers(data_dir):
        for token in reversed(answer.tolist()):
            if token not in blank:
                blank[token] = not tokenizer.decode([token]).strip()
            if not blank[token]:
                found[token] += 1
                break
    enough = FREQUENT * found.total()
    return [token for token, count in found.most_common() if token in special and count >= enough] or [tokenizer.eos_id]


def _answers(data_dir: Path) -> Iterator[Any]:
    """Token ids of trained spans, from the first packs."""
    with suppress(UserError, OSError):
        for pack in open_packs(data_dir / "training.npy")[:PACKS_READ]:
            for start, end in pairwise(pack["cu_seqlens"]):
                edges = np.flatnonzero(np.diff(pack["loss_mask"][start:end].astype(np.int8), prepend=0, append=0))
                for first, last in edges.reshape(-1, 2):
                    yield pack["input_ids"][start + first : start + last]


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, ends: list[int], settable: bool) -> str | None:
    """Copy the data's tokenizer; its eos_token becomes the end of turn, unless the template prints eos_token.

    Returns a line if answers then end with something else than eos_token, where NeMo-RL and verl stop.
    """
    folder = tokenizer.file.parent
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)
    shutil.copyfile(tokenizer.file, directory / "tokenizer.json")
    settings = read_json(directory / "tokenizer_config.json")
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    for role, token in tokenizer.special_tokens.items():
        settings.setdefault(role, token)
    if settable:
        settings["eos_token"] = tokenizer.decode([ends[0]])
    settings.setdefault("pad_token", tokenizer.decode([tokenizer.pad_id]))
    settings.pop("chat_template", None)  # the file beside it is the only one
    write_json(directory / "tokenizer_config.json", settings)
    named = read_json(directory / "special_tokens_map.json")
    if "eos_token" in named:
        write_json(directory / "special_tokens_map.json", named | {"eos_token": settings["eos_token"]})
    if settable or tokenizer.eos_id in ends:
        return None
    return (
        f"the template prints eos_token, which therefore stays {tokenizer.decode([tokenizer.eos_id])}: what does not "
        f"read generation_config.json must be told to stop at {ends} (NeMo-RL: policy.generation.stop_token_ids)"
    )


def _write_generation(directory: Path, base: Path | None, tokenizer: Tokenizer, ends: list[int]) -> str | None:
    """generation_config.json: the base's sampling, the data's ends, which config.json has too.

    Returns a line if the base's ends were others.
    """
    settings = read_json(base / "generation_config.json") if base else {}
    theirs = settings.get("eos_token_id", read_json(base / "config.json").get("eos_token_id") if base else None)
    settings.pop("_from_model_config", None)  # transformers would take eos from config.json again
    ids = {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad_id}
    write_json(directory / "generation_config.json", settings | ids)
    write_json(directory / "config.json", read_json(directory / "config.json") | ids)
    listed = theirs if isinstance(theirs, list) else [theirs]
    if base is None or set(listed) == set(ends):
        return None

    def named(ids: list) -> str:
        return ", ".join(f"{tokenizer.decode([i])} ({i})" if isinstance(i, int) else "none" for i in ids)

    return f"answers end with {named(ends)}, as trained; the base model's eos was {named(listed)}"


def base_template(base: Path | None) -> str | None:
    """The chat template of a model's directory, None without one."""
    if base is None:
        return None
    with suppress(OSError):
        return (base / "chat_template.jinja").read_text(encoding="utf-8")
    found = read_json(base / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    return found if isinstance(found, dict) else {}
