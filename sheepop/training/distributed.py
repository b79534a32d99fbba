"""Several processes that share the micro-batches of each step, started by `torchrun`.

Every process holds the whole model. Gradients are summed once a step, after the last micro-batch; the loss was
already divided by the step's number of real targets, so the sum is the gradient that one process would have.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The place of a process among its peers."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def is_main_process() -> bool:
    """Say whether this is the process that prints results, also outside `join_world`."""
    return os.environ.get("RANK", "0") == "0"


def local_device(device: torch.device) -> torch.device:
    """Give each of the processes on one machine a GPU of its own, in the order that `torchrun` numbers them."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes that `torchrun` started, if it did, and leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()


def sum_over_processes(tensor: Tensor, world: World) -> Tensor:
    """Replace `tensor` by its sum over all processes, in place, and return it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(model: nn.Module, world: World) -> None:
    """Sum the gradients over all processes, packed into one message; a process without a share adds zeros."""
    if world.size == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    packed = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(packed)
    for gradient, piece in zip(gradients, torch.split(packed, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def agree_on_any(flag: bool, world: World, device: torch.device) -> bool:
    """Say whether the flag is raised on any process, so that all of them act at the same step."""
    return bool(sum_over_processes(torch.tensor(float(flag), device=device), world).item()) if world.size > 1 else flag


def wait_for_all(world: World) -> None:
    """Let no process go on before the main one has written its files."""
    if world.size > 1:
        dist.barrier()
