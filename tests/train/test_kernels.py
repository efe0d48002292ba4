"""Every Triton kernel in Triton's interpreter, each file of tests/train/kernels in a process of its own.

Triton looks at TRITON_INTERPRET when it is imported, and no other test may meet what it is then.
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "tests/train/kernels").glob("*.py"))


def test_no_kernel_is_without_tests():
    kernels = {file.name for file in (ROOT / "nemotron_sft/train/kernels").glob("*.py")} - {"__init__.py"}
    assert kernels == {file.name for file in FILES}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernel(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", file]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
