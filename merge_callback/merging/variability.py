"""Methods that merge several merges."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from merge_callback.merging.linear import Ema, Sma, Wma
from merge_callback.merging.method import Inputs, LinearMethod, MergeMethod, Need, Trajectory, register_method
from merge_callback.merging.randomness import CHUNK, Stream
from merge_callback.reduce import accumulator_dtype
from merge_callback.reduce.ranges import in_ranges


@register_method("dropout", reference="Practical Guidelines (ACL 2026), section 4.2.1")
@dataclass(frozen=True)
class Dropout(LinearMethod):
    """The mean of several means, each of which leaves some snapshots out.

    Each merge takes ``N − ⌊pN⌋`` random snapshots, but at least two. The mean of the merges is one weighted
    sum, in which a snapshot's weight is the number of merges that took it. Which ones do depends only on the
    seed, the merge and the snapshot's own position.

    Args:
        p: the share of the snapshots that a merge leaves out.
        merges: number of merges.
        seed: seed of the random choice.

    Raises:
        ValueError: for a ``p`` outside [0, 1), or a number of merges that is not positive.
    """

    needs: ClassVar[tuple[Need, ...]] = ("randomness",)

    p: float = 0.2
    merges: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout: p={self.p} must lie in [0, 1); the paper uses 0.2")
        if self.merges < 1:
            raise ValueError(f"dropout: merges={self.merges} must be a positive whole number")

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """The number of merges that took each snapshot."""
        count = max(min(2, len(positions)), len(positions) - math.floor(self.p * len(positions)))
        weights = [0.0] * len(positions)
        for merge in range(self.merges):
            order = sorted(range(len(positions)), key=lambda i: self._draw(merge, positions[i]))
            for i in order[:count]:
                weights[i] += 1.0
        return weights

    def _draw(self, merge: int, position: float) -> bytes:
        return hashlib.sha256(f"{self.seed}|{merge}|{float(position)!r}".encode()).digest()


@register_method("meta", reference="Practical Guidelines (ACL 2026), section 4.2.1")
@dataclass(frozen=True)
class Meta(LinearMethod):
    """The mean of the ``ema``, ``sma`` and ``wma`` merges: one weighted sum.

    Args:
        alpha: the ``alpha`` of ``ema``.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        Ema(alpha=self.alpha)

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """The mean of the three methods' normalised weights."""
        parts = (Ema(alpha=self.alpha), Sma(), Wma())
        return [
            math.fsum(ws) / 3 for ws in zip(*(p.normalised_weights(positions) for p in parts), strict=True)
        ]


@register_method("noise", reference="Practical Guidelines (ACL 2026), section 4.2.1")
@dataclass(frozen=True)
class Noise(MergeMethod):
    """The mean of several means of noisy snapshots: θ_k gets ``𝒩(0, σ_k²)``, ``σ_k = α‖θ_k‖₂/√n`` per tensor.

    The mean of M independent normal numbers is normal with ``σ/√M``, and a mean of means is one mean. So each
    element of a snapshot gets one number of that deviation, and the M merges are not made. The numbers depend
    only on the seed, the snapshot's step, the tensor's name and the element.

    The averaged noise of N snapshots, ``σ/√(MN)``, is below the rounding of bf16, so publish fp32.

    Args:
        alpha: α, the noise relative to the tensor's root mean square.
        merges: M, the number of merges.
        seed: seed of the noise.

    Raises:
        ValueError: for an ``alpha`` that is negative or not finite, or ``merges`` that is not positive.
    """

    needs: ClassVar[tuple[Need, ...]] = ("randomness", "global sums")

    alpha: float = 1e-3
    merges: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(f"noise: alpha={self.alpha} must be 0 or more; the paper uses 0.001")
        if self.merges < 1:
            raise ValueError(f"noise: merges={self.merges} must be a positive whole number")

    def survey(self, model: Iterable[Inputs], trajectory: Trajectory) -> Any:
        """The set of dtypes that this merge has warned about, initially empty."""
        return set()

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """The mean of the snapshots and of their noise, block by block."""
        self._warn(out.dtype, set() if survey is None else survey)
        first = inputs.tensors[0]
        squares = inputs.total(torch.tensor([sum_of_squares(t) for t in inputs.tensors], dtype=torch.float64))
        means = (squares / max(1, inputs.whole_size)).sqrt().tolist()
        deviations = [self.alpha * mean / math.sqrt(self.merges) for mean in means]
        piece = inputs.shard.piece if inputs.shard else None
        streams = [Stream(self.seed, step, inputs.name, piece) for step in trajectory.steps]

        def merge_range(start: int, stop: int) -> None:
            total, free = _scratch(first), _scratch(first)
            for begin in range(start, stop, CHUNK):
                end = min(begin + CHUNK, stop)
                mean, noise = total[: end - begin].zero_(), free[: end - begin]
                for tensor, stream, deviation in zip(inputs.tensors, streams, deviations, strict=True):
                    mean.add_(noise.copy_(tensor[begin:end]))
                    mean.add_(noise.copy_(stream.normal(begin, end)).mul_(deviation))
                out[begin:end].copy_(mean.div_(len(inputs.tensors)))

        in_ranges(first.numel(), first.device, merge_range)

    def _warn(self, dtype: torch.dtype, given: set[torch.dtype]) -> None:
        if dtype.itemsize <= 2 and dtype not in given:
            given.add(dtype)
            warnings.warn(
                f"noise: the averaged noise is near the rounding of {dtype}, which may swallow it; merge and "
                "publish in fp32",
                stacklevel=3,
            )


def sum_of_squares(tensor: Tensor) -> float:
    """``‖θ‖₂²`` of a flat tensor, summed in fp64."""
    wide = torch.empty(min(CHUNK, tensor.numel()), dtype=torch.float64, device=tensor.device)
    squares = 0.0
    for start in range(0, tensor.numel(), CHUNK):
        block = tensor[start : start + CHUNK]
        squares += wide[: block.numel()].copy_(block).square_().sum().item()
    return squares


def _scratch(tensor: Tensor) -> Tensor:
    """A buffer for a chunk of a tensor, in the dtype of the computation."""
    size = min(CHUNK, tensor.numel())
    return torch.empty(size, dtype=accumulator_dtype(tensor), device=tensor.device)
