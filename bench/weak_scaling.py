"""Weak scaling of data parallelism: the same rows per GPU, on every GPU alone and on all of them together.

    python bench/weak_scaling.py --out output/bench [--gpus 2]

The model, data and batch per GPU are those of bench/train_gpu.py (1.107 billion parameters, 32,768 tokens a GPU and
step), the command is the recipe's own. First every GPU runs by itself, all at one time, so that they share the host as
they do later; then one job runs on all. Times are medians of a step over windows of ten, as metrics.jsonl has them,
without the first two windows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT
from common.packs import make_data
from dense import PACK, STEP_PACKS, VOCABULARY


def start(out: Path, name: str, gpus: int, steps: int, **env: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", "--standalone"]
    return subprocess.Popen(
        [
            *(launcher if gpus > 1 else [sys.executable]), "recipes/train.py", "model=dense_1b", f"data={out}/data",
            f"run_dir={out}/scaling/{name}", "tracking=disabled", f"train.global_batch_size={STEP_PACKS * gpus}",
            f"train.packs_per_microbatch={STEP_PACKS}", f"train.train_iters={steps}", "logger.log_interval=10",
        ],
        cwd=ROOT, env=os.environ | env, stdout=sys.stderr,
    )  # fmt: skip


def finish(process: subprocess.Popen, out: Path, name: str, gpus: int) -> float:
    """Tokens per second."""
    if process.wait():
        sys.exit(f"the run {name} failed")
    lines = [json.loads(line) for line in (out / "scaling" / name / "metrics.jsonl").read_text().splitlines()]
    milliseconds = statistics.median([line["step_ms"] for line in lines if "step_ms" in line][2:])
    speed = gpus * STEP_PACKS * PACK / milliseconds * 1000
    print(f"{name:10} {milliseconds:8.1f} ms a step  {speed:9,.0f} tokens/s", flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    out = args.out.resolve()
    make_data(out / "data", 1024, PACK, VOCABULARY)
    alone = [
        start(out, f"gpu-{number}", 1, args.steps, CUDA_VISIBLE_DEVICES=str(number)) for number in range(args.gpus)
    ]
    apart = sum(finish(process, out, f"gpu-{number}", 1) for number, process in enumerate(alone))
    together = finish(start(out, "all", args.gpus, args.steps), out, "all", args.gpus)
    print(f"weak scaling on {args.gpus} GPUs: {together / apart:.3f}")


if __name__ == "__main__":
    main()
