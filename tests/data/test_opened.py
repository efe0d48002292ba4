"""What metadata.json names is opened again as it was, or refused."""

import json
import shutil

import pytest
from conftest import ROOT

from nemotron_sft.data.chat import load_template
from nemotron_sft.data.opened import open_template, open_tokenizer
from nemotron_sft.data.tokens import load_tokenizer
from nemotron_sft.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_template_is_opened_with_its_options_and_special_tokens(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    options = {"name": str(file), "mask": "last_turn", "thinking": False, "special_tokens": {"bos_token": "<s>"}}
    metadata = {"template": options | {"digest": load_template(**options).digest}}
    opened = open_template(metadata)
    assert (opened.mask, opened.thinking) == ("last_turn", False)
    assert opened.render(CHAT) == "<s>user: Hi\nassistant: Hello\n"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match=r"own\.jinja has changed since the data was made"):
        open_template(metadata)
    file.unlink()
    with pytest.raises(UserError, match="nor a readable Jinja file"):
        open_template(metadata)


def test_another_tokenizer_in_the_same_place_is_refused(tmp_path):
    shutil.copytree(ROOT / "data/tiny/tokenizer", tmp_path / "t")
    made_with = load_tokenizer(str(tmp_path / "t"), backend="tokenizers")
    metadata = {"tokenizer": {"model": made_with.name, "revision": None, "digest": made_with.digest}}
    assert open_tokenizer(metadata) == made_with
    content = json.loads((tmp_path / "t/tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has changed since the data was made"):
        open_tokenizer(metadata)


def test_the_revision_of_the_data_is_asked_for(monkeypatch):
    asked = {}
    made_with = load_tokenizer(str(ROOT / "data/tiny/tokenizer"), backend="tokenizers")

    def load(model, **options):
        asked.update(options, model=model)
        return made_with

    monkeypatch.setattr("nemotron_sft.data.opened.load_tokenizer", load)
    open_tokenizer({"tokenizer": {"model": "org/name", "revision": "abc123", "digest": made_with.digest}})
    assert (asked["model"], asked["revision"]) == ("org/name", "abc123")
