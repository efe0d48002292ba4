"""Requests for CUDA, by name, answered by the CPU: torch.cuda as one device, and `device=` arguments rewritten."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import Any

from nemotron_sft.train.compat.registry import describe, patch


class Event:
    """A torch.cuda.Event on a device that has always finished: it reads the clock."""

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, *args):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return (end.seconds - self.seconds) * 1000

    def synchronize(self):
        pass

    def wait(self, *args):
        pass

    def query(self) -> bool:
        return True


class Stream:
    """A torch.cuda.Stream that never runs ahead."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def synchronize(self):
        pass

    def wait_stream(self, *args):
        pass

    def wait_event(self, *args):
        pass

    def record_event(self, event=None):
        return event or Event()


def _stand_ins() -> dict[str, Any]:
    """Name in torch.cuda -> what answers for it, with the parameters that torch gives it."""
    import torch

    stream = Stream()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=total, multi_processor_count=os.cpu_count(), warp_size=1
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "initial_seed": lambda: torch.initial_seed(),
        "default_generators": (torch.default_generator,),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream=None: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "device": lambda device=None: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (total, total),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_name": lambda device=None: "CPU",
        "_lazy_init": lambda: None,
        "_lazy_call": lambda callable, **kwargs: callable(),
    }


IN_RANDOM = ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "initial_seed")


def _expected() -> dict[str, str]:
    names = {f"torch.cuda:{name}": describe(value) for name, value in _stand_ins().items()}
    names |= {f"torch.cuda.random:{name}": names[f"torch.cuda:{name}"] for name in IN_RANDOM}
    names["torch.cuda:device"] = "class"  # a context manager as well
    return names | {
        "torch.nn:Module.cuda": "(self, device)",
        "torch.optim:Optimizer._accelerator_graph_capture_health_check": "(self)",
    }


@patch(_expected, seen="torch 2.15.0", until="Megatron-Core and Bridge take the device from one setting")
def redirect_cuda() -> Any:
    """Megatron asks for CUDA by name in hundreds of places. Returns the torch function mode that is in force now."""
    import torch

    stand_ins = _stand_ins()
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    for name in IN_RANDOM:
        setattr(torch.cuda.random, name, stand_ins[name])
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None
    mode = _cuda_to_cpu()
    mode.__enter__()
    return mode


def _cuda_to_cpu() -> Any:
    """A TorchFunctionMode that sends whatever names a CUDA device to the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    def is_cuda(device) -> bool:
        if isinstance(device, bool):
            return False
        return isinstance(device, int) or (
            isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"
        )

    class CudaToCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if "device" in kwargs and is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": cpu}
            name = getattr(func, "__name__", "")
            if name in ("cuda", "pin_memory") and args and isinstance(args[0], torch.Tensor):
                return args[0]
            if name == "to" and len(args) > 1 and not isinstance(args[1], torch.dtype) and is_cuda(args[1]):
                args = (args[0], cpu, *args[2:])
            if name == "type" and args and isinstance(args[0], torch.Tensor):
                if len(args) == 1 and "dtype" not in kwargs:  # core finds a tensor's dtype in this name
                    return func(*args).replace("torch.", "torch.cuda.", 1)
                if isinstance(args[1], str):
                    args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
            return func(*args, **kwargs)

    return CudaToCpu()
