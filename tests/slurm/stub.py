"""Stands in for recipes/train.py where a test is about jobs, not training: ranks that talk, and end as `name` says."""

import os
import time
from pathlib import Path

from nemotron_sft import app
from nemotron_sft.errors import UserError


def main(cfg):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, run_dir = dist.get_rank(), Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / f"pid{rank}").write_text(str(os.getpid()))
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, rank)
    if rank == 0:
        print(f"ranks {ranks} lr {cfg.optimizer.lr} group {cfg.tracking.group}", flush=True)
    if cfg.name == f"raise{rank}":
        time.sleep(0.5)
        raise ValueError(f"rank {rank} is broken")
    if cfg.name == "raise_alone":  # the other rank does not notice, and is ended by srun
        time.sleep(60 * rank)
        raise ValueError(f"rank {rank} is broken")
    if cfg.name == "user_error":
        raise UserError("the data is missing: prepare it")
    for step in range(600 if cfg.name != "ok" else 1):
        if rank == 0:
            print(f"step {step}", flush=True)
        time.sleep(0.1)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    app.run(main, "train")
