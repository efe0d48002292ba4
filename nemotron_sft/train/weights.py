"""A checkpoint's weights under their names in transformers, a few at a time: no process ever holds a whole model.

    skeleton = Skeleton(provider, bridge, config, adapters=None)     the Megatron model, without memory
    for group in skeleton.groups():                                  about GROUP numbers each
        weights = read(group)                                        {Megatron name: tensor} from a checkpoint
        named = skeleton.to_hf(group, weights)                       {transformers name: tensor}
        skeleton.check_back(group, weights, named)                   and back again: the same bits

Megatron-Bridge knows how a weight of either side becomes one of the other; this module only feeds it, so that
memory is bounded and every weight is accounted for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_sft.errors import UserError
from nemotron_sft.train import hf
from nemotron_sft.train.compat.bridge import model_state, some_shards
from nemotron_sft.train.compat.conversion import SAVED_AS
from nemotron_sft.train.peft import Adapter

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "lm_head.weight"  # in transformers
GROUP = 1 << 29  # numbers that are read, translated, written and compared at a time: 1 GiB in bf16, 2 GiB in fp32


@dataclasses.dataclass
class Group:
    """Weights that travel together. tasks: Bridge's conversion tasks, one per Megatron parameter; size: numbers."""

    tasks: list[Any]
    size: int

    @property
    def names(self) -> list[str]:
        return [plain_name(task.param_name) for task in self.tasks]


def plain_name(name: str) -> str:
    """A parameter's name as checkpoints have it: an adapter around a layer adds nothing to it."""
    return name.replace(".to_wrap.", ".")


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Whatever tensor is made here has a shape and a dtype, and no memory, whatever device its maker asks for."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnMeta(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
            return function(*args, **kwargs)

    with OnMeta(), torch.device("meta"):
        yield


class Skeleton:
    """A Megatron model without memory, and the translation of its weights.

    provider: Bridge's model provider, for one process; bridge: the MegatronModelBridge of the family; config: the
    transformers config that names the weights; adapters: Bridge's LoRA or DoRA, applied to the model.
    Raises UserError for a weight that transformers has no name for.
    """

    def __init__(self, provider, bridge, config, adapters=None):
        provider.finalize()
        with without_memory():
            (self.model,) = provider.provide_distributed_model(
                wrap_with_ddp=False, init_model_with_meta_device=True, mixed_precision_wrapper=None
            )
            if adapters is not None:
                adapters([self.model], training=False)
        self.tied = self.model.share_embeddings_and_output_weights
        self.bridge = bridge
        self.tasks = [task for task in bridge.build_conversion_tasks(config, [self.model]) if task is not None]
        self.wrappers = {
            name: module
            for name, module in self.model.named_modules()
            if hasattr(module, "to_wrap") and hasattr(module, "adapter")
        }
        self._check_all_are_named()

    def _check_all_are_named(self) -> None:
        named = {task.param_name for task in self.tasks if task.megatron_module is not None}
        for name, _ in self.model.named_parameters():
            if name in named or ".adapter." in name or (self.tied and "output_layer" in name):
                continue
            raise UserError(f"the weight {name} has no name in transformers: this model cannot be exported")

    def groups(self) -> list[Group]:
        """The weights in groups of about GROUP numbers, in an order that depends on the model alone."""
        groups: list[Group] = []
        last = None
        for task in self.tasks:
            size = task.param_weight.numel()
            # Families that keep all experts of a layer in one tensor give every expert the same name.
            together = str(task.mapping.hf_param) if getattr(task.mapping, "is_grouped_export", False) else None
            if not groups or (groups[-1].size + size > GROUP and (together is None or together != last)):
                groups.append(Group([], 0))
            groups[-1].tasks.append(task)
            groups[-1].size += size
            last = together
        return groups

    def to_hf(self, group: Group, weights: dict[str, Any]) -> dict[str, Any]:
        """{name in transformers: tensor} of a group's weights {Megatron name: tensor}; may share their memory."""
        named: dict[str, Any] = {}
        collected: dict[str, dict] = {}
        for task in group.tasks:
            with _filled(task, weights[plain_name(task.param_name)]) as weight:
                found = task.mapping.megatron_to_hf(weight, task.megatron_module)
                if getattr(task.mapping, "is_grouped_export", False):
                    found = self.bridge._accumulate_grouped_export(task, found, self.model.config, collected, {}) or {}
                else:
                    found = self.bridge.maybe_modify_converted_hf_weight(task, found, {})
            if twice := named.keys() & found.keys():
                raise UserError(f"two weights of the model are called {min(twice)} in transformers")
            named |= found
        return named

    def check_back(self, group: Group, weights: dict[str, Any], named: dict[str, Any]) -> int:
        """Translate `named` back into Megatron's weights and compare; returns how many tensors were equal.

        Raises UserError naming the first that differs.
        """
        for task in group.tasks:
            name = plain_name(task.param_name)
            try:
                with _filled(task, weights[name]):
                    back = from_hf(task, named)
            except KeyError as missing:
                raise UserError(f"not exported: {name} became no weight {missing.args[0]}") from None
            if not _same(back, weights[name]):
                raise UserError(f"not exported: read back, {name} differs from the checkpoint's")
        return len(group.tasks)


def from_hf(task, named: dict[str, Any]):
    """The Megatron weight of a conversion task, from tensors under their names in transformers."""
    source = task.mapping.hf_param
    wanted = named[source] if isinstance(source, str) else {part: named[name] for part, name in source.items()}
    return task.mapping.hf_to_megatron(wanted, task.megatron_module)


@contextlib.contextmanager
def _filled(task, weight) -> Iterator[Any]:
    """Put a real weight into the skeleton's module while Bridge works on it: some mappings ask where weights are."""
    import torch

    tables = (task.megatron_module._parameters, task.megatron_module._buffers)
    empty = [dict(table) for table in tables]
    real = torch.nn.Parameter(weight, requires_grad=False)
    for table in tables:
        table.update((name, real) for name, value in table.items() if value is not None)
    try:
        yield weight
    finally:
        for table, before in zip(tables, empty, strict=True):
            table.update(before)


def _same(one, other) -> bool:
    """Equal bits; or, where a mapping adds a constant (norms stored around zero), equal but for one rounding."""
    import torch

    if one.shape != other.shape:
        return False
    one = one.to(other.dtype)
    if torch.equal(one, other) or torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
        return True
    step = torch.finfo(other.dtype).eps
    return torch.allclose(one.float(), other.float(), rtol=2 * step, atol=2 * step)


class CheckpointReader:
    """Weights of a Megatron checkpoint (torch_dist), any few of them at a time, on the CPU, as they were saved."""

    def __init__(self, model, directory: Path):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
        from torch.distributed.checkpoint import FileSystemReader

        self.directory = str(directory)
        common = dist_checkpointing.load_common_state_dict(self.directory)
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        self._entries = model_state(model, metadata)
        self._strategy = TorchDistLoadShardedStrategy(cache_metadata=True)
        stored = FileSystemReader(self.directory).read_metadata().state_dict_metadata
        self._dtypes = {key: value.properties.dtype for key, value in stored.items() if hasattr(value, "properties")}

    @property
    def dtype(self):
        """That of the embedding, which is the model's in transformers; some weights may have another."""
        return self.dtype_of(EMBEDDING)

    def dtype_of(self, name: str):
        """That of one parameter in the checkpoint. Raises UserError for one that it does not hold."""
        found = {self._dtypes.get(key) for key in self._keys(name)}
        if None in found:
            raise UserError(f"{self.directory} holds no weight {name}: it is a checkpoint of another model")
        return found.pop()

    def _keys(self, name: str) -> list[str]:
        """The names under which a parameter lies in the checkpoint: some are kept in parts, such as Mamba's in_proj."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        entry = self._entries.get(name)
        if isinstance(entry, ShardedTensorFactory):
            return [part.key for part in nested_values(entry.build())]
        return [entry.key] if entry is not None else [name]

    def read(self, names: list[str]) -> dict[str, Any]:
        """{name: tensor} of these parameters. Raises UserError for one that the checkpoint does not hold."""
        from megatron.core import dist_checkpointing

        wanted = {name: self._with_memory(name) for name in names}
        with some_shards():
            loaded = dist_checkpointing.load(
                wanted, self.directory, self._strategy, validate_access_integrity=False, strict="assume_ok_unexpected"
            )
        return {name: loaded[name] for name in names}

    def _with_memory(self, name: str):
        """The entry of a parameter with memory of the saved dtype.

        A model trained in bf16 is saved in bf16 alone; its skeleton, like any new model, has Mamba's A_log in fp32.
        """
        import torch
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        dtype, entry = self.dtype_of(name), self._entries[name]
        named = {"dtype": dtype} if isinstance(entry, ShardedTensor) else {}
        return dataclasses.replace(entry, data=torch.empty(entry.data.shape, dtype=dtype, device="cpu"), **named)


class AdaptedReader:
    """The weights of a run with adapters: those that it started from, with the adapters of a checkpoint in them.

    base, own: readers of the two, on the same skeleton. Weights come in the adapters' precision if theirs is lower.
    """

    def __init__(self, skeleton: Skeleton, base: CheckpointReader | HuggingFaceReader, own: CheckpointReader):
        self._wrappers, self._base, self._own = skeleton.wrappers, base, own
        self._least = own.dtype_of(next(self._parts(layer)[0] for layer in self._wrappers))

    @property
    def dtype(self):
        import torch

        return torch.promote_types(self._base.dtype, self._least)

    def read(self, names: list[str]) -> dict[str, Any]:
        """{name: tensor} of these parameters, adapters merged."""
        import torch

        weights = self._base.read(names)
        for name, weight in weights.items():
            if weight.is_floating_point():
                weights[name] = weight.to(torch.promote_types(weight.dtype, self._least))
            if layer := self._layer(name):
                expert = name.rpartition(".weight")[2]  # of grouped experts: weight0, weight1, ...
                adapter = self._adapter(layer)
                weights[name] = adapter.merged(weights[name], int(expert) if expert else None)
        return weights

    def adapter_of(self, name: str) -> Adapter | None:
        """That of one weight, None where it has none."""
        layer = self._layer(name)
        return self._adapter(layer) if layer else None

    @functools.cached_property
    def _all(self) -> dict[str, Any]:
        """All adapters: they are small, and core reads layers or experts that share a name only together."""
        return self._own.read([part for layer in self._wrappers for part in self._parts(layer)])

    def _layer(self, name: str) -> str:
        """The adapted layer that a parameter belongs to, or nothing."""
        layer, _, kind = name.rpartition(".")
        return layer if layer in self._wrappers and kind.startswith("weight") else ""

    def _parts(self, layer: str) -> list[str]:
        return [f"{layer}.adapter.{name}" for name, _ in self._wrappers[layer].adapter.named_parameters()]

    def _adapter(self, layer: str) -> Adapter:
        settings, prefix, parts = self._wrappers[layer].adapter, f"{layer}.adapter", self._all
        first, second = parts[f"{prefix}.linear_in.weight"], parts[f"{prefix}.linear_out.weight"]
        return Adapter(first, second, parts.get(f"{prefix}.weight_magnitude"), settings.alpha / settings.dim)


class HuggingFaceReader:
    """The same from a Hugging Face directory: what training started from, as Megatron holds it."""

    def __init__(self, skeleton: Skeleton, directory: Path):
        self.directory = directory
        self._files = hf.weight_files(directory)
        self._tasks = {plain_name(task.param_name): task for task in skeleton.tasks}

    @property
    def dtype(self):
        """That of the embedding."""
        return self.read([EMBEDDING])[EMBEDDING].dtype

    def read(self, names: list[str]) -> dict[str, Any]:
        """{name: tensor} of these parameters. Raises UserError for one that the directory does not hold."""
        found = {}
        for name in names:
            task = self._tasks[name]
            source = task.mapping.hf_param
            keys = [source] if isinstance(source, str) else list(source.values())
            named = {key: self._tensor(key) for key in keys}
            with _filled(task, named[keys[0]]):
                found[name] = from_hf(task, named)
        return found

    def _tensor(self, key: str):
        from safetensors import safe_open

        stored = key if key in self._files else SAVED_AS.get(key, key)
        if stored not in self._files:
            raise UserError(f"{self.directory} holds no weight {key}: it is another model than the run started from")
        with safe_open(self._files[stored], "pt") as file:
            return file.get_tensor(stored)
