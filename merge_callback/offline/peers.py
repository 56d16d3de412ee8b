"""The processes that one command was started in, by torchrun or another launcher of torch.distributed."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

_MEETING = timedelta(minutes=5)
_WORK = timedelta(days=30)  # the launcher ends the others if one fails
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class Peers:
    """All processes of a command; one alone by default.

    They meet at a store, and there is no process group while somebody else's code runs: a metric of that
    code would else be summed over processes that have different weights.

    Args:
        rank: of this process.
        count: of all.
        store: where they meet; ``None`` for one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.store = rank, count, store
        self._exchanges = 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part of what is to be done."""
        return work[self.rank :: self.count]

    def exchange(self, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each process gives, primitives all, in the order of their ranks.

        Raises:
            OSError: if another process has gone.
        """
        if self.count == 1:
            return [dict(mine)]
        try:
            self.tell(mine)
            found = [self.store.get(f"{self._exchanges}/{rank}") for rank in range(self.count)]
        except RuntimeError as error:
            raise OSError(f"another process of this command has ended ({_line(error)})") from None
        return [json.loads(one) for one in found]

    def tell(self, mine: Mapping[str, Any]) -> None:
        """Gives what the others' next exchange has of this process, and waits for none of them."""
        self._exchanges += 1
        self.store.set(f"{self._exchanges}/{self.rank}", json.dumps(mine))

    @contextmanager
    def group(self) -> Iterator[None]:
        """Within, there is a process group of all of them: the one there is, or a new one (gloo).

        Raises:
            OSError: if they can't connect.
        """
        import torch.distributed as dist

        from merge_callback.sharding import destroy_groups

        if dist.is_initialized():
            yield
            return
        try:
            dist.init_process_group(
                "gloo", store=self.store, rank=self.rank, world_size=self.count, timeout=_WORK
            )
        except RuntimeError as error:
            raise OSError(f"the processes of this command can't connect ({_line(error)})") from None
        try:
            yield
        finally:
            destroy_groups([dist.distributed_c10d._get_default_group()])


@contextmanager
def peers_of_launcher() -> Iterator[Peers]:
    """The processes that a launcher has started this command in.

    What runs within finds nothing of them in the environment, so that a Trainer, say, trains by itself.

    Raises:
        OSError: if they don't meet in five minutes.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or any(name not in os.environ for name in _NAMES):
        yield Peers()
        return
    from torch.distributed.rendezvous import rendezvous

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, *_ = next(rendezvous("env://", rank, count, timeout=_MEETING))
        store.set(f"merge_callback/{rank}", "")
        store.wait([f"merge_callback/{other}" for other in range(count)], _MEETING)
    except RuntimeError as error:
        raise OSError(
            f"rank {rank} of {count}: the others were not found in {_MEETING} ({_line(error)}); to work in "
            "one process alone, unset RANK and WORLD_SIZE"
        ) from None
    store.set_timeout(_WORK)
    names = [name for name in os.environ if name in _NAMES or name.startswith(("TORCHELASTIC_", "GROUP_"))]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        with warnings.catch_warnings():
            if rank > 0:
                warnings.simplefilter("ignore")  # rank 0 gives the same ones
            yield Peers(rank, count, store)
    finally:
        os.environ.update(hidden)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
