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
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACK, STEP_PACKS, VOCABULARY, PEAK = 4096, 8, 32768, 989e12
ROWS = (4096, 8192, 16384, 32768)
LAYERS, HIDDEN, FFN, HEADS, GROUPS = 16, 2048, 8192, 32, 8


# --- data ------------------------------------------------------------------------------------------------


def make_data(out: Path, packs: int) -> dict:
    """Packs of random tokens in both formats, as recipes/prep.py writes them. Returns facts about the lengths."""
    from nemotron_sft.data.packed import FORMAT, VERSION, pack_dtype, write_metadata, write_packs
    from nemotron_sft.data.packing import pack

    rng = np.random.default_rng(0)
    documents = 16 * packs
    lengths = np.clip(rng.lognormal(np.log(300), 0.9, documents), 16, PACK).astype(int)
    bins = pack(lengths, PACK)
    records = np.zeros(packs, pack_dtype(PACK, int(np.bincount(bins).max())))
    for number, record in enumerate(records):
        ends = np.concatenate([[0], np.cumsum(lengths[bins == number])])
        record["cu_seqlens"] = ends[-1]
        record["cu_seqlens"][: len(ends)] = ends
        record["input_ids"][: ends[-1]] = tokens(rng, ends[-1])
        for start, end in itertools.pairwise(ends):
            record["loss_mask"][start + (end - start) // 3 : end] = 1
    out.mkdir(parents=True, exist_ok=True)
    empty = {"packs": 0, "sequences": 0, "tokens": 0, "trained_tokens": 0, "fill": 0, "file": None}
    training = write_packs(out / "training.npy", [records], packs)
    write_packs(out / "training.idx.parquet", [records], packs)
    write_metadata(
        out,
        {
            "format": FORMAT,
            "version": VERSION,
            "format_on_disk": "npy",
            "pack_size": PACK,
            "sample": None,
            "tokenizer": {"model": "random", "vocab_size": VOCABULARY},
            "template": {"name": "none"},
            "splits": {"training": training, "validation": empty, "test": empty},
        },
    )
    used = np.diff(records["cu_seqlens"])
    return {
        "packs": packs,
        "documents": training["sequences"],
        "fill": training["fill"],
        "effective_context": float((used.astype(float) ** 2).sum() / used.sum()),
    }


def tokens(rng, count: int) -> np.ndarray:
    """Something to learn: frequent and rare tokens, half of them a function of the token before."""
    drawn = (VOCABULARY * rng.random(count) ** 3).astype(int)
    follows = np.roll(drawn, 1) * 7919 % VOCABULARY
    return np.where(rng.random(count) < 0.5, follows, drawn)


def flops_per_step(effective_context: float) -> float:
    """6 FLOPs per matrix parameter and token, and causal attention: 2 products, half of them masked, 3 passes."""
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * GROUPS // HEADS
    matrices = LAYERS * (attention + 3 * HIDDEN * FFN) + HIDDEN * VOCABULARY
    return PACK * STEP_PACKS * (6 * matrices + 6 * LAYERS * HIDDEN * effective_context)


# --- timing ----------------------------------------------------------------------------------------------


class HostEvent:
    """Stands in for a CUDA event when the script itself is tried on a CPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return 1000 * (end.time - self.time)


class Clock:
    """Ends of steps, on the GPU's clock and the host's, and what the host did between them."""

    def __init__(self, segments: list[str], warm_up: int, steps: int, profiled: int):
        """Each segment (a named setting) has warm_up + steps steps; profiled ones follow the last."""
        self.segments, self.warm_up, self.steps, self.profiled = segments, warm_up, steps, profiled
        self.events, self.host, self.losses = [], [], []
        self.profile = None
        self.memory = 0

    @property
    def total(self) -> int:
        return len(self.segments) * (self.warm_up + self.steps) + (self.profiled + 2 if self.profiled else 0)

    def tick(self, **parts: float) -> str | None:
        """A step has ended; parts are host seconds. Returns the name of the segment that begins now, if one does."""
        import torch

        event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else HostEvent()
        event.record()
        self.events.append(event)
        self.host.append(parts)
        done, length = len(self.events), self.warm_up + self.steps
        if done == length * len(self.segments) and torch.cuda.is_available():
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated()
        if self.profiled and done == length * len(self.segments) + 1:
            self.profile = torch.profiler.profile()
            self.profile.start()
        if self.profile and done == length * len(self.segments) + 1 + self.profiled:
            torch.cuda.synchronize()
            self.profile.stop()
        if done % length == 0 and done // length < len(self.segments):
            return self.segments[done // length]
        return None

    def results(self) -> dict:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        length = self.warm_up + self.steps
        found = {}
        for number, name in enumerate(self.segments):
            first = number * length + self.warm_up
            window = range(first, first + self.steps)
            times = [self.events[i - 1].elapsed_time(self.events[i]) for i in window]
            parts = {key: statistics.median(1000 * self.host[i][key] for i in window) for key in self.host[first]}
            found[name] = {
                "ms": statistics.median(times),
                "mean_ms": statistics.fmean(times),
                "fastest_ms": min(times),
                "slowest_ms": max(times),
                "steps": self.steps,
                "host_ms": parts,
            }
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        result = {"segments": found, "peak_gib": self.memory / 2**30, "gpu": name}
        if self.profile:
            result["profile"] = summarise(self.profile, self.profiled)
        return result


KINDS = (
    ("communication", r"nccl"),
    ("optimizer", r"multi_tensor|adam|l2norm|lpnorm"),
    ("attention", r"sdpa|flash|fmha|mha_"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitk"),
    ("copies and fills", r"memcpy|memset|fillfunctor|direct_copy|copy_kernel"),
)
SYNCHRONISE = re.compile(r"cuda(Stream|Event|Device)Synchronize|cudaMemcpy$")


def summarise(profile, steps: int) -> dict:
    """GPU time by kind of kernel, the host's waiting and launching, and the busiest entries, all in ms per step."""
    kinds, kernels, launches, waiting, host = {}, {}, 0, 0.0, {}
    spans = []
    for event in profile.events():
        on_gpu = "cuda" in str(event.device_type).lower()
        milliseconds = event.time_range.elapsed_us() / 1000 / steps
        if on_gpu:
            if getattr(event, "is_user_annotation", False):
                continue
            name = event.name.lower()
            kind = next((kind for kind, pattern in KINDS if re.search(pattern, name)), "norms, activations, loss")
            kinds[kind] = kinds.get(kind, 0) + milliseconds
            count, spent = kernels.get(event.name[:90], (0, 0.0))
            kernels[event.name[:90]] = count + 1, spent + milliseconds
            spans.append((event.time_range.start, event.time_range.end))
        else:
            if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
                launches += 1
            if SYNCHRONISE.match(event.name):
                waiting += milliseconds
            if event.name.startswith("cuda") or event.name.startswith("cu"):
                host[event.name] = host.get(event.name, 0) + milliseconds
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    wall = (max(stop for _, stop in spans) - min(start for start, _ in spans)) / 1000 / steps
    top = sorted(kernels.items(), key=lambda item: -item[1][1])[:25]
    return {
        "steps": steps,
        "wall_ms": wall,
        "gpu_busy_ms": busy / 1000 / steps,
        "gpu_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "launches": launches / steps,
        "host_waits_for_gpu_ms": waiting,
        "host_ms": dict(sorted(host.items(), key=lambda item: -item[1])[:12]),
        "kernels": [[name, count / steps, spent] for name, (count, spent) in top],
    }


# --- cases -----------------------------------------------------------------------------------------------


class Observer:
    """Callbacks of Bridge's loop that feed a Clock: host seconds in forward + backward, optimizer, data, logging."""

    def __init__(self, clock: Clock, change=None):
        self.clock, self.change = clock, change
        self.parts = {}
        self.begin = self.logged = time.perf_counter()

    def register(self, manager) -> None:
        for event in ("on_train_start", "on_train_step_start", "on_train_step_end"):
            manager.register(event, getattr(self, event))

    def on_train_start(self, context) -> None:
        self.context = context
        step = context.optimizer.step

        def timed():
            start = time.perf_counter()
            result = step()
            self.optimizer = time.perf_counter() - start
            return result

        context.optimizer.step = timed

    def on_train_step_start(self, context) -> None:
        self.begin = time.perf_counter()

    def on_train_step_end(self, context) -> None:
        now = time.perf_counter()
        between = self.begin - self.logged
        parts = {
            "forward, backward": now - self.begin - self.optimizer - self.waited(),
            "waiting for data": self.waited(),
            "optimizer": self.optimizer,
            "between steps": between,
        }
        self.logged = now
        self.reset()
        begins = self.clock.tick(**parts)
        self.clock.losses.append(context.loss_dict["lm loss"])
        if begins:
            self.change(begins, self.context)


def prepare_megatron():
    """Import what a Megatron case needs, before its turn."""
    import torch

    if not torch.cuda.is_available():  # trying the script itself
        return
    from nemotron_sft.train.compat.gpu import use_gpu
    from nemotron_sft.train.compat.slim import slim_imports

    slim_imports()
    use_gpu()
    import megatron.bridge.recipes.common
    import megatron.bridge.training.finetune
    import megatron.bridge.training.gpt_step
    import megatron.bridge.training.pretrain  # noqa: F401


def ours(args, row: int, in_memory: bool) -> dict:
    prepare_megatron()
    yield
    from hydra import compose, initialize_config_dir

    from nemotron_sft.config import TrainConfig, check
    from nemotron_sft.train import progress, report, run, step

    clock = Clock(["", *(args.segments or [])], args.warm_up, args.steps, args.profiled)
    observer = Observer(clock, change=lambda name, context: change(name, context, observer.step))

    class Watched(progress.Progress):
        def register(self, manager):
            observer.waited = lambda: self.consumed.waited - observer.before
            observer.reset = lambda: setattr(observer, "before", self.consumed.waited)
            observer.before = observer.skipped = observer.tokens = 0.0
            observer.step = consumed = self.consumed
            reset = consumed.reset

            def forget():
                observer.skipped += consumed.skipped_flops
                observer.tokens += consumed.tokens
                reset()
                observer.reset()

            consumed.reset = forget
            observer.register(manager)
            super().register(manager)

    progress.Progress = Watched
    if in_memory:
        keep_in_memory(step)
    overrides = [
        "model=dense_1b",
        "tracking=disabled",
        "hydra/launcher=basic",
        "hydra/sweeper=basic",
        f"data.path={args.data}",
        f"run_dir={args.out}/runs/{args.name}",
        f"++train.train_iters={clock.total}",
        f"++train.packs_per_microbatch={row // PACK}",
        *(args.set or []),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", overrides)
    report.summarise = lambda *a: None
    run.train(check(composed, TrainConfig), composed)
    skipped = observer.skipped / observer.tokens * PACK * STEP_PACKS
    yield clock.results() | {"losses": [float(loss) for loss in clock.losses], "skipped_flops": skipped}


def keep_in_memory(step) -> None:
    """Serve the first 16 batches over and over from GPU memory."""
    held, original = [], step.ForwardStep._watch

    def watch(self, data_iterator):
        if len(held) < 16:
            batch = next(original(self, data_iterator))
            held.append({k: v.cuda() if hasattr(v, "cuda") and v.dim() else v for k, v in batch.items()})
            self._held = 0
            yield batch
            return
        self._held += 1
        batch = held[self._held % len(held)]
        counts = batch["counts"]
        self._tokens, self._squares = self._tokens + counts["tokens"], self._squares + counts["squares"]
        self.tokens, self.trained = self.tokens + counts["tokens"], self.trained + counts["trained"]
        self._positions = batch["trained_positions"]
        self.skipped_flops += self._flops_per_token * (counts["tokens"] - len(self._positions))
        yield batch

    step.ForwardStep._watch = watch


def change(name: str, context, step=None) -> None:
    """Switch a running Bridge job to a setting; settings add up. All of these are read anew in every step."""
    import gc

    config = context.state.cfg
    model = context.model[0].config if hasattr(context.model[0], "config") else config.model
    for target in (model, config.model):
        if name == "rope fusion":
            target.apply_rope_fusion = True
        if name.startswith("cross entropy "):
            target.cross_entropy_loss_fusion = name.split()[-1] != "unfused"
            if target.cross_entropy_loss_fusion:
                target.cross_entropy_fusion_impl = name.split()[-1]
        if name.startswith("wgrad fusion "):
            for module in context.model[0].modules():
                for attribute in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion"):
                    if hasattr(module, attribute):
                        setattr(module, attribute, name.endswith("on"))
    if name == "manual gc":
        gc.collect()
        gc.disable()
    if name == "no NaN check of the loss":
        config.rerun_state_machine.check_for_nan_in_loss = False
    if name == "no NaN check of gradients":
        for chunk in context.model:
            chunk.ddp_config.check_for_nan_in_grad = False
            for group in chunk.bucket_groups:
                group.ddp_config.check_for_nan_in_grad = False
    if name == "no metrics readback":
        config.logger.skip_train_metrics_log = True
        config.train.check_optimizer_step_success = False
        config.train.skip_sync_grad_norm_across_mp = True
    if name == "Bridge's logging":
        config.logger.skip_train_metrics_log = False
        config.train.check_optimizer_step_success = True
        config.train.skip_sync_grad_norm_across_mp = False
    if name == "no signal check":
        config.train.exit_signal_handler = False
    if name == "logits of every token":
        step.skip_untrained = False


def bridge(args) -> dict:
    """Megatron-Bridge as it comes: _sft_common, its own packed Parquet data set, its own forward step."""
    prepare_megatron()
    yield
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from nemotron_sft.train.compat.cpu import adapt
        from nemotron_sft.train.start import start_bridge

        start_bridge()
    from megatron.bridge.data.packing import PackedSequenceSpecs
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.recipes.common import _sft_common
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    NullTokenizer.eos_id = 0  # Bridge's data set pads with it
    clock = Clock(["", *(args.segments or [])], args.warm_up, args.steps, args.profiled)
    observer = Observer(clock, change=change)
    container = _sft_common()
    size = json.loads(os.environ.get("BENCH_MODEL", "{}"))
    container.model = GPTModelProvider(
        **{
            "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
            "num_query_groups": GROUPS, "normalization": "RMSNorm", "position_embedding_type": "rope",
            "rotary_base": 500000, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
            "share_embeddings_and_output_weights": False, "vocab_size": VOCABULARY, "seq_length": PACK,
            "gradient_accumulation_fusion": False,  # needs APEX in the output layer
        } | size
    )  # fmt: skip
    container.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1)
    data = container.dataset
    data.seq_length, data.dataset_root, data.do_validation, data.do_test = PACK, str(args.data), False, False
    data.hf_dataset = data.hf_validation_dataset = data.hf_test_dataset = None
    data.hf_output_root = data.hf_validation_proportion = None
    data.hf_rewrite = False
    data.offline_packing_specs = PackedSequenceSpecs(
        packed_sequence_size=PACK, packed_train_data_path=str(args.data / "training.idx.parquet"), pad_seq_to_mult=1
    )
    container.train.train_iters, container.train.global_batch_size = clock.total, STEP_PACKS
    container.validation.eval_iters = 0
    container.scheduler.lr_warmup_iters = 5
    container.checkpoint.save = container.checkpoint.load = None
    container.logger.tensorboard_dir = str(args.out / "runs" / args.name / "tensorboard")
    observer.waiting = 0.0
    observer.waited = lambda: observer.waiting
    observer.reset = lambda: setattr(observer, "waiting", 0.0)
    following = RerunDataIterator.__next__

    def timed(self):
        start = time.perf_counter()
        batch = following(self)
        observer.waiting += time.perf_counter() - start
        return batch

    RerunDataIterator.__next__ = timed
    if not on_gpu:
        adapt(container)
        data.num_workers, data.pin_memory, data.persistent_workers = 0, False, False
    callbacks = CallbackManager()
    observer.register(callbacks)
    pretrain(container, gpt_step.forward_step, callbacks=callbacks)
    yield clock.results() | {"losses": [float(loss) for loss in clock.losses]}


def hugging_face(args) -> dict:
    """transformers with what a careful user would set, for every row length in turn."""
    import torch
    import transformers
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    on_gpu = torch.cuda.is_available()

    def varlen(module, query, key, value, attention_mask, scaling=None, **options):
        query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embedding leaves them in fp32
        boundaries = options["cu_seq_lens_q"]
        if on_gpu:
            from torch.nn.attention.varlen import varlen_attn

            out = varlen_attn(query, key, value, boundaries, boundaries, PACK, PACK, scale=scaling, **causal)
        else:
            from nemotron_sft.train.compat.cpu import attend

            out = attend(query, key, value, boundaries, scaling)
        return out[None], None

    causal = {}
    if on_gpu:
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    AttentionInterface.register("varlen", varlen)
    yield
    from nemotron_sft.train.batches import PackedDataset, collate

    torch.set_float32_matmul_precision("high")
    size = {
        "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    } | json.loads(os.environ.get("BENCH_MODEL", "{}"))  # fmt: skip
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(
            LlamaConfig(**size, rope_theta=500000.0, tie_word_embeddings=False, attn_implementation="varlen")
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)

    def loss_of(tokens, positions, labels, boundaries):
        with torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16):
            logits = model(
                input_ids=tokens, position_ids=positions, use_cache=False,
                cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=PACK, max_length_k=PACK,
            ).logits  # fmt: skip
        return torch.nn.functional.cross_entropy(logits[0].float(), labels[0], ignore_index=-100, reduction="sum")

    compiled = torch.compile(loss_of, dynamic=False) if on_gpu else loss_of

    def collated(records):
        batch = collate(records)
        labels = torch.where(batch["loss_mask"] > 0, batch["labels"], -100)
        boundaries = batch["cu_seqlens_q"][0]
        return batch["tokens"], batch["position_ids"], labels, boundaries, batch["counts"]["trained"]

    found = {}
    for row in args.rows:
        packs = row // PACK
        clock = Clock([""], args.warm_up, args.steps, args.profiled if row == args.rows[-1] else 0)
        dataset = PackedDataset(args.data / "training.npy", clock.total * STEP_PACKS, seed=1234)
        dataset.collate_fn = collated
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=torch.utils.data.BatchSampler(range(len(dataset)), packs, drop_last=True),
            collate_fn=collated, num_workers=1, pin_memory=on_gpu, prefetch_factor=16,
        )  # fmt: skip
        batches = iter(loader)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(clock.total):
            step = [next(batches) for _ in range(STEP_PACKS // packs)]
            trained = sum(batch[-1] for batch in step)
            for *tensors, _ in step:
                tensors = [x.to("cuda" if on_gpu else "cpu", non_blocking=True) for x in tensors]
                torch._dynamo.mark_dynamic(tensors[-1], 0)  # every row has another number of documents
                loss = compiled(*tensors) / trained
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.tick(all=0.0)
            clock.losses.append(loss.detach())
        del batches, loader
        found[str(row)] = clock.results() | {"losses": [float(loss) for loss in clock.losses]}
        torch.cuda.empty_cache()
        result = {"rows": found, "transformers": transformers.__version__, "torch": torch.__version__}
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))  # in case time runs out
    yield result


# --- one process per case ----------------------------------------------------------------------------------


def child(args) -> None:
    """Import, say so, wait for the turn, run, write the result."""
    if args.name.startswith("ours"):
        work = ours(args, int(args.name.split("-")[1]), "gpu" in args.name.split("-")[2:])
    else:
        work = {"bridge": bridge, "transformers": hugging_face}[args.name.split("-")[0]](args)
    next(work)
    print("READY", flush=True)
    sys.stdin.readline()
    result = next(work)
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    sys.stdout.flush()
    os._exit(0)  # without waiting for the loader's workers


def start(name: str, args, options: list[str]) -> subprocess.Popen:
    log = (args.out / f"{name}.log").open("w")
    command = [sys.executable, __file__, "--name", name, "--out", str(args.out), "--data", str(args.data), *options]
    with socket.socket() as free:  # a port of its own, whatever else runs here
        free.bind(("127.0.0.1", 0))
        environment = os.environ | {"MASTER_PORT": str(free.getsockname()[1])}
    if name.startswith("transformers") and "BENCH_PLAIN" in os.environ:  # its own newest versions, not Bridge's caps
        environment = environment | {"PYTHONPATH": os.environ["BENCH_PLAIN"]}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
    )


def take_turn(name: str, process: subprocess.Popen, args) -> None:
    began = time.perf_counter()
    for line in process.stdout:
        if line.strip() == "READY":
            break
    waited = time.perf_counter() - began
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("go\n")
        process.stdin.flush()
    for _ in process.stdout:
        pass
    process.wait()
    took = time.perf_counter() - began
    print(f"{name}: {took:.0f} s ({waited:.0f} s of imports), exit {process.returncode}", flush=True)
    if process.returncode:
        print((args.out / f"{name}.log").read_text()[-3000:], flush=True)


def table(args, facts: dict) -> dict:
    """The results of every case found in --out: rows of ms, tokens/s, MFU, memory."""
    rows = {}

    def add(name, segment, peak, skipped):
        flops = flops_per_step(facts["effective_context"]) - skipped
        rows[name] = {
            "ms": segment["ms"],
            "tokens_per_second": PACK * STEP_PACKS / segment["ms"] * 1000,
            "mfu": flops / segment["ms"] * 1000 / PEAK,
            "peak_gib": peak,
        } | {key: segment[key] for key in ("mean_ms", "fastest_ms", "slowest_ms", "steps", "host_ms")}

    profiles = {}
    for path in sorted(args.out.glob("*.json")):
        if path.stem == "results":
            continue
        result = json.loads(path.read_text())
        for row, part in result.get("rows", {"": result}).items():
            for segment, values in part["segments"].items():
                add(
                    " ".join(filter(None, (path.stem, row, segment and f"+ {segment}"))),
                    values,
                    part["peak_gib"],
                    part.get("skipped_flops", 0.0),
                )
            if "profile" in part:
                profiles[f"{path.stem} {row}".strip()] = part["profile"]
    print(f"\n{'case':58} {'ms/step':>9} {'tok/s':>9} {'MFU':>7} {'peak GiB':>9}")
    for name, row in rows.items():
        print(
            f"{name:58} {row['ms']:9.1f} {row['tokens_per_second']:9,.0f} {row['mfu']:7.1%} {row['peak_gib']:9.1f}  "
            + "  ".join(f"{key} {value:.1f}" for key, value in row["host_ms"].items())
        )
    for name, profile in profiles.items():
        print(f"\n{name}: {json.dumps({k: v for k, v in profile.items() if k != 'kernels'}, default=float)}")
        for kernel, count, spent in profile["kernels"][: args.kernels]:
            print(f"   {spent:8.2f} ms {count:7.1f} x {kernel}")
    return {"facts": facts, "cases": rows, "profiles": profiles}


def main() -> None:
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
    parser.add_argument("--packs", type=int, default=1024)
    parser.add_argument("--kernels", type=int, default=12)
    parser.add_argument("--plan", type=Path, help="JSON: a list of [name, [options]] instead of the full run")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.data = (args.data or args.out / "data").resolve()
    if args.name:
        return child(args)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    facts = make_data(args.data, args.packs)
    print(facts, flush=True)
    plan = json.loads(args.plan.read_text()) if args.plan else full_plan()
    plan = [(name, options) for name, options in plan if not args.only or name in args.only]
    processes = [(name, start(name, args, options)) for name, options in plan]
    for name, process in processes:
        take_turn(name, process, args)
    results = table(args, facts)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))


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
