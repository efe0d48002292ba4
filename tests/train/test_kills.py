"""Runs that are killed somewhere and started again."""

import sys

import pytest
from conftest import run


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_as_if_it_had_not_been(tiny_data):
    """One kill of a run on two ranks; kills.py by itself does any number of them, and test_train.py one on one rank."""
    done = run(sys.executable, "tests/train/kills.py", "--count=1", "--first=3", "--data", tiny_data, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
