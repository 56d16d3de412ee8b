"""Ranks that are threads of one process, and ways to share a tensor out among them."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from merge_callback.sharding import Piece, Ranks


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self._own = threading.local()
        super().__init__()
        self.size = size
        self.messages = 0
        self._barrier = threading.Barrier(size, timeout=60)
        self._told: dict[int, object] = {}

    @property
    def rank(self):
        return getattr(self._own, "rank", 0)

    @rank.setter
    def rank(self, value):
        self._own.rank = value

    def exchange(self, value):
        self.messages += self._own.rank == 0
        self._told[self._own.rank] = value
        self._barrier.wait()
        told = [self._told[rank] for rank in range(self.size)]
        self._barrier.wait()
        return told

    def total(self, numbers):
        return numbers.copy_(sum(self.exchange(numbers.clone())))

    def run(self, function):
        def on(rank):
            self._own.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))


def rows(shape, ranks):
    """Slices of the first dimension, the last rank having less, or nothing."""
    step = -(-shape[0] // ranks)
    bounds = [min(shape[0], step * rank) for rank in range(ranks + 1)]
    return [
        Piece.box(shape, (a, *(0 for _ in shape[1:])), (b - a, *shape[1:]))
        for a, b in itertools.pairwise(bounds)
    ]


def columns(shape, ranks):
    """Slices of the last dimension: the elements of the ranks lie in between each other."""
    step = -(-shape[-1] // ranks)
    bounds = [min(shape[-1], step * rank) for rank in range(ranks + 1)]
    return [
        Piece.box(shape, (*(0 for _ in shape[1:]), a), (*shape[:-1], b - a))
        for a, b in itertools.pairwise(bounds)
    ]


def ranges(shape, ranks):
    """Stretches of the flattened tensor, as FSDP1 shards it, very uneven ones."""
    size = torch.Size(shape).numel()
    bounds = [0, *(size * (rank + 1) // (3 * ranks) for rank in range(ranks - 1)), size]
    return [Piece.flat(shape, a, b) for a, b in itertools.pairwise(bounds)]


def taken(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    parts = [box.of(tensor).reshape(-1) for box in piece.boxes]
    return torch.cat(parts) if parts else tensor.new_empty(0)
