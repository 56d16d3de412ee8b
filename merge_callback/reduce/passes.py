"""The passes that a backend provides, and their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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

Pass = Callable[
    [Sequence[Tensor], Sequence[float] | None, Tensor | None, Sequence[float] | None, Sequence[int]],
    Tensor | None,
]
"""A backend's ``one_pass``: sources, weights, out, contrast and bounds; returns the squares."""
