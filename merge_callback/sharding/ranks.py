"""The processes of a run, and the few things they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes that train one model together; by default this one, alone.

    What the ranks tell each other apart from training goes through a group of its own, over gloo: so it never
    gets between the collectives of training, and needs no accelerator. All methods but ``start_sum`` wait for
    the other ranks; each has to be called by all of them, in the same order, from one thread.

    Args:
        group: of the run's ranks, over gloo; ``None`` for a process that is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank() if group else 0
        self.size = dist.get_world_size() if group else 1

    @classmethod
    def of_run(cls, timeout: timedelta | None = None) -> Ranks:
        """All ranks of the default process group; this process alone where there is none, or one rank."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what all ranks share."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, by rank. Values are pickled: small ones, for decisions and errors."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def total(self, numbers: Tensor) -> Tensor:
        """Sums a CPU tensor over all ranks, in place; returns it."""
        if self.group is not None:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def start_sum(self, numbers: Tensor) -> Callable[..., object]:
        """Begins to sum a tensor over all ranks, in place, in training's own group, and returns at once.

        Args:
            numbers: on the device that training uses, so that its backend takes it.

        Returns:
            What to call before the sum is read. On CUDA that makes the current stream wait, not the host;
            elsewhere it takes a ``timedelta`` after which it raises.
        """
        if self.group is None:
            return lambda *within: None
        work = dist.all_reduce(numbers, async_op=True)
        wait: Callable[..., object] = work.wait
        return wait

    def close(self) -> None:
        """Gives the group back, once no rank needs it any more. All ranks have to."""
        if self.group is not None:
            self.exchange(None)
            dist.destroy_process_group(self.group)
            self.group = None

    def agree(self, error: BaseException | None) -> None:
        """Makes an error of one rank every rank's.

        Raises:
            BaseException: this rank's own error.
            RemoteError: where another rank has one; the message names the rank and the error.
        """
        errors = self.exchange(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RemoteError(f"on rank {rank}: {text}")


class RemoteError(RuntimeError):
    """What went wrong on another rank."""
