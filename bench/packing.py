"""Packing speed and fill against Megatron-Bridge's first_fit_decreasing, on lognormal lengths.

    python bench/packing.py [repeats=3] [out=bench/packing.json]

The two take turns on the same million lengths in one process, so that a noisy machine disturbs both alike;
each gets what it likes best (an array, a list). Ten million are for ours alone: Bridge would take minutes.
"""

import json
import logging
import statistics
import sys
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np

from nemotron_sft.console import table
from nemotron_sft.data.packing import pack

PACK_SIZE = 4096


def lengths(n: int) -> np.ndarray:
    """(n,) int32 lengths in tokens, lognormal around 400, at most PACK_SIZE."""
    return np.random.default_rng(0).lognormal(6, 1, n).clip(1, PACK_SIZE).astype(np.int32)


def bridge_first_fit_decreasing():
    """The function from the installed megatron-bridge; its file alone: the package needs CUDA to import."""
    root = Path(next(iter(find_spec("megatron").submodule_search_locations))) / "bridge"
    for name in ("megatron.bridge", "megatron.bridge.utils", "megatron.bridge.utils.safe_pickle"):
        stand_in = ModuleType(name)
        stand_in.safe_load_npy = None  # reads pickles; nothing here does
        sys.modules.setdefault(name, stand_in)
    spec = spec_from_file_location("bridge_packing", root / "data" / "packing" / "algorithms.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.first_fit_decreasing


def timed(function, *arguments) -> tuple[float, object]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def main(repeats: int = 3, out: str | None = None) -> None:
    logging.disable()
    theirs = bridge_first_fit_decreasing()
    million, ten_million = lengths(1_000_000), lengths(10_000_000)
    as_list = million.tolist()
    first_call, _ = timed(pack, [1, 2, 3], 4)  # imports Numba and loads (the first time ever: compiles) the code

    seconds = {"bridge": [], "ours": [], "ours_10m": []}
    for _ in range(repeats):
        for name, function, data in (("bridge", theirs, as_list), ("ours", pack, million)):
            took, result = timed(function, data, PACK_SIZE)
            seconds[name].append(took)
            if name == "bridge":
                bridge_bins = len(result)
                del result
            else:
                bins = int(result.max()) + 1
        took, result = timed(pack, ten_million, PACK_SIZE)
        seconds["ours_10m"].append(took)
        bins_10m = int(result.max()) + 1

    median = {name: statistics.median(values) for name, values in seconds.items()}
    entries = []
    for name, label, data, count in (
        ("bridge", "Megatron-Bridge first_fit_decreasing", million, bridge_bins),
        ("ours", "nemotron_sft.data.packing.pack", million, bins),
        ("ours_10m", "nemotron_sft.data.packing.pack", ten_million, bins_10m),
    ):
        tokens = int(data.sum(dtype=np.int64))
        entries.append(
            {
                "what": label,
                "sequences": len(data),
                "median_seconds": round(median[name], 4),
                "seconds": [round(s, 4) for s in seconds[name]],
                "bins": count,
                "lower_bound": -(-tokens // PACK_SIZE),
                "fill": round(tokens / (count * PACK_SIZE), 6),
            }
        )
    report = {
        "pack_size": PACK_SIZE, "runs": entries, "times_faster": round(median["bridge"] / median["ours"], 1),
        "first_call_seconds": round(first_call, 2),
    }  # fmt: skip
    table(
        f"Packing to {PACK_SIZE} tokens, median of {repeats}",
        ["", "sequences", "seconds", "bins", "lower bound", "fill"],
        [
            (e["what"], f"{e['sequences']:,}", f"{e['median_seconds']:.3f}", f"{e['bins']:,}",
             f"{e['lower_bound']:,}", f"{e['fill']:.4%}")
            for e in entries
        ],
    )  # fmt: skip
    print(f"{report['times_faster']:.0f} times as fast; first call in the process: {first_call:.2f} s")
    text = json.dumps(report, indent=2)
    if out:
        Path(out).write_text(text + "\n")
    else:
        print(text)
    assert bins <= bridge_bins, "more bins than Megatron-Bridge"


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(int(options.get("repeats", 3)), options.get("out"))
