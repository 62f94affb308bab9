"""Several processes that train one network: each takes its share of every batch, gradients are averaged."""

import atexit
import os
import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kronsearch.errors import DataError, TrainingError
from kronsearch.training.precision import require_device

__all__ = ["ALONE", "Team", "join", "joined"]

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train together, as one of them sees it.

    Args:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def share(self, count: int) -> tuple[slice, float]:
        """Return this process's part of so many examples, and what its mean loss counts in the average over all."""
        if count < self.size:
            raise DataError(f"a batch of {count} has nothing for each of {self.size} processes: use fewer")
        own = slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)
        return own, (own.stop - own.start) * self.size / count

    def refuse_compiling(self) -> None:
        """Raise TrainingError if they are several, who can't train networks that run through `torch.compile`."""
        if self.size > 1:
            raise TrainingError(f"{self.size} processes can't train compiled networks together: leave --compile out")

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return what averages gradients when it is run and its loss differentiated; at first all get rank 0's weights.

        Batch norms see each process's share, and at every step take on rank 0's running statistics.
        """
        if self.size == 1:
            return model
        # A static graph lets parameters be without use, and losses come from the outputs of blocks.
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, static_graph=True)

    def differentiate(self, loss: Tensor) -> None:
        """Call `backward` of a loss."""
        with warnings.catch_warnings():
            # of a kernel with one channel, whose layouts are two names for one order
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            loss.backward()  # type: ignore[no-untyped-call]

    def average(self, value: Tensor) -> Tensor:
        """Return the average of a tensor over the processes."""
        if self.size > 1:
            distributed.all_reduce(value)
            value = value / self.size
        return value

    def from_leader(self, value: T) -> T:
        """Return what rank 0 passes."""
        if self.size > 1:
            told = [value]
            distributed.broadcast_object_list(told, src=0)
            [value] = told
        return value


ALONE = Team()


def join(device: torch.device | str) -> tuple[Team, torch.device]:
    """Join the processes that `torchrun` has started, until this one ends; without them, be alone.

    Returns the team, and the device of this process: with CUDA the one of its local rank. A process group that the
    caller has made is used as it is.

    Raises:
        ModelError: there is no such device.
    """
    require_device(device)
    device, team = torch.device(device), joined()
    if team.size > 1:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            require_device(device)
        if not _initialised():
            if device.type == "cuda":
                distributed.init_process_group("nccl", device_id=device)
            else:
                distributed.init_process_group("gloo")
            # not sooner: torchrun's processes can't find each other a second time
            atexit.register(distributed.destroy_process_group)
    return team, device


def joined() -> Team:
    """Return the team that this process is of, by the caller's process group or else by what `torchrun` tells it."""
    if _initialised():
        return Team(distributed.get_rank(), distributed.get_world_size())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return Team(int(os.environ.get("RANK", "0")), size) if size > 1 else ALONE


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
