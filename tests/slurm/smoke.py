"""make slurm-smoke: preparation as a job array, then training in two tasks, on a Slurm started for it on this host.

    python tests/slurm/smoke.py [DIRECTORY for the outputs, output/slurm-smoke]

Says "skipped", with the reason, where Slurm cannot be started; exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLUSTER = ["-m", "cluster=slurm", "cluster.environment.MASTER_ADDR=127.0.0.1"]
SMALL = ["model.hybrid_layer_pattern=MEM*", "model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=2",
         "model.num_query_groups=2", "model.mamba_num_groups=2", "heldout.path=null", "train.train_iters=20",
         "train.global_batch_size=4", "train.packs_per_microbatch=2"]  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "output/slurm-smoke").absolute()
    root = tempfile.mkdtemp(prefix="slurm-")
    os.environ["SLURM_TEST_ROOT"] = root
    os.environ["SLURM_CONF"] = f"{root}/etc/slurm.conf"
    with tempfile.TemporaryFile("w+") as log:  # not a pipe: the daemons would keep it open
        started = subprocess.run([HERE / "up.sh"], stdout=log, stderr=log)
        log.seek(0)
        told = log.read().strip()
    try:
        if started.returncode:
            print(f"slurm-smoke skipped: {told}")
            return
        shutil.rmtree(out, ignore_errors=True)
        smoke(out)
    finally:
        subprocess.run([HERE / "down.sh"])
        shutil.rmtree(root, ignore_errors=True)
    print("slurm-smoke passed")


def smoke(out: Path) -> None:
    folder = f"cluster.folder={out}/slurm"
    run("prep", "blend=tiny", "prep.shards=2", f"output_dir={out}/data", folder)
    metadata = json.loads((out / "data/metadata.json").read_text())
    expect(metadata["splits"]["training"]["packs"] > 0, "the training split has no packs")

    tasks = "cluster.tasks_per_node=2"
    run("train", f"data={out}/data", f"run_dir={out}/run", *SMALL, tasks, folder)
    lines = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    expect(len(losses) == 20 and losses[-1] < losses[0] - 0.5, f"losses {losses}")
    for name in ("config.yaml", "report.html", "logs/rank1.log", "checkpoints/iter_0000020"):
        expect((out / "run" / name).exists(), f"{name} is missing in the run directory")

    run("train", f"data={out}/nothing", *SMALL, tasks, folder, status=2)
    states = subprocess.run(["scontrol", "-o", "show", "job"], capture_output=True, text=True).stdout
    found = sorted(word.split("=")[1] for word in states.split() if word.startswith("JobState="))
    expect(found == ["COMPLETED"] * 4 + ["FAILED"], f"jobs ended as {found}")


def run(recipe: str, *overrides: str, status: int = 0) -> None:
    """A command, following its job; its exit status must be `status`."""
    command = [sys.executable, f"recipes/{recipe}.py", *CLUSTER, *overrides]
    print("$", *command[1:], flush=True)
    started = time.monotonic()
    ended = subprocess.run(command, cwd=HERE.parent.parent, timeout=540).returncode
    print(f"exit status {ended} after {time.monotonic() - started:.1f} s", flush=True)
    expect(ended == status, f"exit status {ended} instead of {status}")
    for _ in range(50):  # Slurm learns of the end a moment after the job's exit file
        if not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout:
            break
        time.sleep(0.2)


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SystemExit(f"slurm-smoke failed: {otherwise}")


if __name__ == "__main__":
    main()
