"""Training speed on one GPU: this repository, Megatron-Bridge's own path, and transformers, on the same tokens.

    python bench/train_gpu.py --out output/bench            everything, then a table and results.json
    python bench/train_gpu.py --out output/bench --only ours-32768 transformers

A dense model of 1.107 billion parameters (conf/model/dense_1b.yaml) with random weights trains in bf16 with fp32
master weights on packs of 4096 tokens, 32,768 tokens per step. Document lengths are log-normal, so that a token sees
about 960 tokens of context (sum of squared lengths over sum of lengths). Each case runs in a process of its own, one
at a time; imports happen before the first of them starts. Times are medians of CUDA-event intervals between the ends
of steps. MFU counts 6 FLOPs per parameter of a matrix product and token plus causal attention inside documents,
against 989 TFLOP/s; what is not computed, since its tokens have no loss, is not counted.

  ours-R         recipes/train.py's path with rows of R tokens
  ours-R-gpu     the same with batches already in GPU memory: what the loader could cost at most
  bridge         Megatron-Bridge 0.6.2 as its recipes' _sft_common sets it, over packed Parquet
  transformers   LlamaForCausalLM, varlen attention, torch.compile, fused AdamW, autocast; every row length
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from common import cases, table
from common.packs import make_data
from dense import PACK, STEP_PACKS, VOCABULARY, flops_per_step

ROWS = (4096, 8192, 16384, 32768)


def contestant(args: argparse.Namespace) -> Iterator[dict]:
    """The generator of the case that --name names; its module is imported here, with all that it needs."""
    kind, *details = args.name.split("-")
    if kind == "ours":
        from dense.ours import ours

        return ours(args, int(details[0]), "gpu" in details[1:])
    if kind == "bridge":
        from dense.bridge import bridge

        return bridge(args)
    from dense.hugging_face import hugging_face

    return hugging_face(args)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help="cases to run")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profiled", type=int, default=3, help="steps to profile after the timed ones")
    parser.add_argument("--segments", nargs="*", help="settings to switch on one after another")
    parser.add_argument("--set", nargs="*", help="overrides of the config, ours only")
    parser.add_argument("--size", default="{}", help="JSON: fields of the model, the others only")
    parser.add_argument("--packages", type=Path, help="where transformers is looked for: newer than Bridge allows")
    parser.add_argument("--packs", type=int, default=1024)
    parser.add_argument("--kernels", type=int, default=12)
    parser.add_argument("--plan", type=Path, help="JSON: a list of [name, [options]] instead of the full run")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.data = (args.data or args.out / "data").resolve()
    return args


def main() -> None:
    """Run the cases one after another, or the one that --name names."""
    args = options()
    if args.name:
        return cases.run_case(contestant(args), args.name, args.out)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    facts = make_data(args.data, args.packs, PACK, VOCABULARY)
    print(facts, flush=True)
    plan = json.loads(args.plan.read_text()) if args.plan else full_plan()
    processes = []
    for name, given in plan:
        if not args.only or name in args.only:
            packages = args.packages if name.startswith("transformers") else None
            given = ["--data", str(args.data), *given]
            processes.append((name, cases.start(__file__, name, args.out, given, packages)))
    for name, process in processes:
        cases.take_turn(name, process, args.out)
    results = dict(cases.results(args.out))
    whole = flops_per_step(facts["effective_context"])
    rows = table.rows_of(results.items(), PACK * STEP_PACKS, lambda part: whole - part.get("skipped_flops", 0.0))
    profiles = {name: part["profile"] for name, part in results.items() if "profile" in part}
    table.print_rows(rows)
    table.print_profiles(profiles, args.kernels)
    written = {"facts": facts, "cases": rows, "profiles": profiles}
    (args.out / "results.json").write_text(json.dumps(written, indent=1))


def full_plan() -> list[tuple[str, list[str]]]:
    """Nearly ten minutes on one H200, half of it torch.compile for the four row lengths of transformers."""
    plain = ["--warm-up", "8", "--profiled", "0"]
    return [
        *((f"ours-{row}", plain) for row in ROWS[:-1]),
        (f"ours-{ROWS[-1]}", ["--warm-up", "8", "--steps", "40"]),
        (f"ours-{ROWS[-1]}-gpu", [*plain, "--steps", "40"]),
        ("bridge", ["--warm-up", "3", "--steps", "10", "--profiled", "0"]),
        ("transformers", ["--warm-up", "4", "--profiled", "0"]),
    ]


if __name__ == "__main__":
    main()
