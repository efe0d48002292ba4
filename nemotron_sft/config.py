"""Typing and validation of the composed Hydra config. Defaults live in conf/ alone; schemas only type them.

A schema is a dataclass whose fields have no defaults. A section whose schema derives from `Bridge` also takes
every field of the Megatron-Bridge dataclass that it configures (see `bridge_fields`); those end up in its
`bridge` dict, unconverted, unless they are null: null leaves a field of Bridge's as the recipe sets it, and `none`
sets it to None.
"""

from __future__ import annotations

import difflib
import functools
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_sft.bridge_fields import bridge_fields, installed
from nemotron_sft.errors import UserError


def nearest(word: str, choices: list[str]) -> str | None:
    """The choice most like `word`: an abbreviation of it (`learning_rate` -> `lr`), or the closest spelling."""
    for choice in choices:
        if choice == "".join(part[:1] for part in word.split("_")):
            return choice
    folded = {choice.replace("_", "").lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.replace("_", "").lower(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def unknown_key(path: str, choices: list[str]) -> UserError:
    """The error for a key that does not exist, naming the nearest key beside it."""
    prefix, _, key = path.rpartition(".")
    best = nearest(key, choices)
    dotted = f"{prefix}.{best}" if prefix else best
    own = ", ".join(sorted(choices)) if len(choices) <= 30 else "see --cfg job and Megatron-Bridge's documentation"
    hint = f"did you mean {dotted}?" if best else f"known keys: {own}"
    return UserError(f"unknown key {path}: {hint}")


def check[T](cfg: DictConfig, schema: type[T]) -> T:
    """Validate a composed config against a dataclass schema and return it as an instance of the schema.

    Raises UserError for an unknown key (naming the nearest one), a value of the wrong type, or a missing value.
    """
    OmegaConf.resolve(cfg)
    plain: Any = OmegaConf.to_container(cfg, throw_on_missing=False)
    plain.pop("hydra", None)
    unchecked: list[str] = []
    _fold_bridge_keys(plain, schema, "", unchecked)
    if unchecked:
        _say_unchecked(tuple(unchecked))
    try:
        typed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
        return cast(T, typed)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from None


def _fold_bridge_keys(node: dict[str, Any], schema: type, path: str, unchecked: list[str]) -> None:
    """Check every key of `node` against `schema`, moving Megatron-Bridge's own keys into the `bridge` dict.

    Where Bridge is not installed its keys cannot be checked: their names are added to `unchecked`.
    """
    hints = get_type_hints(schema)
    passes_on = issubclass(schema, Bridge)
    own = [f.name for f in fields(schema) if f.name != "bridge"]
    bridge: dict[str, Any] = {}
    for key in list(node):
        dotted = f"{path}{key}"
        if key in own:
            inner = _dataclass_in(hints[key])
            if inner and isinstance(node[key], dict):
                _fold_bridge_keys(node[key], inner, f"{dotted}.", unchecked)
            elif passes_on and is_none(node[key]) and type(None) in get_args(hints[key]):
                if key in bridge_fields(path.rstrip(".")):  # of a key of our own null says the same
                    bridge[key] = node[key]
                node[key] = None
            continue
        if not passes_on:
            raise unknown_key(dotted, own)
        known = bridge_fields(path.rstrip("."))
        if not installed():
            unchecked.append(dotted)
        elif key not in known:
            raise unknown_key(dotted, sorted({*own, *known}))
        value = node.pop(key)
        if value is not None:
            bridge[key] = value
    if passes_on:
        node["bridge"] = bridge


def is_none(value: Any) -> bool:
    """Whether a value is the word for None. null is another matter: it leaves a field as the recipe sets it."""
    return isinstance(value, str) and value.lower() == "none"


@functools.cache
def _say_unchecked(keys: tuple[str, ...]) -> None:
    """One line, once."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    print(
        f"Megatron-Bridge is not installed here: {', '.join(keys[:3])}{more} will be checked where the job runs",
        file=sys.stderr,
    )


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a field type such as `Train` or `Train | None`."""
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and is_dataclass(t)), None)


@dataclass
class Bridge:
    """Base of the sections whose remaining keys are fields of a Megatron-Bridge dataclass."""

    bridge: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tracking:
    """conf/tracking: Weights & Biases."""

    mode: str = MISSING  # wandb | offline | disabled
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    name: str | None = MISSING
    tags: list[str] = MISSING
    base_url: str | None = MISSING
    timeout: float = MISSING  # seconds
    upload_mb: float = MISSING
    digests: bool = MISSING


# --- recipes/prep.py ---------------------------------------------------------------------------------------


@dataclass
class Blend:
    """Which chat data, in what proportion (conf/blend)."""

    name: str | None = MISSING
    path: str | None = MISSING  # a blend file (JSON or YAML) to read `datasets` from
    datasets: list[Any] = MISSING  # entries: name, path, and as needed split, subset, revision, weight, filter
    mix: str = "passes"  # what weights are: passes over the data, or proportions


@dataclass
class Tokenizer:
    """conf/tokenizer"""

    model: str = MISSING  # a directory with tokenizer.json, the file itself, or a hub id


@dataclass
class Template:
    """conf/template: the options of chat.load_template."""

    name: str = MISSING
    mask: str = MISSING
    history: str = MISSING
    train_generation_prompt: bool = MISSING
    empty_answers: str = MISSING
    thinking: bool | None = MISSING
    kwargs: dict[str, Any] | None = MISSING
    special_tokens: dict[str, str] | None = MISSING
    reasoning_field: str | None = MISSING


@dataclass
class Split:
    """Shares of the conversations; they sum to 1."""

    training: float = MISSING
    validation: float = MISSING
    test: float = MISSING


@dataclass
class Prep:
    """The composed config of recipes/prep.py (conf/prep.yaml)."""

    blend: Blend = MISSING
    tokenizer: Tokenizer = MISSING
    template: Template = MISSING
    pack_size: int = MISSING  # tokens
    over_long: str = MISSING  # truncate | drop
    split: Split = MISSING
    messages_field: str = MISSING
    tools_field: str = MISSING
    max_drop_ratio: float = MISSING
    dedup: bool = MISSING
    decontaminate: list[str] = MISSING  # files of evaluation sets
    sample: int | None = MISSING  # records per dataset
    seed: int = MISSING
    format: str = MISSING  # npy | parquet
    keep_spool: bool = MISSING  # of tokens, for another pack_size
    output_dir: str | None = MISSING
    workers: int | None = MISSING
    shards: int = MISSING
    shard: int | None = MISSING
    cluster: dict[str, Any] = MISSING  # conf/cluster, see cluster.Slurm
    force: bool = MISSING
    tracking: Tracking = MISSING


# --- recipes/train.py --------------------------------------------------------------------------------------


@dataclass
class Model(Bridge):
    """conf/model: a Bridge recipe or provider, and what differs from it."""

    name: str = MISSING
    recipe: str | None = MISSING  # function in megatron.bridge.recipes that returns a ConfigContainer
    provider: str | None = MISSING  # model provider class, for a model without a recipe
    hf: str | None = MISSING  # Hugging Face directory or hub id with the architecture


@dataclass
class Data:
    """conf/data: which prep output to train on."""

    path: str = MISSING  # its directory, or "latest"
    verify: str = MISSING  # sizes | full
    other_tokenizer: bool = MISSING  # than the model's


@dataclass
class Train(Bridge):
    train_iters: int | None = MISSING
    epochs: float | None = MISSING
    global_batch_size: int | None = MISSING  # packs
    packs_per_microbatch: int | None = MISSING
    loss_per: str = MISSING  # token | sequence


@dataclass
class Validation(Bridge):
    eval_interval: int | None = MISSING
    eval_iters: int | None = MISSING


@dataclass
class Optimizer(Bridge):
    lr: float | None = MISSING
    min_lr: float | None = MISSING
    weight_decay: float | None = MISSING
    adam_beta1: float | None = MISSING
    adam_beta2: float | None = MISSING
    clip_grad: float | None = MISSING


@dataclass
class Scheduler(Bridge):
    lr_decay_style: str | None = MISSING
    lr_warmup_iters: int | None = MISSING


@dataclass
class Checkpoint(Bridge):
    load: str | None = MISSING
    save_interval: int | None = MISSING


@dataclass
class Ddp(Bridge):
    pass


@dataclass
class Logger(Bridge):
    log_interval: int | None = MISSING


@dataclass
class Dist(Bridge):
    pass


@dataclass
class Rng(Bridge):
    pass


@dataclass
class MixedPrecision(Bridge):
    pass


@dataclass
class CommOverlap(Bridge):
    pass


@dataclass
class Peft(Bridge):
    """conf/peft: what is trained instead of all parameters."""

    scheme: str | None = MISSING  # null | lora


@dataclass
class Gpu:
    """The GPUs that a preflight plans for."""

    memory: float = MISSING  # GiB
    tflops: float = MISSING  # dense bf16 peak


@dataclass
class Export:
    hf: bool = MISSING  # after training
    path: str | None = MISSING


@dataclass
class Heldout:
    """Prompts with checkable answers; see docs/evaluation.md."""

    path: Any = MISSING  # a file, or {name: file}
    interval: int | None = MISSING  # steps
    samples: int = MISSING
    max_new_tokens: int = MISSING
    batch_size: int = MISSING
    thinking: bool = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    seed: int = MISSING


@dataclass
class TrainConfig:
    """The composed config of recipes/train.py (conf/train.yaml)."""

    name: str = MISSING
    model: Model = MISSING
    data: Data = MISSING
    init_from: str = MISSING
    run_dir: str | None = MISSING
    output_dir: str = MISSING
    seed: int = MISSING
    precision: str | None = MISSING  # bf16 | fp8
    profile: bool = MISSING
    preflight: bool = MISSING
    world_size: int | None = MISSING  # processes that a preflight plans for
    gpu: Gpu = MISSING
    train: Train = MISSING
    validation: Validation = MISSING
    optimizer: Optimizer = MISSING
    scheduler: Scheduler = MISSING
    checkpoint: Checkpoint = MISSING
    peft: Peft = MISSING
    ddp: Ddp = MISSING
    logger: Logger = MISSING
    dist: Dist = MISSING
    rng: Rng = MISSING
    mixed_precision: MixedPrecision = MISSING
    comm_overlap: CommOverlap = MISSING
    heldout: Heldout = MISSING
    export: Export = MISSING
    tracking: Tracking = MISSING
    cluster: dict[str, Any] = MISSING  # conf/cluster, see cluster.Slurm
