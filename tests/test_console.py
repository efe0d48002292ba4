"""Control characters in data are shown, not sent, wherever a terminal prints data."""

import json
import re

from conftest import recipe
from hypothesis import given
from hypothesis import strategies as st

from nemotron_sft.console import visible

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\u202egnp.exe"
SENT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@given(st.text(st.characters(codec=None)))
def test_nothing_that_steers_a_terminal_is_left(text):
    shown = visible(text)
    assert not SENT.search(shown)
    shown.encode()  # no lone surrogates
    assert visible(shown) == shown


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_ordinary_text_is_left_alone(text):
    assert visible(text + "\n\t🏳️‍🌈") == text + "\n\t🏳️‍🌈"


def test_prep_and_show_send_no_control_characters_of_the_data(tmp_path):
    good = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": f"yes {EVIL}"}]}
    bad = {"messages": [{"role": f"boss {EVIL}", "content": "?"}]}
    lines = [good] * 40 + [bad]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    blend = {"datasets": [{"name": f"mine {EVIL}", "path": str(tmp_path / "chats.jsonl")}]}
    (tmp_path / "evil.json").write_text(json.dumps(blend))
    options = [f"blend={tmp_path}/evil.json", f"output_dir={tmp_path}/out", "tracking=disabled", "pack_size=512"]
    refused = recipe("prep", *options)
    assert refused.returncode == 2 and "boss" in refused.stderr and re.search(r"^error: .*boss", refused.stderr, re.M)
    made = recipe("prep", *options, "max_drop_ratio=0.5")
    assert made.returncode == 0 and "Mix of" in made.stdout, made.stderr
    mix, pack = recipe("show", tmp_path / "out"), recipe("show", tmp_path / "out", "--pack", "0")
    assert "yes ␛]0;owned␇␛[2J\\x9b31m␍␈\\u202egnp.exe" in pack.stdout, pack.stderr
    for done in (refused, made, mix, pack):
        assert not SENT.search(done.stdout + done.stderr)
    coloured = recipe("show", tmp_path / "out", "--pack", "0", FORCE_COLOR=1, TERM="xterm")
    assert "\x1b[32m" in coloured.stdout
    assert not SENT.search(re.sub(r"\x1b\[[\d;]*m", "", coloured.stdout))  # rich's own colours apart
