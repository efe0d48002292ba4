"""Run by torchrun: recipes/train.py with parameters that are gathered in the next forward pass, as on GPUs.

Fails if prompts are asked while ranks have different parameters.
"""

import runpy

import torch

from nemotron_sft.train import evaluation, limits, run
from nemotron_sft.train.compat import cpu

generate = evaluation.generate


def adapt(container):
    cpu.adapt(container)
    ddp, optimizer = container.ddp, container.optimizer
    ddp.use_distributed_optimizer = optimizer.use_distributed_optimizer = True
    ddp.overlap_grad_reduce = ddp.overlap_param_gather = optimizer.overlap_param_gather = True


def generate_alike(model, *arguments):
    mine = torch.cat([parameter.detach().flatten() for parameter in model[0].parameters()])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(mine, first), "ranks ask with different parameters"
    return generate(model, *arguments)


run.adapt = limits.adapt = adapt
evaluation.generate = generate_alike
runpy.run_path("recipes/train.py", run_name="__main__")
