"""What a record says about training: which answers count, and what its template is told.

Obeyed or refused, never ignored. On a message: `weight` (OpenAI), `train`, `training`, `trainable` (Axolotl and
others) and `loss` (ms-swift), each true or false, or 1 or 0. On a record: `train_turns`, one boolean per message,
by itself or inside `metadata` (NVIDIA's Nemotron datasets), `loss_mask` and `weights`, the same (LLaMA-Factory),
`train`, `training` and `trainable`, false where nothing of it is trained, `mask`, who is not trained (NeMo),
`chat_template_kwargs`, and `weight`, what its tokens count in the loss.
"""

from __future__ import annotations

from typing import Any

import orjson

from nemotron_sft.data.chat.messages import ChatError

TURNS = ("train_turns", "loss_mask", "weights")  # of a record, one boolean per message
WHOLE = ("train", "training", "trainable")  # of a record
RECORD_KEYS = ("chat_template_kwargs", "metadata", *TURNS, *WHOLE, "mask")  # what `per_record` reads
_RECORD_KEYS = frozenset(RECORD_KEYS)
_NOT_TRAINED = ("user", "human", "system", "none", "")  # what NeMo's mask may name
MESSAGE_FLAGS = ("weight", "train", "training", "trainable", "loss")
MOST_WEIGHT = 1_000_000  # of a record
UNREADABLE_FLAGS = (
    "train_detail",
    "training_detail",
    "loss_scale",
    "loss_mask",
    "loss_weight",
    "masked",
    "mask",
    "ignore",
    "no_train",
    "is_masked",
    "exclude",
    "learn",
)
_FLAGS = frozenset((*MESSAGE_FLAGS, *UNREADABLE_FLAGS))


def per_record(record: dict) -> dict[str, Any]:
    """What a record says beside its messages and tools, as arguments for Template.training_sequences.

    Raises ChatError for what cannot be read, also where it is JSON text that is broken.
    """
    if _RECORD_KEYS.isdisjoint(record):
        return {}
    found = {}
    if kwargs := _object(record.get("chat_template_kwargs"), "chat_template_kwargs"):
        found["chat_template_kwargs"] = kwargs
    for key in WHOLE:
        if record.get(key) in (False, 0):
            hint = f'"filter": {{"{key}": true}} in the blend leaves such records out'
            raise ChatError("no trained answer", f"{key} of the record is false: {hint}")
    turns = _same([_booleans(record[key]) for key in TURNS if record.get(key) is not None])
    if (mask := record.get("mask")) and not (isinstance(mask, str) and mask.lower() in _NOT_TRAINED):
        raise ChatError("bad training flag", f"mask is {str(mask)[:40]!r}: only who is never trained can be masked")
    metadata = record.get("metadata")
    if (
        turns is None and isinstance(metadata, (dict, str)) and "train_turns" in metadata
    ):  # of an object, or of its JSON text
        turns = _booleans(_object(metadata, "metadata").get("train_turns"))
    if turns is not None:
        found["train_turns"] = turns
    return found


def _booleans(turns: Any) -> Any:
    """A list, which may be JSON text; any other value as it is."""
    if isinstance(turns, str):
        try:
            return orjson.loads(turns)
        except orjson.JSONDecodeError:
            return turns
    return turns


def _same(found: list) -> Any:
    """The one that is there, None if there is none. Raises ChatError if they differ."""
    if any(other != found[0] for other in found):
        raise ChatError("bad training flag", f"{' and '.join(TURNS)} differ")
    return found[0] if found else None


def record_weight(record: dict, name: str) -> float:
    """What a record's tokens count in the loss: its field `name`, 1 where there is none. Raises ChatError."""
    value = record.get(name)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_WEIGHT:
        raise ChatError(
            "bad weight",
            f"{name} is {str(value)[:40]!r}, not a number from 0 to {MOST_WEIGHT:,}; if it is no weight in the loss, "
            "name another field with weight_field in the blend",
        )
    return float(value)


def trained_messages(messages: list[dict], train_turns: Any = None) -> list[bool]:
    """Per message, whether it may be trained: an answer, and nothing says otherwise. Raises ChatError."""
    if train_turns is None and max(map(len, messages), default=0) == 2:  # role and content alone, as nearly all
        return [message["role"] == "assistant" for message in messages]
    allowed = [True] * len(messages) if train_turns is None else _turns(train_turns, messages)
    return [
        allow and _allowed(message, index) and message["role"] == "assistant"
        for index, (message, allow) in enumerate(zip(messages, allowed, strict=True))
    ]


def _turns(turns: Any, messages: list[dict]) -> list[bool]:
    """metadata.train_turns, checked."""
    if not isinstance(turns, list) or not all(value in (0, 1) for value in turns):
        raise ChatError("bad training flag", f"{' or '.join(TURNS)} is not a list of booleans")
    if len(turns) != len(messages):
        raise ChatError("bad training flag", f"train_turns has {len(turns)} values for {len(messages)} messages")
    for index, (message, trained) in enumerate(zip(messages, turns, strict=True)):
        if trained and message["role"] != "assistant":
            raise ChatError("bad training flag", f"train_turns asks to train message {index}, a {message['role']}'s")
    return [bool(value) for value in turns]


def _allowed(message: dict, index: int) -> bool:
    """Whether no flag of a message says that it is not trained."""
    if _FLAGS.isdisjoint(message):  # nearly all
        return True
    for flag in UNREADABLE_FLAGS:
        if message.get(flag) is not None:
            raise ChatError("bad training flag", f"message {index}: {flag} is not supported; use weight 0 or 1")
    allowed = True
    for flag in MESSAGE_FLAGS:
        value = message.get(flag)
        if value is None:
            continue
        if isinstance(value, (dict, list, str)) or value not in (0, 1):
            raise ChatError("bad training flag", f"message {index}: {flag} is {value!r}, not 0 or 1")
        if value and flag != "weight" and message["role"] != "assistant":
            raise ChatError("bad training flag", f"message {index}: {flag} asks to train a {message['role']}'s message")
        allowed = allowed and bool(value)
    return allowed


def _object(value: Any, what: str) -> dict:
    """An object, given as such or as JSON text; null is empty."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ChatError(f"bad {what}", f"text that is not JSON: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ChatError(f"bad {what}", f"a {type(value).__name__} instead of an object")
    return value
