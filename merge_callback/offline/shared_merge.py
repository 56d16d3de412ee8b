"""One merge whose tensors are shared out over the processes that a launcher has started.

Each process reads the checkpoints and merges its part of the tensors. Rank 0 alone writes: the others send it
theirs (gloo), so the output needs no file system that several nodes write to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from merge_callback.offline.peers import Peers

_DONE, _CONSTANT, _STOPPED = 0, 1, 2
"""What goes before a tensor: it follows; it does, and is the same NaN everywhere; none follows any more."""

_PIECE = 1 << 28  # bytes that are sent at once

Merge = Callable[[str, Tensor], bool]
"""Writes one tensor's merge; returns whether it is the same NaN or Inf everywhere."""


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Which process merges what: about the same number of bytes each, in the order given."""
    loads, owner = [0] * count, dict[str, int]()
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name] or 1
        owner[name] = rank
    return [[name for name in sizes if owner[name] == rank] for rank in range(count)]


def send_share(merge: Merge, outs: Mapping[str, Tensor], sizes: Mapping[str, int], peers: Peers) -> None:
    """Merges this process's part, and sends it to rank 0.

    Args:
        merge: of one tensor.
        outs: all tensors, on the meta device.
        sizes: bytes of each, in the order of the output.
        peers: of which this one is not rank 0.

    Raises:
        OSError: if rank 0 has given up, or is gone.
        Exception: that ``merge`` has raised, which rank 0 raises, too.
    """
    sent: list[dist.Work | None] = []
    try:
        for name in shares(sizes, peers.count)[peers.rank]:
            out = torch.empty_like(outs[name], device="cpu")
            try:
                if peers.store.check(["given up"]):
                    raise OSError("rank 0 has given up: it says why")
                head = _CONSTANT if merge(name, out) else _DONE
            except Exception as error:
                peers.store.set(f"failed/{peers.rank}", " ".join(str(error).split()))
                dist.send(torch.tensor([_STOPPED]), 0)
                raise
            for work in filter(None, sent):
                work.wait()
            sent = [dist.isend(part, 0) for part in (torch.tensor([head]), *_pieces(out))]
        for work in filter(None, sent):
            work.wait()
    except RuntimeError as error:
        raise OSError(f"rank 0 is gone ({' '.join(str(error).split()):.200})") from None


class _Receiver(threading.Thread):
    """Receives the tensors of one process into their places."""

    def __init__(self, rank: int, names: list[str], outs: Mapping[str, Tensor], peers: Peers) -> None:
        super().__init__(daemon=True)
        self.rank, self.names, self._outs, self._peers = rank, names, outs, peers
        self.here = {name: threading.Event() for name in names}
        self.constant: set[str] = set()
        self.failure = ""

    def run(self) -> None:
        """Receives until the last one, or until the process stops."""
        try:
            for name in self.names:
                dist.recv(head := torch.empty(1, dtype=torch.int64), self.rank)
                if int(head) == _STOPPED:
                    self.failure = self._peers.store.get(f"failed/{self.rank}").decode()
                    return
                for piece in _pieces(self._outs[name]):
                    dist.recv(piece, self.rank)
                if int(head) == _CONSTANT:
                    self.constant.add(name)
                self.here[name].set()
        except RuntimeError as error:
            self.failure = f"it is gone ({' '.join(str(error).split()):.200})"
        finally:
            for event in self.here.values():
                event.set()


def gathered(
    merge: Merge, outs: Mapping[str, Tensor], sizes: Mapping[str, int], peers: Peers
) -> Generator[tuple[str, bool], None, None]:
    """On rank 0: merges its part, and receives the others'; yields each name in its order as it is there.

    Yields:
        The name, and whether the tensor is the same NaN or Inf everywhere.

    Raises:
        OSError: if another process has failed, or is gone.
        Exception: the first one that ``merge`` has raised.
    """
    parts = shares(sizes, peers.count)
    others = [_Receiver(rank, parts[rank], outs, peers) for rank in range(1, peers.count)]
    owner = {name: other for other in others for name in other.names}
    for other in others:
        other.start()
    try:
        for name in sizes:
            if (sender := owner.get(name)) is None:
                yield name, merge(name, outs[name])
                continue
            sender.here[name].wait()
            if sender.failure:
                raise OSError(f"rank {sender.rank}: {sender.failure}")
            yield name, name in sender.constant
    except BaseException:
        with suppress(RuntimeError):
            peers.store.set("given up", "")
        raise
    finally:
        for other in others:  # each ends with the tensor that it is at
            other.join()


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The bytes of a contiguous tensor, in parts that are sent one by one."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return [flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE)]
