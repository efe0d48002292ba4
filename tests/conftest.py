"""What several test files share: paths, a way to run the commands, and prepared tiny data."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, and two workers share the cores

settings.register_profile("no deadline", settings.default, deadline=None)  # an example may meet a busy machine
settings.load_profile("no deadline")

# The smallest model that exercises every code path of training that is not about Mamba layers or experts.
SMALL = [
    "model=tiny_gpt",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "heldout.path=null",
    "train.global_batch_size=4",
    "train.packs_per_microbatch=2",
    "model.qk_layernorm=false",
]

# The same with all kinds of layers of Nemotron 3: Mamba, attention, mixture of experts.
SMALL_HYBRID = [
    "model=tiny",
    "model.hybrid_layer_pattern=MEM*",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "model.mamba_num_groups=2",
    "heldout.path=null",
    "train.packs_per_microbatch=2",
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def run(*command, timeout=300, **env):
    """Run a command in the repository root; returns the CompletedProcess with both streams as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {key: str(value) for key, value in env.items()},
    )


def recipe(name, *overrides, **kwargs):
    return run(sys.executable, f"recipes/{name}.py", *overrides, **kwargs)


def composed(name, *overrides):
    """The config of recipes/NAME.py with overrides as a user types them, composed in this process."""
    from hydra import compose, initialize_config_dir

    from nemotron_sft import app, paths

    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        return compose(name, app.overrides(list(overrides), name))


def losses(run_dir, key="loss"):
    """{step: value} of metrics.jsonl; empty if there is none yet."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="session")
def bridge():
    """Megatron-Bridge in this process, on the CPU. For the whole session: afterwards CUDA seems to be available."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("tests the CPU path")
    from nemotron_sft.train.start import start_bridge

    assert start_bridge().on_cpu


@pytest.fixture(scope="module")
def offline(bridge, tmp_path_factory):
    """Bridge, with an empty hub cache and no way to the hub."""
    offline = pytest.MonkeyPatch()
    offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("empty")))
    yield
    offline.undo()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """The config of a small Qwen3, for model=hf."""
    from transformers import Qwen3Config

    path = tmp_path_factory.mktemp("qwen3")
    Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """The tiny blend, prepared once by the command a user would type."""
    out = tmp_path_factory.mktemp("data") / "tiny"
    done = recipe(
        "prep", "blend=tiny", "sample=600", f"output_dir={out}", "split={training: 0.9, validation: 0.05, test: 0.05}"
    )
    assert done.returncode == 0, done.stderr
    return next(path.parent for path in out.parent.rglob("metadata.json"))


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first, so that no worker is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_addoption(parser):
    parser.addoption("--wandb-project", help="ENTITY/PROJECT on a W&B server, for the one test that needs an account")
    parser.addoption("--vllm", help="the Python of an environment with vLLM, for the tests that have it serve exports")
