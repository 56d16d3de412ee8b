"""The passes that a backend provides, and their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from torch import Tensor


class Cut(NamedTuple):
    """What TIES trims: magnitudes up to ``below`` before index ``end``, and up to ``at_most`` from there on.

    Both are fp32 numbers. NaN is not trimmed.
    """

    below: float
    at_most: float
    end: int


Elect = Callable[[Tensor, Sequence[Tensor], Tensor, float, Sequence[Cut]], None]
"""A backend's pass of TIES: θ_init, sources, out, scale, and one cut per source."""

Weights = Sequence[float] | Sequence[Sequence[float]] | None
"""N factors of one weighted sum, K rows of them, or ``None``."""

Outs = Tensor | Sequence[Tensor] | None
"""The output of one weighted sum, those of K, or ``None``."""

Pass = Callable[
    [Sequence[Tensor], Weights, Outs, Sequence[float] | None, Sequence[int]],
    Tensor | None,
]
"""A backend's ``one_pass``: sources, weights, out, contrast and bounds; returns the squares."""


class Row(NamedTuple):
    """One weighted sum: N factors, and where it is written to."""

    weights: Sequence[float]
    out: Tensor


def rows_of(weights: Weights, out: Outs) -> list[Row]:
    """The weighted sums that are asked for; none without weights or outputs.

    Raises:
        ValueError: if there are not as many rows as outputs.
    """
    if weights is None or out is None:
        return []
    if isinstance(out, Tensor):
        return [Row(cast(Sequence[float], weights), out)]
    if len(weights) != len(out):
        raise ValueError(f"weights: {len(weights)} rows for {len(out)} outputs; give one for each")
    return [Row(*row) for row in zip(cast(Sequence[Sequence[float]], weights), out, strict=True)]
