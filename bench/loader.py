"""The training loader against Megatron-Bridge's own: the same packs, picked in random order, one process, no GPU.

    python bench/loader.py [packs=2000] [seconds=5] [repeats=3] [work=output/bench/loader]

Packs of 4096 tokens go into training.npy and into training.idx.parquet, by the writers that prep uses, and come out as
batches of one pack: ours by PackedDataset and its collate_fn, Bridge's by GPTSFTPackedParquetDataset and its own. The
two take turns. Parquet is measured with the row groups that prep writes (64 packs) and with those of Bridge's writer
(500 packs); Bridge decodes a whole row group for every pack it picks.

Memory: a fresh process reads a whole epoch in random order, from `packs` and from ten times as many; its resident
memory at the end is compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nemotron_sft.console import table
from nemotron_sft.data import packed

PACK_SIZE, MEMBERS, CHUNK = 4096, 10, 500
GROUPS = {"prep's row groups": 64, "Bridge's row groups": 500}


def chunks(packs: int):
    """Random packs of MEMBERS sequences each, a chunk at a time."""
    rng = np.random.default_rng(0)
    for low in range(0, packs, CHUNK):
        records = packed.empty_packs(min(CHUNK, packs - low), packed.pack_dtype(PACK_SIZE, MEMBERS))
        records["input_ids"] = rng.integers(1, 131_072, records["input_ids"].shape)
        records["loss_mask"] = rng.random(records["loss_mask"].shape) < 0.5
        cuts = np.sort(rng.integers(1, PACK_SIZE - 1, (len(records), MEMBERS - 1)), axis=1)
        records["cu_seqlens"][:, 1:-1], records["cu_seqlens"][:, -1] = cuts, PACK_SIZE
        yield records


def make(work: Path, packs: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for count in (packs, 10 * packs):
        path = work / f"{count}.npy"
        if not path.exists():
            packed.write_packs(path, chunks(count), count)
    for size in GROUPS.values():
        path = work / f"groups-{size}.idx.parquet"
        if not path.exists():
            packed.ParquetWriter.ROW_GROUP = size
            packed.write_packs(path, chunks(packs), packs)


def ours(path: Path, packs: int):
    from nemotron_sft.train.batches import PackedDataset

    dataset = PackedDataset(path, packs, seed=0)
    return lambda index: dataset.collate_fn(dataset.__getitems__([index]))


def bridges(path: Path, packs: int):
    from types import SimpleNamespace

    from megatron.bridge.data.packing.parquet import GPTSFTPackedParquetDataset

    dataset = GPTSFTPackedParquetDataset(
        str(path), SimpleNamespace(eos_id=0), max_seq_length=PACK_SIZE, pad_to_max_length=True,
        prompt_template="{text} {output}", label_key="output",
    )  # fmt: skip
    order = np.random.default_rng(0).permutation(packs)
    return lambda index: dataset.collate_fn([dataset[int(order[index % packs])]])


def rate(batch, seconds: float) -> float:
    """Packs per second."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or count < 2:
        batch(count)
        count += 1
    return count / (time.perf_counter() - started)


def resident(work: Path, packs: int) -> dict[str, float]:
    """MiB resident in a fresh process that has read one epoch in random order: all, and what no file backs."""
    command = [sys.executable, __file__, f"work={work}", f"packs={packs}", "epoch=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def epoch(work: Path, packs: int) -> None:
    batch = ours(work / f"{packs}.npy", packs)
    for index in range(packs):
        batch(index)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({key: int(status[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon")}))


def main(work: Path, packs: int, seconds: float, repeats: int) -> None:
    make(work, packs)
    from nemotron_sft.train.start import start_bridge

    start_bridge()
    loaders = {"ours": ours(work / f"{packs}.npy", packs)}
    loaders |= {name: bridges(work / f"groups-{size}.idx.parquet", packs) for name, size in GROUPS.items()}
    for batch in loaders.values():
        batch(0)
    runs: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(repeats):
        for name, batch in loaders.items():
            runs[name].append(rate(batch, seconds))
    rates = {name: statistics.median(values) for name, values in runs.items()}
    memory = {count: resident(work, count) for count in (packs, 10 * packs)}
    small, large = memory.values()
    growth = {key: large[key] / small[key] - 1 for key in small}
    rows = [(name, f"{value:,.1f}", f"{rates['ours'] / value:,.0f}x") for name, value in rates.items()]
    table(f"Packs of {PACK_SIZE} tokens per second, random order, median of {repeats}", ["", "packs/s", "ratio"], rows)
    print(f"resident after an epoch of {packs:,} packs: {small['VmRSS']:.0f} MiB, of {10 * packs:,}: "
          f"{large['VmRSS']:.0f} MiB ({growth['VmRSS']:+.1%})")  # fmt: skip
    ratios = {name: round(rates["ours"] / rates[name], 1) for name in GROUPS}
    print(json.dumps({"packs_per_second": rates, "ratios": ratios, "memory_mib": memory, "growth": growth}, indent=2))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    work, packs = Path(options.get("work", "output/bench/loader")), int(options.get("packs", 2000))
    if "epoch" in options:
        epoch(work, packs)
    else:
        main(work, packs, float(options.get("seconds", 5)), int(options.get("repeats", 3)))
