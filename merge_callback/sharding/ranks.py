"""The processes of a run, and the few things they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes that train one model together; by default this one, alone.

    What the ranks tell each other apart from training goes through a group of its own, over gloo: so it never
    gets between the collectives of training, and needs no accelerator. All methods but ``start_sum`` wait for
    the other ranks; each has to be called by all of them, in the same order, from one thread. A rank that
    fails between two of them calls ``agree`` at once: whatever the others are waiting in then raises.

    Args:
        group: of the run's ranks, over gloo; ``None`` for a process that is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank() if group else 0
        self.size = dist.get_world_size() if group else 1

    @classmethod
    def of_run(cls, timeout: timedelta | None = None) -> Ranks:
        """All ranks of the default process group; this process alone if there is none, or one rank."""
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

        Args:
            error: this rank's. A ``RemoteError`` that another method has raised here is known to all ranks
                by then, and nothing is sent.

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
        """What an action gives on this rank, once it has gone well on all of them.

        Raises:
            Exception: what it raises here.
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
        """What the first of the other ranks with an error says; empty if this rank has one itself."""
        texts = self._all(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            return ""
        return next(f"on rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)


class RemoteError(RuntimeError):
    """What went wrong on another rank.

    Args:
        text: which rank, and what.
        cut_short: whether this rank was in the middle of something that the other one has left.
    """

    def __init__(self, text: str, cut_short: bool = False) -> None:
        super().__init__(text)
        self.cut_short = cut_short
