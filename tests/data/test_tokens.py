"""Tokenizers: both encoders against Hugging Face's, masks by span, files and the hub, errors."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hub import Handler, Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

from nemotron_sft.data.chat import load_template
from nemotron_sft.data.probes import probes
from nemotron_sft.data.tokens import load_tokenizer, tokenize
from nemotron_sft.errors import UserError

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pattern: str = WORDS) -> Reference:
    """A small BPE of the kind that Nemotron, Llama 3 and Qwen use."""
    reference = Reference(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(probes([]) * 3, trainer)
    reference.add_tokens(MARKERS)
    return reference


def save(folder: Path, reference: Reference, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    reference.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tokenizer"), byte_level(), eos_token="<|im_end|>", pad_token="<unk>")


@pytest.fixture(scope="module")
def loaded(folder):
    return {backend: load_tokenizer(str(folder), backend=backend) for backend in ("fastokens", "tokenizers")}


def test_auto_takes_the_fast_encoder(folder):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.backend == "fastokens" and tokenizer.revision is None
    assert (tokenizer.eos_id, tokenizer.pad_id) == (SPECIAL.index("<|im_end|>"), SPECIAL.index("<unk>"))
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.vocab_size == reference.get_vocab_size() == reference.token_to_id(MARKERS[-1]) + 1


texts = st.text(max_size=30) | st.lists(
    st.sampled_from([*SPECIAL, *MARKERS, " ", "  ", "\n", "a", "Hello", "数", "🚀", "12345", "<|im", "don't", "\x00"]),
    max_size=12,
).map("".join)


@settings(max_examples=150)
@given(batch=st.lists(texts, max_size=5))
def test_ids_are_hugging_faces_and_decode_to_the_text(loaded, folder, batch):
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    for tokenizer in loaded.values():
        ids, offsets = tokenizer.encode_batch(batch)
        assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
        assert len(offsets) == len(batch) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
        for i, text in enumerate(batch):
            own = ids[offsets[i] : offsets[i + 1]].tolist()
            assert own == reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(own) == text


@pytest.mark.parametrize("backend", ["fastokens", "tokenizers"])
def test_mask_covers_exactly_the_answers(loaded, backend):
    tokenizer, template = loaded[backend], load_template("nano3")
    sequences = template.sequences(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "1", "reasoning_content": "count"},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "2"},
        ]
    )
    ids, mask, offsets = tokenize(tokenizer, sequences)
    assert (ids.dtype, mask.dtype, offsets.dtype) == (np.int32, np.uint8, np.int64)
    assert len(ids) == len(mask) == offsets[-1] and len(offsets) == 3
    answers = ["count\n</think>\n1<|im_end|>\n", "2<|im_end|>\n"]
    for i, answer in enumerate(answers):
        part = slice(offsets[i], offsets[i + 1])
        assert tokenizer.decode(ids[part]) == "".join(text for _, text in sequences[i])
        assert tokenizer.decode(ids[part][mask[part] == 1]) == answer
        assert tokenizer.eos_id in ids[part][mask[part] == 1]  # the turn terminator is a target


def test_no_merge_crosses_a_span(loaded):
    tokenizer = loaded["fastokens"]
    whole, _, _ = tokenize(tokenizer, [[("user", "Hello")]])
    parts, mask, _ = tokenize(tokenizer, [[("user", "Hel"), ("assistant", "lo")]])
    separate = [tokenizer.encode_batch([text])[0].tolist() for text in ("Hel", "lo")]
    assert parts.tolist() == [*separate[0], *separate[1]] != whole.tolist()
    assert mask.tolist() == [0] * len(separate[0]) + [1] * len(separate[1])


def test_empty_batches_and_texts(loaded):
    for tokenizer in loaded.values():
        ids, mask, offsets = tokenize(tokenizer, [])
        assert len(ids) == len(mask) == 0 and offsets.tolist() == [0]
        ids, mask, offsets = tokenize(tokenizer, [[("user", "")], [], [("assistant", "a"), ("user", "")]])
        assert offsets.tolist() == [0, 0, 0, 1] and mask.tolist() == [1]


def test_lone_surrogates_become_replacement_characters(loaded):
    for tokenizer in loaded.values():
        ids, offsets = tokenizer.encode_batch(["a\ud800b", "plain"])
        assert tokenizer.decode(ids[: offsets[1]]) == "a\ufffdb"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    reference = byte_level()
    reference.enable_truncation(4)
    reference.enable_padding(length=64)
    save(tmp_path, reference, eos_token="<|im_end|>")
    for backend in ("fastokens", "tokenizers"):
        tokenizer = load_tokenizer(str(tmp_path), backend=backend)
        ids, offsets = tokenizer.encode_batch(["a b c d e f g h", "a"])
        assert tokenizer.decode(ids[: offsets[1]]) == "a b c d e f g h"
        assert tokenizer.decode(ids[offsets[1] :]) == "a"


def test_digest_is_that_of_the_contents(tmp_path, folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "truncation": None}, indent=7))
    config = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": "<unk>",
        "chat_template": "x",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    first, second = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert first.digest == second.digest and len(first.digest) == 64
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(str(tmp_path)).digest != first.digest


@pytest.mark.parametrize("change", ["as saved", "without added tokens", "a far added token"])
def test_names_and_ids_are_the_librarys(change, tmp_path):
    """Also where the file leaves out its added tokens, or numbers them otherwise than the library does."""
    content = json.loads(byte_level().to_str())
    if change == "without added tokens":
        del content["added_tokens"]
    elif change == "a far added token":
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 99_999, "content": "<|far|>"})
    path = save(tmp_path, byte_level(), eos_token="<|im_end|>") / "tokenizer.json"
    path.write_text(json.dumps(content))
    reference, tokenizer = Reference.from_file(str(path)), load_tokenizer(str(tmp_path), backend="tokenizers")
    vocabulary = reference.get_vocab(with_added_tokens=True)
    assert tokenizer.vocab_size == max(vocabulary.values()) + 1 and tokenizer.eos_id == vocabulary["<|im_end|>"]
    assert tokenizer.added_ids.tolist() == list(reference.get_added_tokens_decoder())
    ids = list(range(tokenizer.vocab_size))
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_pickles_to_workers(folder):
    tokenizer = load_tokenizer(str(folder))
    expected = tokenizer.encode_batch(["Hello 数"])[0].tolist()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer and copy.encode_batch(["Hello 数"])[0].tolist() == expected


def test_bare_file_and_pad_default(tmp_path):
    tokenizer = load_tokenizer(str(save(tmp_path, byte_level()) / "tokenizer.json"))
    assert tokenizer.eos_id == tokenizer.pad_id == SPECIAL.index("<|im_end|>")


def test_falls_back_where_fastokens_cannot(tmp_path):
    """A Unigram model is not BPE: auto takes Hugging Face's encoder, fastokens alone is refused."""
    reference = Reference(models.Unigram([("<unk>", 0.0), ("x", -1.0), ("y", -1.0), ("xyz", -2.0), ("</s>", 0.0)], 0))
    reference.decoder = decoders.Fuse()
    save(tmp_path, reference, eos_token="</s>")
    assert load_tokenizer(str(tmp_path)).backend == "tokenizers"
    with pytest.raises(UserError, match="fastokens cannot encode it"):
        load_tokenizer(str(tmp_path), backend="fastokens")


def test_a_difference_is_found(tmp_path, monkeypatch):
    """The start-up check compares ids: an encoder that is wrong on one probe is not used."""
    from nemotron_sft.data import tokens

    save(tmp_path, byte_level(), eos_token="<|im_end|>")
    right = tokens._encode_flat

    def wrong(fast, texts):
        ids, offsets = right(fast, texts)
        return np.where(np.arange(len(ids)) == offsets[len(texts) // 2], ids + 1, ids), offsets

    monkeypatch.setattr(tokens, "_encode_flat", wrong)
    assert load_tokenizer(str(tmp_path)).backend == "tokenizers"


def test_threads(folder):
    """One thread per worker unless asked otherwise; counted in a process of its own."""
    code = (
        "import os, sys; from nemotron_sft.data.tokens import load_tokenizer\n"
        "t = load_tokenizer(sys.argv[1], threads=int(sys.argv[2])); t.encode_batch(['Hello world'] * 5000)\n"
        "print(os.environ['RAYON_NUM_THREADS'], len(os.listdir('/proc/self/task')))"
    )
    counts = [run(code, str(folder), threads).split() for threads in ("1", "4")]
    assert [int(asked) for asked, _ in counts] == [1, 4]
    assert int(counts[1][1]) - int(counts[0][1]) >= 3


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Models(Handler):
    """The dataset hub of the tests, asked for models."""

    def answer(self, body: bool) -> None:
        api, models_api = "/api/datasets/", "/api/models/"
        self.path = self.path.replace(models_api, api) if models_api in self.path else "/datasets" + self.path
        super().answer(body)


def test_hub(folder, tmp_path):
    files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"model.safetensors": b"0" * 1000}
    server = Hub({"org/model": files})
    server.RequestHandlerClass = Models
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from nemotron_sft.data.tokens import load_tokenizer; from nemotron_sft.errors import UserError\n"
        "t = load_tokenizer('org/model'); print(t.name, t.revision, t.eos_id)\n"
        "try: load_tokenizer('org/other')\n"
        "except UserError as error: print(error)\n"
    )
    found, missing = run(code, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path)).splitlines()
    server.shutdown()
    assert found == f"org/model 0123456789abcdef0123456789abcdef01234567 {SPECIAL.index('<|im_end|>')}"
    assert missing.startswith("no tokenizer org/other")
    assert not any("safetensors" in path for _, path, _ in server.requests if "resolve" in path)


# --- errors ------------------------------------------------------------------------------------------------


def test_errors_are_one_line(tmp_path, folder):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "unknown", byte_level(), eos_token="<nowhere>")
    endless = Reference(models.BPE(vocab={"x": 0, "y": 1}, merges=[]))
    save(tmp_path / "endless", endless)
    for model, options, message in (
        (tmp_path / "broken.json", {}, "not a tokenizer"),
        (tmp_path / "empty", {}, "no tokenizer.json there"),
        (tmp_path / "unknown", {}, "eos_token <nowhere> is not in the vocabulary"),
        (tmp_path / "endless", {}, "name eos_token"),
        (tmp_path / "a" / "b", {}, "give a directory"),
        (folder, {"backend": "slow"}, "auto, fastokens, tokenizers"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(str(model), **options)
        assert "\n" not in str(caught.value)


# --- tokenizers that put a space before a text --------------------------------------------------------------


def llama2(kind: str) -> Reference:
    """A small SentencePiece BPE with byte fallback, as Llama 2's and Mistral's: a space before every text."""
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581", "["), ("\u2581", "\u2581"), ("\u2581a", "b")]
    for token in (*"\u2581ab[]INST/x", *map("".join, merges)):
        vocab.setdefault(token, len(vocab))
    reference = Reference(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        reference.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind != "unknown":
        reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    else:
        steps = [normalizers.Replace(Regex("^"), "\u2581"), normalizers.Replace(" ", "\u2581")]
        reference.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    reference.decoder = decoders.Sequence(steps)
    reference.add_special_tokens(specials)
    return reference


pieces = st.lists(
    st.sampled_from(["a", "b", "ab", " ", "\n", "[INST] ", " [/INST]", "x", "<s>", "</s>", "\u6570"]), max_size=6
)


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
@settings(max_examples=100)
@given(data=st.data())
def test_spans_get_a_space_only_where_the_whole_text_does(kind, data, tmp_path_factory):
    """Cut at special tokens or newlines, which nothing merges with, spans give the ids of the whole text."""
    reference = llama2(kind)
    folder = tmp_path_factory.mktemp("llama2")
    tokenizer = load_tokenizer(str(save(folder, reference, eos_token="</s>")))
    assert tokenizer.backend == "tokenizers" and tokenizer.space == ("first" if kind == "first" else "always")
    spans = [("user", "".join(data.draw(pieces)) + "\n"), ("assistant", "".join(data.draw(pieces)) + "</s>")]
    sequences = [[*spans, ("user", "".join(data.draw(pieces)) + "\n"), ("assistant", "a</s>")], spans, [("user", "a")]]
    ids, mask, offsets = tokenize(tokenizer, sequences)
    for i, sequence in enumerate(sequences):
        whole = reference.encode("".join(text for _, text in sequence), add_special_tokens=False).ids
        assert ids[offsets[i] : offsets[i + 1]].tolist() == whole
    plain = [token for token, trained in zip(ids[offsets[1] : offsets[2]], mask[offsets[1] :], strict=False) if trained]
    assert plain[-1] == tokenizer.eos_id


def test_an_answer_behind_text_gets_no_second_space(tmp_path):
    """Llama 2's template writes `[/INST] answer`; at inference the answer's first token is the one with the space."""
    tokenizer = load_tokenizer(str(save(tmp_path, llama2("prepend"), eos_token="</s>")))
    ids, mask, _ = tokenize(tokenizer, [[("user", "<s>[INST] a [/INST]"), ("assistant", " ab </s>")]])
    trained = [tokenizer._reference.id_to_token(token) for token, on in zip(ids, mask, strict=True) if on]
    assert trained == ["\u2581ab", "\u2581", "</s>"]


def test_a_space_of_unknown_origin_is_refused(tmp_path):
    save(tmp_path, llama2("unknown"), eos_token="</s>")
    with pytest.raises(UserError, match="space before every text"):
        load_tokenizer(str(tmp_path))


def test_the_tokenizers_own_template(tmp_path):
    folder = save(tmp_path, byte_level(), eos_token="<|im_end|>", chat_template="\ufeffinside")
    assert load_tokenizer(str(folder)).chat_template == "inside"
    (folder / "chat_template.jinja").write_text("\ufeffbeside")
    assert load_tokenizer(str(folder)).chat_template == "beside"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert (
        load_tokenizer(str(save(tmp_path / "b", byte_level(), eos_token="</s>", chat_template=several))).chat_template
        == "d"
    )
    assert load_tokenizer(str(save(tmp_path / "c", byte_level(), eos_token="</s>"))).chat_template is None


@pytest.mark.parametrize(
    ("name", "missing"),
    [("nano3", []), ("lightning35", []), ("nano_v2", ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"])],
)
def test_special_tokens_that_a_template_writes(loaded, name, missing):
    tokenizer = loaded["fastokens"]
    assert tokenizer.missing(load_template(name).written_tokens()) == missing


@pytest.mark.parametrize(
    "token",
    ["<|eot_id|>", "<\uff5cUser\uff5c>", "<end_of_turn>", "<turn|>", "<|turn>", "<s>", "[INST]", "<tag>", "a < b |> c"],
)
def test_special_tokens_of_a_jinja_file(token):
    source = "{% for m in messages %}{{ m.role ~ m.content }}" + token + "{% endfor %}"
    written = load_template("x.jinja", source=source).written_tokens()
    assert written == ([] if token in ("[INST]", "<tag>", "a < b |> c") else [token])
