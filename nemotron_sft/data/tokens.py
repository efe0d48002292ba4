"""Role-labelled text to token ids and a loss mask, in large batches.

    tokenizer = load_tokenizer("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    ids, mask, offsets = tokenize(tokenizer, sequences)

Spans are encoded one by one, so no merge crosses a span boundary: at inference the prompt is tokenized before
the answer exists. Special tokens written in the text are recognised and none are added.

Two encoders give the same ids: fastokens, and Hugging Face's tokenizers. The first is several times as fast
and is used where a check at start-up finds it equal on special tokens, whitespace, scripts, digits and code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import BrokenExecutor, Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike

from nemotron_sft.data import spaces
from nemotron_sft.data.probes import probes
from nemotron_sft.data.spaces import without_prefix
from nemotron_sft.errors import UserError

BACKENDS = ("auto", "fastokens", "tokenizers")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# The end of a turn or text where a bare tokenizer.json does not say which it is.
_USUAL_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer ready to encode. Plain data: pickles to worker processes, which open the files again.

    name: as given to load_tokenizer; revision: the hub's commit, None for local files.
    backend: "fastokens" or "tokenizers".
    vocab_size: the largest id + 1. special_tokens: {"eos_token": "<|im_end|>", ...}, for chat templates.
    digest: sha256 (hex) of the contents of tokenizer.json (not its layout) and the ids of eos and pad.
    space: where it puts a space before a text, "" for nowhere; see spaces.without_prefix.
    """

    name: str
    file: Path
    revision: str | None
    backend: str
    threads: int
    vocab_size: int
    eos_id: int
    pad_id: int
    special_tokens: dict[str, str] = field(repr=False)
    digest: str = field(repr=False)
    space: str = ""

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets): int32 (tokens,) of all texts in a row, and int64 (texts + 1,); text i is
        ids[offsets[i]:offsets[i + 1]]. `ids` may be read-only. Lone surrogates (from broken JSON escapes) are
        encoded as U+FFFD."""
        encode, encoder = (
            (_encode_flat, self._fast) if self.backend == "fastokens" else (_encode_reference, self._reference)
        )
        try:
            return encode(encoder, texts)
        except (UnicodeEncodeError, TypeError):  # fastokens raises the one, tokenizers the other
            return encode(encoder, list(map(_valid, texts)))

    def encode_spans(self, sequences: list[list[tuple[str, str]]]) -> tuple[np.ndarray, np.ndarray]:
        """encode_batch for the spans of sequences, by a tokenizer that puts a space before a text."""
        added = [token.content for token in self._names.get_added_tokens_decoder().values()]
        bare = spaces.opened(self.file, self.file.stat().st_mtime_ns)
        return spaces.encode_spans(
            [[(role, _valid(text)) for role, text in spans] for spans in sequences],
            self.space,
            added,
            partial(_encode_reference, self._reference),
            partial(_encode_reference, bare),
        )

    @cached_property
    def added_ids(self) -> np.ndarray:
        """Ids of the added tokens, special ones among them: int64 (n,)."""
        return np.array(list(self._names.get_added_tokens_decoder()), np.int64)

    def missing(self, tokens: list[str]) -> list[str]:
        """Those of the tokens that are not one token of this tokenizer, as special tokens have to be."""
        return [token for token in tokens if self._names.token_to_id(token) is None]

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template that came with the tokenizer: chat_template.jinja, or a key of tokenizer_config.json."""
        folder = self.file.parent
        with suppress(FileNotFoundError):
            return (folder / "chat_template.jinja").read_text(encoding="utf-8-sig")
        with suppress(FileNotFoundError):
            found = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
            if isinstance(found, list):  # several by name
                found = {each["name"]: each["template"] for each in found}.get("default")
            return found.removeprefix("\ufeff") if isinstance(found, str) else None
        return None

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids, special tokens included."""
        return self._names.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    @cached_property
    def _fast(self) -> Any:
        _limit_threads(self.threads)
        return _open_fastokens(self.file)

    @cached_property
    def _reference(self) -> Any:
        _limit_threads(self.threads)
        return _open_reference(self.file)

    @cached_property
    def _names(self) -> Any:
        return _open_content(self.file).names

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def load_tokenizer(
    model: str,
    *,
    revision: str | None = None,
    backend: str = "auto",
    threads: int = 1,
) -> Tokenizer:
    """The tokenizer of a directory, a tokenizer.json, or a Hugging Face hub id (no other file is fetched).

    `backend="fastokens"` insists on it, "auto" falls back; "tokenizers" opens in a third of the time, and `fastest`
    makes the other of it when there is something to encode. `threads` bounds the threads of both encoders in this
    process; it has no effect once one of them has run. Raises UserError.
    """
    if backend not in BACKENDS:
        raise UserError(f"tokenizer.backend={backend}: choose from {', '.join(BACKENDS)}")
    _limit_threads(threads)
    file, commit = _find(str(model), revision)
    content = _open_content(file)
    id_of = content.names.token_to_id
    named = _special_tokens(file.parent)
    if "eos_token" not in named and (usual := [token for token in _USUAL_ENDS if id_of(token) is not None]):
        named["eos_token"] = usual[0]
    for role in ("eos_token", "pad_token"):
        if role in named and id_of(named[role]) is None:
            raise UserError(f"{file}: {role} {named[role]} is not in the vocabulary")
    if "eos_token" not in named:
        raise UserError(f"{file}: no end-of-text token: name eos_token in tokenizer_config.json beside it")
    eos, pad = id_of(named["eos_token"]), id_of(named.get("pad_token", named["eos_token"]))
    space = ""
    if _decode(content.names, ["x", "y"]) != "xy":
        if not (found := without_prefix(orjson.loads(file.read_bytes()))):
            raise UserError(f"{file}: this tokenizer puts a space before every text, so spans cannot be encoded")
        space = found[1]
    tokenizer = Tokenizer(
        name=str(model),
        file=file,
        revision=commit,
        backend="tokenizers",
        threads=threads,
        vocab_size=content.vocab_size,
        eos_id=eos,
        pad_id=pad,
        special_tokens=named,
        digest=hashlib.sha256(b"[%b,%d,%d]" % (content.text, eos, pad)).hexdigest(),
        space=space,
    )
    return tokenizer if backend == "tokenizers" else fastest(tokenizer, insist=backend == "fastokens")


def fastest(tokenizer: Tokenizer, pool: Executor | None = None, insist: bool = False) -> Tokenizer:
    """The tokenizer with fastokens for its backend, if that is found equal.

    `pool`: processes that have fastokens open, or will soon, so that this one need not open it to compare the two.
    Raises UserError if it differs and `insist` is set.
    """
    if tokenizer.space:
        return tokenizer
    difference = _difference(tokenizer.file, tokenizer._reference, pool)
    if difference and insist:
        raise UserError(f"{tokenizer.file}: fastokens cannot encode it: {difference}; use tokenizer.backend=auto")
    return tokenizer if difference else replace(tokenizer, backend="fastokens")


def tokenize(tokenizer: Tokenizer, sequences: list[list[tuple[str, str]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode sequences of (role, text) spans in one batch.

    Returns ids int32 (tokens,), mask uint8 (tokens,), 1 on the tokens of spans of role "assistant", and
    offsets int64 (sequences + 1,): sequence i is ids[offsets[i]:offsets[i + 1]].
    """
    if tokenizer.space:
        ids, bounds = tokenizer.encode_spans(sequences)
    else:
        ids, bounds = tokenizer.encode_batch([text for spans in sequences for _, text in spans])
    trained = np.array([role == "assistant" for spans in sequences for role, _ in spans], dtype=np.uint8)
    first_span = np.cumsum([0, *map(len, sequences)])
    return ids, np.repeat(trained, np.diff(bounds)), bounds[first_span]


# --- finding and reading files -----------------------------------------------------------------------------


def _find(model: str, revision: str | None) -> tuple[Path, str | None]:
    """(tokenizer.json, hub commit or None)"""
    path = Path(model)
    if path.exists():
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"{path}: no tokenizer.json there; write one with "
                "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return file, None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UserError(f"no tokenizer at {model}: give a directory, a tokenizer.json or a hub id")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client's errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no tokenizer {model}: not a local path, and the hub says: {type(error).__name__}: {reason}"
        ) from None
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{model}: the hub repository has no tokenizer.json")
    return folder / "tokenizer.json", folder.name


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... as named in the files beside tokenizer.json; the config has the last word."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(f"{folder / name}: not JSON: {error}") from None
        for key, value in content.items():
            if key.endswith("_token") and isinstance(token := _content(value), str):
                named[key] = token
    return named


def _content(token: object) -> object:
    """A token is spelled as a string or as {"content": "...", ...}."""
    return token.get("content") if isinstance(token, dict) else token


@dataclass(frozen=True)
class _Content:
    """What tokenizer.json says of names, ids and decoding. Without its merges it opens in a quarter of the time."""

    names: Any  # a tokenizers.Tokenizer that knows no merges, so it encodes single characters at most
    text: bytes  # JSON with sorted keys and the merges, without truncation and padding
    vocab_size: int


def _open_content(file: Path) -> _Content:
    return _opened_content(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _opened_content(file: Path, changed: int) -> _Content:
    from tokenizers import Tokenizer as Reference

    try:
        content = orjson.loads(file.read_bytes())
        kept = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        text = orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)
        model = content["model"]
        if "merges" in model:
            model["merges"] = []
        names = _whole(Reference.from_buffer(orjson.dumps(content)))
        ids = range(len(model["vocab"])) if isinstance(model["vocab"], list) else model["vocab"].values()
        ids = [*ids, *names.get_added_tokens_decoder()]  # the file may lack them, or give them other numbers
    except Exception as error:  # tokenizers raises bare Exception
        raise _no_tokenizer(file, error) from None
    return _Content(names, text, max(ids) + 1)


def _no_tokenizer(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: not a tokenizer: {' '.join(str(error).split())[:200]}")


# --- the two encoders --------------------------------------------------------------------------------------


def _limit_threads(threads: int) -> None:
    """Both encoders run a rayon pool sized at first use from the environment."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


def _open_reference(file: Path) -> Any:
    return _opened_reference(file, file.stat().st_mtime_ns)


def _open_fastokens(file: Path) -> Any:
    return _opened_fastokens(file, file.stat().st_mtime_ns)


def preload(model: str) -> None:
    """Open the encoder that `load_tokenizer` is likely to choose: it takes seconds, which a worker process can spend
    while its parent is still planning. Never fails; load_tokenizer says what is wrong."""
    with suppress(Exception):
        _limit_threads(1)
        _open_fastokens(_find(model, None)[0])


@lru_cache(maxsize=2)
def _opened_reference(file: Path, changed: int) -> Any:
    from tokenizers import Tokenizer as Reference

    try:
        return _whole(Reference.from_file(str(file)))
    except Exception as error:  # tokenizers raises bare Exception
        raise _no_tokenizer(file, error) from None


@lru_cache(maxsize=2)
def _opened_fastokens(file: Path, changed: int) -> Any:
    from fastokens import Tokenizer as Fast

    return _whole(Fast.from_file(str(file)))


def _whole(encoder: Any) -> Any:
    """The encoder, encoding texts as they are: a tokenizer.json may ask for cutting and padding."""
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _valid(text: str) -> str:
    """The text with U+FFFD for lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _encode_reference(reference: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    ids = np.fromiter((token for ids in encoded for token in ids), dtype=np.int32, count=offsets[-1])
    return ids, offsets


def _encode_flat(fast: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = fast.encode_batch_flat(texts, add_special_tokens=False)
    return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64)


def _encode_fast(file: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _encode_flat(_open_fastokens(file), texts)


def _decode(reference: Any, texts: list[str]) -> str:
    ids, _ = _encode_reference(reference, texts)
    return reference.decode(ids.tolist(), skip_special_tokens=False)


def _difference(file: Path, reference: Any, pool: Executor | None = None) -> str | None:
    """Why fastokens cannot stand in for `reference`, or None."""
    texts = probes([token.content for token in reference.get_added_tokens_decoder().values()])
    elsewhere = pool.submit(_encode_fast, file, texts) if pool else None
    ids, offsets = _encode_reference(reference, texts)
    try:
        got_ids, got_offsets = elsewhere.result() if elsewhere else _encode_fast(file, texts)
    except BrokenExecutor:
        raise
    except Exception as error:  # unsupported models raise ValueError, others whatever Rust reports
        return " ".join(str(error).split())[:200] or type(error).__name__
    if np.array_equal(got_ids, ids) and np.array_equal(got_offsets, offsets):
        return None
    for i, text in enumerate(texts):
        got = got_ids[got_offsets[i] : got_offsets[i + 1]]
        if not np.array_equal(got, ids[offsets[i] : offsets[i + 1]]):
            return f"it encodes {text[:40]!r} differently"
    return "its offsets differ"
