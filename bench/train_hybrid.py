"""Training speed of Nemotron 3 Nano on one GPU: this repository, Megatron-Bridge, transformers, and nemo-automodel.

    python bench/train_hybrid.py --out output/bench-hybrid               everything, then a table and results.json
    python bench/train_hybrid.py --out output/bench-hybrid --only ours bridge

A slice of the model, with its real widths and vocabulary (MEM*ME, 3.44 billion parameters, random weights), trains all
parameters in bf16 on packs of 4096 tokens, 32,768 tokens per step (or --step-packs of them), with the documents of
bench/train_gpu.py. Cases, and how they are timed and counted, are as there; MFU counts the FLOPs of
nemotron/__init__.py.

  ours[-R][-gpu]        recipes/train.py's path, rows of R tokens (without R: as the product chooses them)
  ours-lora[-R]         adapters on the whole model, all 52 layers, activations computed again
  bridge                Megatron-Bridge's nemotron_3_nano_sft_config as it comes
  transformers-master   NemotronHForCausalLM, fp32 master weights; every number of packs in a forward pass
  transformers-bf16     the same with weights and moments in bf16 alone; add -compiled for torch.compile
  automodel             nemo-automodel's own model (if installed), fp32 master weights, documents kept apart
  automodel-rows        the same with packs as rows of a batch, as transformers has them; where a kernel fails, add
                        -plain for PyTorch's cross entropy, -torch for its linear layers and norms, -sdpa (with rows)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from common import cases, table
from common.packs import make_data
from nemotron import HIDDEN, PACK, VOCABULARY, flops_per_token

WHOLE = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def contestant(args: argparse.Namespace) -> Iterator[dict]:
    """The generator of the case that --name names; its module is imported here, with all that it needs."""
    kind, *details = args.name.split("-")
    if kind == "ours":
        from nemotron.ours import ours

        row = next((int(part) for part in details if part.isdigit()), 0)
        return ours(args, row, "gpu" in details, "lora" in details)
    if kind == "bridge":
        from nemotron.bridge import bridge

        return bridge(args)
    if kind == "automodel":
        from nemotron.automodel import automodel

        return automodel(args, details)
    from nemotron.hugging_face import hugging_face

    return hugging_face(args, "master" in details, "compiled" in details)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help="cases to run")
    parser.add_argument("--rows", type=int, nargs="*", default=(8192, 16384, 32768), help="rows of the peers")
    parser.add_argument("--step-packs", type=int, default=8, metavar="N", help="packs of an optimizer step (8)")
    parser.add_argument("--warm-up", type=int, help="steps before the timed ones (4 for most cases)")
    parser.add_argument("--steps", type=int, help="timed steps (10 for most cases)")
    parser.add_argument("--profiled", type=int, default=0, help="steps to profile after the timed ones")
    parser.add_argument("--segments", nargs="*", help="settings to switch on one after another")
    parser.add_argument("--set", nargs="*", help="overrides of the config, ours only")
    parser.add_argument("--experts", type=int, default=1, help="ranks that share the experts, under torchrun")
    parser.add_argument("--processes", type=int, default=1, help="ranks that share the batch, under torchrun")
    parser.add_argument("--packs", type=int, default=256)
    parser.add_argument("--kernels", type=int, default=14)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.data = (args.data or args.out / "data").resolve()
    if args.name:
        args.warm_up, args.steps = args.warm_up or 4, args.steps or 10
    return args


def main() -> None:
    """Run the cases one after another, or the one that --name names."""
    args = options()
    if args.name:
        return cases.run_case(contestant(args), args.name, args.out)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    facts = make_data(args.data, args.packs, PACK, VOCABULARY)
    print(facts, flush=True)
    plan = [(name, given) for name, given in full_plan() if not args.only or name in args.only]
    plan += [(name, []) for name in args.only or () if name not in dict(full_plan())]
    for name, given in plan:  # one after the other: their imports would share the GPU's memory
        extra = ["--step-packs", str(args.step_packs), "--rows", *map(str, args.rows)]
        for option in ("warm_up", "steps", "profiled"):
            value = getattr(args, option)
            extra += [f"--{option.replace('_', '-')}", str(value)] if value else []
        extra += ["--set", *args.set] if args.set else []
        process = cases.start(__file__, name, args.out, ["--data", str(args.data), *given, *extra])
        cases.take_turn(name, process, args.out)
    report(args, facts)


def report(args: argparse.Namespace, facts: dict) -> None:
    """The table, the profiles, and results.json."""
    results = dict(cases.results(args.out))
    context, tokens = facts["effective_context"], PACK * args.step_packs

    def flops(part: dict) -> float:
        whole = flops_per_token(context, WHOLE, frozen=True) if part.get("lora") else flops_per_token(context)
        untrained = 6 * HIDDEN * VOCABULARY / 3  # the others, too, leave their logits out
        return tokens * (whole - part.get("skipped_flops", untrained))

    rows = table.rows_of(results.items(), tokens, flops)
    profiles = {name: part["profile"] for name, part in results.items() if "profile" in part}
    table.print_rows(rows)
    table.print_profiles(profiles, args.kernels)
    (args.out / "results.json").write_text(json.dumps({"facts": facts, "cases": rows, "profiles": profiles}, indent=1))


def full_plan() -> list[tuple[str, list[str]]]:
    """About eight minutes on one H100, without the first run's autotuning and without nemo-automodel."""
    installed = importlib.util.find_spec("nemo_automodel")
    return [
        ("ours", ["--profiled", "3", "--steps", "20"]),
        ("ours-gpu", ["--steps", "20"]),
        ("bridge", ["--warm-up", "2", "--steps", "6"]),
        ("transformers-master", []),
        ("transformers-bf16", []),
        *([("automodel", []), ("automodel-rows", [])] if installed else []),
        ("ours-lora", ["--warm-up", "2", "--steps", "4"]),
    ]


if __name__ == "__main__":
    main()
