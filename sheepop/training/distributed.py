"""Several processes that share the micro-batches of each step, started by `torchrun`.

The loss is divided by the step's number of real targets over all processes before the backward pass, so the gradients
of the processes add up to the gradient that one process would have, whatever the number of processes.
"""

import inspect
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import LostProcessError, SheepopError

Result = TypeVar("Result")
Parallel = Literal["none", "ddp", "fsdp"]

# fp32 weights, gradients and AdamW's two moments take 16 bytes a parameter; the rest of a GPU is for activations.
BYTES_A_PARAMETER = 16
SHARE_FOR_PARAMETERS = 0.5

# While the main process prepares a text, say, the others wait for it; a process that is lost is noticed at once.
PATIENCE = timedelta(hours=6)


# Tables of positions are buffers, the same everywhere; torch 2.13 gave the option that says so a new name.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


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


def number_of_restarts() -> int:
    """Return how often `torchrun --max-restarts` has started the processes again after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_of_processes() -> dict[str, str]:
    """Return what tells this launch by `torchrun` from others, restarts of it included; empty for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    identity = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launcher = {"launcher": f"{platform.node()}:{os.getppid()}"}  # which stays when it starts its processes again
    return launcher if identity == "none" else launcher | {"run_id": identity}


def local_device(device: torch.device) -> torch.device:
    """Give each of the processes on one machine a GPU of its own, in the order that `torchrun` numbers them."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes that `torchrun` started, if it did, and leave them at the end.

    Raises:
        LostProcessError: another process is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    # A name of its own for each start: after a restart the store still holds the addresses of the lost processes.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"start-{number_of_restarts()}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield World(rank, size)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcessError(
                f"Process {rank} of {size} lost the connection to another one, which was ended or broke "
                f"down; its own message says why. What was saved is whole: start again with --resume auto, or let "
                f"`torchrun --max-restarts 3` do it. ({str(error).splitlines()[0]})"
            ) from error
        raise
    finally:
        # Gloo's group is kept to the end of the process instead (`utils.runtime.end_at_once_among_others`).
        if device.type == "cuda":
            dist.destroy_process_group()


def sum_over_processes(tensor: Tensor, world: World) -> Tensor:
    """Replace `tensor` by its sum over all processes, in place, and return it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def agree_on_any(flag: bool, world: World, device: torch.device) -> bool:
    """Say whether the flag is raised on any process, so that all of them act at the same step."""
    return bool(sum_over_processes(torch.tensor(float(flag), device=device), world).item()) if world.size > 1 else flag


def on_main(world: World, action: Callable[[], Result]) -> Result:
    """Let the main process act; all processes return what it returned, or raise the user's error that it raised.

    Without the second half, an error of the main process alone would leave the others waiting for it.
    """
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except SheepopError as error:
            outcome[1] = error
        except Exception as error:  # a defect: the others only need to know that it is over
            if world.size > 1:
                dist.broadcast_object_list([None, LostProcessError(f"The main process broke down: {error!r}")])
            raise
    if world.size > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def choose_parallel(
    asked: Literal["auto", "ddp", "fsdp"], num_parameters: int, device: torch.device, world: World
) -> Parallel:
    """Return how the processes share the model; `auto` shards it where a GPU could not hold all of it."""
    if world.size == 1:
        return "none"
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "ddp"
    memory = torch.cuda.get_device_properties(device).total_memory
    return "fsdp" if num_parameters * BYTES_A_PARAMETER > SHARE_FOR_PARAMETERS * memory else "ddp"


def distribute(model: TransformerModel, how: Parallel, world: World) -> nn.Module:
    """Prepare the model for several processes, and return what the training step calls instead of it.

    - ddp (Li et al. 2020): every process holds the whole model; gradients are averaged in buckets during the backward
      pass, so the step makes the loss as many times larger.
    - fsdp (Zhao et al. 2023; FSDP2): every process holds a slice of each weight, its gradient and its moments, and
      gathers a block's weights only while it computes with them. The model's parameters become `DTensor`s, in place.
    """
    if how == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **_KEEP_BUFFERS)
    if how == "fsdp":
        # Half a second to import, which a single process is spared.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(model.device.type, (world.size,))
        for module in (*model.blocks, model):
            sharded = fully_shard(module, mesh=mesh)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum
        register_fsdp_forward_method(model, "hidden_states")  # which evaluation calls
    return model


@contextmanager
def gradient_exchange(forward: Any, how: Parallel, *, is_last: bool) -> Iterator[None]:
    """Exchange gradients in the backward pass of a step's last micro-batch only; the others just add up."""
    if how == "fsdp":
        forward.set_requires_gradient_sync(is_last)
    with forward.no_sync() if how == "ddp" and not is_last else nullcontext():
        yield


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is this process's slice of one, a `DTensor`."""
    return hasattr(tensor, "placements")


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process; any other is returned as it is. All processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's slice of a sharded tensor; any other is returned as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Bring a weight or moment to where its parameter is, sliced as that is; a counter stays whole."""
    tensor = tensor.to(parameter.device)
    if is_sharded(tensor) or not is_sharded(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def release_gathered_weights(model: nn.Module) -> None:
    """Go back to slices of the weights after a forward pass of a sharded model without a backward pass."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]
