"""Random numbers that belong to the elements of a tensor, independently of the order of drawing.

The i-th number of a tensor depends on the seed, the snapshot's step, the tensor's name and i alone: not on
the block, the thread or the shard it is drawn in. Every chunk of elements has a generator of its own: Philox
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with the SHA-256 of seed, step and
name as its key, and the chunk's number in its counter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import Generator, Philox
from torch import Tensor

from merge_callback.sharding.pieces import Piece

CHUNK = 1 << 15
"""Elements that share a generator. A part of a chunk costs as much as all of it. Changing this number changes
the random numbers."""


@dataclass(frozen=True)
class Stream:
    """The random numbers of one tensor of one snapshot.

    Args:
        seed: the user's seed.
        step: the snapshot's step.
        name: the tensor's name.
        piece: the part of the tensor whose elements are drawn; default: all of it.
    """

    seed: int
    step: int
    name: str
    piece: Piece | None = None

    def uniform(self, start: int, stop: int) -> Tensor:
        """Numbers in [0, 1) for the elements ``start`` to ``stop``: fp32, on the CPU.

        They are multiples of 2^-24, all equally likely: ``u < d`` holds with probability d to within 6e-8.
        """
        return self._draw(start, stop, lambda generator, out: generator.random(out=out, dtype=np.float32))

    def normal(self, start: int, stop: int) -> Tensor:
        """Standard normal numbers for the elements ``start`` to ``stop``: fp32, on the CPU."""
        return self._draw(
            start, stop, lambda generator, out: generator.standard_normal(out=out, dtype=np.float32)
        )

    def _draw(
        self, start: int, stop: int, fill: Callable[[Generator, npt.NDArray[np.float32]], object]
    ) -> Tensor:
        order = None
        if self.piece is not None:
            start, stop, order = self.piece.span(start, stop)
        first, last = start // CHUNK, -(-stop // CHUNK)
        numbers = np.empty((max(0, last - first), CHUNK), dtype=np.float32)
        key = self._key()
        for chunk, row in enumerate(numbers, start=first):
            # The chunk's number is in the counter's second word, so chunks are 2^64 blocks of numbers apart.
            fill(Generator(Philox(key=key, counter=chunk << 64)), row)
        drawn = torch.from_numpy(numbers.reshape(-1)[start - first * CHUNK : stop - first * CHUNK])
        return drawn if order is None else drawn[order]

    def _key(self) -> int:
        text = f"{self.seed}|{self.step}|{self.name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
