"""Whether these settings can go on with what is on disk: a run's own checkpoints, or those that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_sft.errors import UserError
from nemotron_sft.record import lineage
from nemotron_sft.train.checkpoints import is_hf, newest_checkpoint, newest_iteration, run_of, step_of

# Fields of Bridge's model providers that the shapes of weights, or what is computed with them, depend on.
MODEL = (
    "hybrid_layer_pattern", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "num_moe_experts",
    "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_num_layers", "vocab_size",
    "share_embeddings_and_output_weights", "normalization", "qk_layernorm", "gated_linear_unit", "add_bias_linear",
    "add_qkv_bias", "position_embedding_type",
)  # fmt: skip
# Context parallelism counts as data parallelism here.
DIVISION = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip
ADAPTERS = ("dim", "alpha", "target_modules", "exclude_modules")  # of Bridge's LoRA and DoRA


def check(container: Any, run_dir: Path, data_dir: Path, metadata: dict) -> None:
    """Raise UserError, one line, where the container's settings do not fit the checkpoints that would be loaded.

    The data must be that of the run's earlier steps; steps, model and adapters those of its newest checkpoint. A run
    that starts from another run's Megatron checkpoint needs that one's model.
    """
    own = newest_iteration(run_dir / "checkpoints")
    if container.checkpoint.load:
        check_load(Path(container.checkpoint.load))
    if own:
        check_steps(step_of(own), container.train.train_iters, run_dir)
        check_data(run_dir, data_dir, metadata)
    start = container.checkpoint.pretrained_checkpoint
    for path in (container.checkpoint.load, start):
        if path and not is_hf(path):
            saved = run_of(newest_checkpoint(Path(path))) if _has_config(Path(path)) else {}
            check_model(container.model, saved.get("model") or {}, path)
            if path == container.checkpoint.load:
                check_order(container, saved, path, bool(own))
                check_division(container, saved, path)
            if own and path == container.checkpoint.load:
                check_adapters(container.peft, saved.get("peft"), path)
                check_base(start, saved, run_dir)


def check_run_dir(run_dir: Path) -> None:
    """Raise UserError for a directory that is something else, whose files a run would overwrite."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir} is a file: name a directory, new or of a run that is to go on")
    if (run_dir / "metadata.json").exists():
        raise UserError(f"run_dir={run_dir} holds prepared data, which a run would overwrite: name another")
    if is_hf(str(run_dir)):
        raise UserError(f"run_dir={run_dir} holds a Hugging Face model: name another, and give this as init_from")


def check_load(path: Path) -> None:
    """Raise UserError where checkpoint.load holds no checkpoint: Bridge would say so late, or start without one."""
    inside = ("run_config.yaml", ".metadata", "config.json")  # of Bridge's, Megatron-LM's, Hugging Face's
    if not newest_iteration(path) and not any((path / name).exists() for name in inside):
        raise UserError(f"checkpoint.load={path} holds no checkpoint: name the checkpoints/ of a run, or one of them")


def _has_config(path: Path) -> bool:
    """Whether Bridge wrote the checkpoint; Megatron-LM's do not say what model they are of."""
    return (newest_checkpoint(path) / "run_config.yaml").exists()


def check_steps(done: int, wanted: int, run_dir: Path) -> None:
    """A run can be finished again, or be made longer, not shorter."""
    if done > wanted:
        raise UserError(
            f"{run_dir} was trained for {done} steps already, more than train.train_iters={wanted}: ask for {done} or "
            "more, or for another run_dir"
        )


def check_order(container: Any, saved: dict, path: str, same_run: bool) -> None:
    """A step's packs are found by how many were read before, so steps must stay of one size, and in one order.

    With others, packs of the epoch would be read twice or not at all, and the learning rate, whose schedule counts
    packs, would be that of another step.
    """
    keys = [("train.global_batch_size", "train", "global_batch_size"), ("seed", "rng", "seed")]
    for name, section, key in keys if same_run else keys[:1]:
        then, now = (saved.get(section) or {}).get(key), getattr(getattr(container, section), key)
        if then is not None and then != now:
            raise UserError(
                f"{path} was trained with {name}={then}, not {now}: set it to {then}, or start another run with "
                f"init_from={path}"
            )


def check_data(run_dir: Path, data_dir: Path, metadata: dict) -> None:
    """The data must be what the run was trained on so far, by content, wherever it lies now."""
    earlier = lineage.read(run_dir) or {"inputs": []}
    then = next((entry["digest"] for entry in earlier["inputs"] if entry["artifact"] == lineage.DATA), None)
    now = lineage.of_data(data_dir, metadata)["digest"]
    if then and now and then != now:
        raise UserError(
            f"the data in {data_dir} is not what {run_dir} was trained on so far (digest {then[:12]} then, {now[:12]} "
            f"now): give the data of then, or start another run with init_from={run_dir}"
        )


def check_model(model: Any, saved: dict, path: str) -> None:
    """The model must be that of the checkpoint; how it is divided over processes may differ."""
    for name in MODEL:
        then, now = saved.get(name), getattr(model, name, None)
        if name == "hybrid_layer_pattern":
            then, now = ((each or "").replace("|", "") or None for each in (then, now))
        if None not in (then, now) and str(then) != str(now):
            raise UserError(f"{path} is of a model with {name}={then}, but model.{name}={now}: set it to {then}")


def check_division(container: Any, saved: dict, path: str) -> None:
    """Whether the optimizer's part of a checkpoint can be divided as asked now. Raises UserError if not.

    Core's distributed optimizer saves its buffers as they lie in memory: another number of data-parallel ranks can
    read them, another division of the model cannot, unless they were saved by weight ("fully reshardable").
    """
    then, now = saved.get("model") or {}, container.model
    checkpoint, optimizer = saved.get("checkpoint") or {}, saved.get("optimizer") or {}
    if checkpoint.get("dist_ckpt_optim_fully_reshardable") or not optimizer.get("use_distributed_optimizer"):
        return
    if not (container.checkpoint.load_optim and checkpoint.get("save_optim", True)):
        return
    for name in DIVISION:
        if (then.get(name) or 1) != (getattr(now, name, None) or 1):
            raise UserError(
                f"{path} was saved with model.{name}={then.get(name)}, and its optimizer can only go on so: set it to "
                f"that, or save with checkpoint.dist_ckpt_optim_fully_reshardable=true before (docs/checkpoints.md)"
            )


def check_adapters(peft: Any, saved: dict | None, path: str) -> None:
    """A run goes on with the adapters that it has, or without any if it had none."""
    kind = type(peft).__name__ if peft else "none"
    then = str((saved or {}).get("_target_", "none")).rpartition(".")[2]
    if kind != then:
        raise UserError(f"{path} was trained with peft {then.lower()}, not {kind.lower()}: ask for another run_dir")
    for name in ADAPTERS if peft else ():
        then, now = saved.get(name), getattr(peft, name, None)
        if (then or None) != (now or None):
            raise UserError(
                f"{path} holds adapters with {name}={then}, but peft.{name}={now}: set it to {then}, or ask for "
                "another run_dir"
            )


def check_base(base: str | None, saved: dict, run_dir: Path) -> None:
    """Adapters belong to the model that they were trained for: it may have moved, but not changed."""
    then = saved.get("checkpoint", {}).get("pretrained_checkpoint")
    if not (base and then) or Path(base).resolve() == Path(then).resolve():
        return
    earlier = lineage.read(run_dir) or {"inputs": []}
    files = next((entry["files"] for entry in earlier["inputs"] if entry["artifact"] != lineage.DATA), [])
    known = {(file["name"], file["bytes"]) for file in files}
    root = newest_checkpoint(Path(base))
    if known != {(path.relative_to(root).as_posix(), path.stat().st_size) for path in lineage.inside(root)}:
        raise UserError(
            f"the adapters in {run_dir} were trained for {then}; {base} is another model: set init_from to {then}, "
            "or to where it is now"
        )
