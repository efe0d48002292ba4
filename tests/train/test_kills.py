"""Runs that are killed somewhere and started again."""

import sys

import pytest
from conftest import run


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_as_if_it_had_not_been(tiny_data):
    """Four kills of two runs, one with two ranks; kills.py alone does any number of them."""
    done = run(sys.executable, "tests/train/kills.py", "--count=4", "--each=2", "--data", tiny_data, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
