"""The processes of a run, and their communication."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def destroy_groups(groups: list[dist.ProcessGroup]) -> None:
    """Destroys process groups, and empties the list, which should have the only references to them.

    torch 2.6 holds the interpreter's lock while it frees a group, which waits for threads of gloo's that may
    want the lock: for ever. What a group keeps for the CPU is freed without the lock, so it goes after it.
    """
    while groups:
        group = groups.pop()
        on_cpu = torch.device("cpu") in group._device_types
        backend = group._get_backend(torch.device("cpu")) if on_cpu else None
        dist.destroy_process_group(group)
        del group
        del backend


class Ranks:
    """The processes that train one model together; by default only this one.

    They communicate through a gloo group of their own, so that nothing gets between the collectives of
    training, and no accelerator is needed. All methods except ``start_sum`` wait for the other ranks; all
    ranks have to call each of them, in the same order, from one thread. A rank that fails between two calls
    has to call ``agree`` at once: the call in which the others wait then raises.

    Args:
        group: the gloo group of the run's ranks; ``None`` for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank() if group else 0
        self.size = dist.get_world_size() if group else 1

    @classmethod
    def of_run(cls, timeout: timedelta | None = None) -> Ranks:
        """All ranks of the default process group; only this process if there is none, or a single rank."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what all ranks share."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, by rank. Values are pickled, so they should be small: decisions and errors."""
        if self.group is None:
            return [value]
        self._check()
        return self._all(value)

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        if self.group is None:
            return value
        self._check()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def total(self, numbers: Tensor) -> Tensor:
        """Sums a CPU tensor over all ranks, in place; returns it."""
        if self.group is not None:
            self._check()
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def start_sum(self, numbers: Tensor) -> Callable[..., object]:
        """Begins to sum a tensor over all ranks, in place, in training's own group, and returns at once.

        Args:
            numbers: a tensor on the device that training uses, so that its backend accepts it.

        Returns:
            A function to call before the sum is read. On CUDA it makes the current stream wait, not the host;
            elsewhere it takes a ``timedelta`` after which it raises.
        """
        if self.group is None:
            return lambda *within: None
        work = dist.all_reduce(numbers, async_op=True)
        wait: Callable[..., object] = work.wait
        return wait

    def close(self) -> None:
        """Destroys the group once no rank needs it any more. All ranks have to call this."""
        if self.group is not None:
            self.exchange(None)
            groups, self.group = [self.group], None
            destroy_groups(groups)

    def agree(self, error: BaseException | None) -> None:
        """Raises on all ranks if one of them has an error.

        Args:
            error: this rank's error, if any. If it is a ``RemoteError`` that another method has raised here,
                all ranks know of it already, and nothing is sent.

        Raises:
            BaseException: this rank's own error.
            RemoteError: if another rank has one; the message names the rank and the error.
        """
        if isinstance(error, RemoteError) and error.cut_short:
            error.cut_short = False
            raise error
        any_failed = self.group is not None and self._any_failed(error is not None)
        if any_failed and (text := self._first_error(error)):
            raise RemoteError(text)
        if error is not None:
            raise error

    def agreed(self, action: Callable[[], T]) -> T:
        """The result of an action on this rank, once it has succeeded on all ranks.

        Raises:
            Exception: the action's own exception on this rank.
            RemoteError: if it raises on another rank.
        """
        problem: Exception | None = None
        try:
            found = action()
        except Exception as error:
            problem = error
        self.agree(problem)
        return found

    def _all(self, value: T) -> list[T]:
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def _check(self) -> None:
        if self._any_failed(False) and (text := self._first_error(None)):
            raise RemoteError(text, cut_short=True)

    def _any_failed(self, failed: bool) -> bool:
        dist.all_reduce(count := torch.tensor([int(failed)], device="cpu"), group=self.group)
        return bool(count.item())

    def _first_error(self, error: BaseException | None) -> str:
        """The error of the first of the other ranks that has one; empty if this rank has one itself."""
        texts = self._all(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            return ""
        return next(f"on rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)


class RemoteError(RuntimeError):
    """An error on another rank.

    Args:
        text: the rank and its error.
        cut_short: whether this rank was waiting in a call that the other one has not made.
    """

    def __init__(self, text: str, cut_short: bool = False) -> None:
        super().__init__(text)
        self.cut_short = cut_short
