"""What servers and RL trainers read beside the weights of an export."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, GenerationConfig

from nemotron_sft.data.packed import read_metadata
from nemotron_sft.train import handover


@pytest.fixture
def written(tiny_data, tmp_path):
    """A function that writes the files of an export of the tiny data: (directory, told)."""

    def write(base=None):
        (tmp_path / "config.json").write_text('{"architectures": ["NemotronHForCausalLM"]}')
        return tmp_path, handover.write(tmp_path, read_metadata(tiny_data), tiny_data, base)

    return write


def test_tokenizer_config_and_generation_config_stop_at_the_trained_end(written):
    """NeMo-RL stops at the tokenizer's eos, and verl writes it over config.json's; vLLM reads the third as well."""
    directory, told = written()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id is not None and not told
    assert GenerationConfig.from_pretrained(directory).eos_token_id == config["eos_token_id"] == tokenizer.eos_token_id


def test_the_template_renders_what_trainers_build_turns_from(written):
    """verl finds the system prompt and the generation prompt by rendering one and two empty questions."""
    tokenizer = AutoTokenizer.from_pretrained(written()[0])
    question = {"role": "user", "content": ""}

    def ids(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    one, two, asked = ids([question]), ids([question] * 2), ids([question], add_generation_prompt=True)
    turn = two[len(one) :]
    assert one == one[: -len(turn)] + turn and asked[: len(one)] == one
    assert tokenizer.decode(asked[len(one) :]) == "<|im_start|>assistant\n<think>\n"
    assert ids([question], add_generation_prompt=True, enable_thinking=False) != asked


def test_an_end_that_the_tokenizer_cannot_name_is_told(written, monkeypatch):
    """A template that prints eos_token means another token by it: it cannot become the end of turn."""
    metadata_tokenizer = handover.open_tokenizer

    def with_another_end(metadata):
        tokenizer = metadata_tokenizer(metadata)
        return replace(tokenizer, eos_id=1)

    monkeypatch.setattr(handover, "open_tokenizer", with_another_end)
    monkeypatch.setattr(
        handover, "open_template", lambda metadata: SimpleNamespace(source="{{ eos_token }}", name="own")
    )
    directory, told = written()
    (line,) = told
    assert "eos_token" in line and "stop_token_ids" in line and "[4]" in line
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 4
