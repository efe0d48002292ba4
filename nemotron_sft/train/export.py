"""A trained checkpoint as a Hugging Face directory: read, translated, written and compared a few weights at a time.

No model is built for it, on a GPU or elsewhere, and under torchrun every process writes its own share of the files.
The directory appears under its name only when all of it is there and has been checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_sft.data.packed import read_metadata
from nemotron_sft.errors import UserError
from nemotron_sft.files import write_json
from nemotron_sft.train import adapter_files, checkpoints, handover, hf, peft
from nemotron_sft.train.checkpoints import is_hf, newest_iteration
from nemotron_sft.train.logits import compare
from nemotron_sft.train.memory import free_memory
from nemotron_sft.train.start import log_to_file, start_bridge, this_machine
from nemotron_sft.train.weights import EMBEDDING, HEAD, AdaptedReader, CheckpointReader, HuggingFaceReader, Skeleton

MARK = "export.json"  # what was exported and how it was checked; only a directory that has it is ever replaced


@dataclass
class Export:
    """What an export left: its directory, how it was checked, and where it differs from the base model."""

    path: Path
    files: dict[str, str] = field(default_factory=dict)  # weight -> file
    bytes: int = 0
    logits: str = ""  # how far they are from Megatron's, or why that was not looked at
    told: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        checked = f"{len(self.files)} weights ({self.bytes / 2**20:,.1f} MiB) read back, equal to the checkpoint's"
        return "\n".join([f"exported {self.path}  {checked}; {self.logits}", *(f"  {line}" for line in self.told)])


@dataclass
class _Job:
    """What is exported: the run, one of its checkpoints, and the files beside the weights."""

    run_dir: Path
    path: Path
    iteration: Path
    source: str | None  # directory or hub id of the architecture; None: the model's own settings describe it
    data_dir: Path
    metadata: dict

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def base(self) -> Path | None:
        """The directory of the model that training started from, as far as it is on this machine."""
        return hf.local_directory(self.source) if self.source else None


def export_run(run_dir: Path | str, path: Path | str | None = None) -> None:
    """Write the newest checkpoint of a finished run as a Hugging Face directory and print how it was checked.

    path: where to; None: RUN_DIR/hf. Under torchrun every process writes a share. Raises UserError as `export` does.
    """
    run_dir, rank = Path(run_dir), this_machine().rank
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml")
    with log_to_file(run_dir / "logs" / (f"export-rank{rank}.log" if rank else "export.log")):
        start_bridge()
        result = export(run_dir, path)
    if result:
        print(result)


def export(run_dir: Path, path: Path | str | None) -> Export | None:
    """Write a run's newest checkpoint as a Hugging Face directory: config, tokenizer, chat template, safetensors.

    All processes of torchrun call this together; the first returns the result, the others None. Raises UserError
    when the run has no checkpoint or no Hugging Face architecture, or something read back differs.
    """
    job = _job(run_dir, path)
    first = not this_machine().rank
    with _directory(job) if first else contextlib.nullcontext():
        with checkpoints.together() as (rank, world_size):
            result = _agreed(lambda: _write_weights(job, rank, world_size))
        if not first:
            return None
        _write_index(job, result)
        result.told += handover.write(job.partial, job.metadata, job.data_dir, job.base)
        _check_names(job.partial)
        result.logits = _compare_if_it_fits(job, result.bytes)
        write_json(job.partial / MARK, {"checkpoint": str(job.iteration), "checks": str(result).splitlines()})
    return result


def _job(run_dir: Path, path: Path | str | None) -> _Job:
    iteration = newest_iteration(run_dir / "checkpoints")
    if iteration is None:
        raise UserError(f"{run_dir} has no checkpoint to export")
    config = OmegaConf.load(run_dir / "config.yaml")
    from_hub = config.init_from.count("/") == 1 and not Path(config.init_from).exists()
    source = config.init_from if from_hub or is_hf(config.init_from) else config.model.hf
    if source and source.count("/") != 1 and not Path(source).exists():  # a hub id has one
        raise UserError(f"{source}, the model that {run_dir} started from, is not there any more: put it back")
    data_dir = Path(config.data.path)
    path = Path(path or run_dir / "hf")
    return _Job(run_dir, path, iteration, source, data_dir, read_metadata(data_dir))


# --- the directory ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _directory(job: _Job) -> Iterator[None]:
    """Make job.partial, and put it in the place of job.path when the block ends well.

    Killed in between, it leaves job.partial, which the next export clears away. Raises UserError where job.path is
    something else than an export, or is being written.
    """
    old = job.path.with_name(f".{job.path.name}.old")
    if old.exists() and not job.path.exists():
        old.rename(job.path)  # killed between the two renames below
    shutil.rmtree(old, ignore_errors=True)
    if job.path.exists() and not (job.path / MARK).exists() and (job.path.is_file() or any(job.path.iterdir())):
        raise UserError(f"{job.path} exists and is not an export (no {MARK} in it): name another directory")
    job.partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(job.partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{job.path} is being written by another process: wait for it or end it") from None
    try:
        for left in job.partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
        if job.path.exists():
            job.path.rename(old)
        job.partial.rename(job.path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(job.partial, ignore_errors=True)
        os.close(lock)


def _agreed(work: Callable[[], Export]) -> Export:
    """Do this process's share of the work and add up all shares. If one fails with a UserError, all do."""
    import torch.distributed as dist

    dist.barrier()  # the directory is there
    try:
        mine: Export | UserError = work()
    except UserError as error:
        mine = error
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, UserError):
            raise share
    files = {name: file for share in shares for name, file in share.files.items()}
    return dataclasses.replace(mine, files=files, bytes=sum(share.bytes for share in shares))


# --- weights ----------------------------------------------------------------------------------------------


def _write_weights(job: _Job, rank: int, world_size: int) -> Export:
    """This process's share of the safetensors, each read back and compared; the first also writes config and index."""
    import torch
    from safetensors.torch import save_file

    skeleton, config, reader, adapters = _opened(job)
    groups, untied = skeleton.groups(), skeleton.tied and not config.tie_word_embeddings
    result = Export(job.path)
    for number, group in list(enumerate(groups, 1))[rank::world_size]:
        name = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        with torch.no_grad():
            weights = reader.read(group.names)
            named = {key: tensor.contiguous() for key, tensor in skeleton.to_hf(group, weights).items()}
            if untied and EMBEDDING in weights:
                named[HEAD] = weights[EMBEDDING].clone()
            save_file(named, job.partial / name, metadata={"format": "pt"})
            result.bytes += sum(tensor.nbytes for tensor in named.values())
            result.files |= dict.fromkeys(named, name)
            del named
            skeleton.check_back(group, weights, _read_back(job.partial / name))
            del weights  # before the next group is read
    if rank == 0:
        config.save_pretrained(job.partial)
        if adapters:
            base = str(job.source or checkpoints.base_of(checkpoints.run_of(job.iteration)))
            result.told += adapter_files.write(job.partial / "adapter", skeleton, reader, adapters, base)
    return result


def _opened(job: _Job) -> tuple[Skeleton, Any, Any, Any]:
    """The model without memory, its transformers config, the reader of its weights, and Bridge's adapters or None."""
    run = checkpoints.run_of(job.iteration)
    provider = checkpoints.provider_of(job.iteration)
    translator, config = hf.export_config(job.source, provider)
    adapters = peft.restored(run["peft"]) if run.get("peft") else None
    skeleton = Skeleton(provider, translator, config, adapters)
    reader: Any = CheckpointReader(skeleton.model, job.iteration)
    if adapters:
        base = checkpoints.base_of(run)
        theirs = HuggingFaceReader(skeleton, base) if is_hf(str(base)) else CheckpointReader(skeleton.model, base)
        reader = AdaptedReader(skeleton, theirs, reader)
    config.dtype = reader.dtype
    return skeleton, config, reader, adapters


def _read_back(file: Path) -> dict[str, Any]:
    """The weights of a safetensors file, from the disk where the system lets go of its copy in memory."""
    from safetensors.torch import load_file

    file.chmod(0o666 & ~_umask())  # safetensors makes files for their owner alone
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return load_file(file)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_index(job: _Job, result: Export) -> None:
    if len(set(result.files.values())) > 1:
        index = {"metadata": {"total_size": result.bytes}, "weight_map": dict(sorted(result.files.items()))}
        write_json(job.partial / "model.safetensors.index.json", index)


# --- checks -----------------------------------------------------------------------------------------------


def _check_names(directory: Path) -> None:
    """Have transformers load an export without memory: it must find every weight it wants, and want every one."""
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(directory, device_map="meta", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UserError(f"not exported: transformers reports {kind.replace('_', ' ')}: {', '.join(names[:3])}")


def _compare_if_it_fits(job: _Job, size: int) -> str:
    """Compare logits where one model at a time fits into memory. Returns a line; raises UserError if they differ."""
    needed, room = 1.2 * size * (2 if this_machine().on_cpu else 1) + (1 << 29), free_memory()
    if needed > room:
        return f"logits not compared: that takes {needed / 2**30:.1f} GiB of memory, {room / 2**30:.1f} are free"
    result = compare(job.iteration, job.partial, job.data_dir)
    if not result.equal:
        raise UserError(f"not exported: its logits differ: {result}")
    return str(result)
