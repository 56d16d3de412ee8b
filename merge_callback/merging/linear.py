"""The linear family: methods that are one set of weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from merge_callback.checks import positive
from merge_callback.merging.method import LinearMethod, normalised, register_method

DECAY_CURVES: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
"""Learning-rate decay curves s(x) with s(0) = 1 and s(1) = 0."""


@register_method("sma", reference="arXiv 2505.12082, eq. 3")
@dataclass(frozen=True)
class Sma(LinearMethod):
    """Simple moving average: every snapshot weighs the same. The default in the stable phase."""

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """1 for each snapshot."""
        return [1.0] * len(positions)


@register_method("wma", reference="arXiv 2505.12082, eq. 5")
@dataclass(frozen=True)
class Wma(LinearMethod):
    """Weighted moving average: the i-th oldest snapshot weighs i. Best early in training."""

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """1, 2, …, N."""
        return [float(i) for i in range(1, len(positions) + 1)]


@register_method("ema", reference="arXiv 2505.12082, eq. 4 and section 4.2")
@dataclass(frozen=True)
class Ema(LinearMethod):
    """Exponential moving average.

    Args:
        alpha: weight of the newest snapshot against all older ones, in (0, 1].
        init: the weight of the oldest snapshot, on which the sources disagree. ``"normalized"``: α(1−α)^(N−1)
            like any other, and all are divided by their sum; ``"recursive"``: (1−α)^(N−1), since M_1 = θ_1.

    Raises:
        ValueError: for an ``alpha`` outside (0, 1] or an unknown ``init``.
    """

    alpha: float = 0.2
    init: Literal["normalized", "recursive"] = "normalized"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"ema: alpha={self.alpha} must lie in (0, 1]; the papers use 0.2")
        if self.init not in ("normalized", "recursive"):
            raise ValueError(f"ema: init={self.init!r} must be 'normalized' or 'recursive'")

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """α(1−α)^(N−i); the oldest depends on ``init``."""
        n = len(positions)
        weights = [self.alpha * (1 - self.alpha) ** (n - i) for i in range(1, n + 1)]
        if self.init == "recursive":
            weights[0] = (1 - self.alpha) ** (n - 1)
        return weights


@register_method("wsm", reference="arXiv 2507.17634")
@dataclass(frozen=True)
class Wsm(LinearMethod):
    """Weights that emulate a learning-rate decay over the window.

    The update between two snapshots is scaled by the decay curve at its beginning, which gives snapshot j
    the weight ``s(x_{j−1}) − s(x_j)``, where x is the fraction of the window's tokens that have passed. The
    window starts one mean interval before the first snapshot; spacing may be uneven.

    Args:
        decay: ``"1-sqrt"``, ``"linear"``, ``"cosine"``, or a function s with s(0) = 1 and s(1) = 0.

    Raises:
        ValueError: for an unknown curve, or one with other end points.
    """

    decay: str | Callable[[float], float] = "1-sqrt"

    def __post_init__(self) -> None:
        if isinstance(self.decay, str) and self.decay not in DECAY_CURVES:
            raise ValueError(
                f"wsm: decay={self.decay!r} must be one of {', '.join(DECAY_CURVES)} or a function"
            )
        ends = self._curve(0.0), self._curve(1.0)
        if not (math.isclose(ends[0], 1, abs_tol=1e-6) and math.isclose(ends[1], 0, abs_tol=1e-6)):
            raise ValueError(
                f"wsm: the decay curve must run from s(0)=1 to s(1)=0, got {ends[0]} and {ends[1]}"
            )

    @property
    def _curve(self) -> Callable[[float], float]:
        return DECAY_CURVES[self.decay] if isinstance(self.decay, str) else self.decay

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """``s(x_{j−1}) − s(x_j)`` at the snapshots' positions, which must ascend."""
        if any(later <= earlier for earlier, later in pairwise(positions)):
            raise ValueError(f"wsm: the positions of the snapshots must ascend, got {list(positions)}")
        span = positions[-1] - positions[0]
        gap = span / (len(positions) - 1) if span else 1.0
        curve = [self._curve((p - positions[0] + gap) / (span + gap)) for p in positions]
        return [before - after for before, after in pairwise([1.0, *curve])]


@register_method("extrapolate", reference="arXiv 2605.26484")
@dataclass(frozen=True)
class Extrapolate(LinearMethod):
    """Extrapolation: ``m_k + λ (m_k − m_{k−1})``, the mean of the last snapshots moved on along its own way.

    ``m_k`` is the mean of the newest ``window`` snapshots, and ``m_{k−1}`` of as many before them. The best λ
    is found on validation data: ``merge-callback sweep --methods extrapolate --line-search``. While there are
    fewer than twice ``window`` snapshots, both means are of half of them; one snapshot is taken as it is.

    Args:
        scale: λ; 0 is the mean ``m_k``.
        window: how many snapshots each mean is of; default: half of those that are merged.

    Raises:
        ValueError: for a ``scale`` that is negative or not finite, or a ``window`` that is not positive.
    """

    extrapolates: ClassVar[bool] = True

    scale: float = 0.5
    window: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"extrapolate: scale={self.scale} must be 0 or a positive number")
        if self.window is not None:
            positive("extrapolate: window", self.window)

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """0 for the oldest, −λ/n for each snapshot of the earlier mean, (1+λ)/n for each of the later one."""
        if (count := len(positions)) == 1:
            return [1.0]
        n = min(self.window or count, count // 2)
        return [0.0] * (count - 2 * n) + [-self.scale / n] * n + [(1 + self.scale) / n] * n


@register_method("weighted", reference="weights given by the user")
@dataclass(frozen=True)
class Weighted(LinearMethod):
    """Weights given by the user, oldest snapshot first, divided by their sum.

    While a callback's window fills up there are fewer snapshots than weights; then the last weights are used.

    Raises:
        ValueError: for weights that are empty, not finite or sum to about 0.
    """

    weights: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not self.weights:
            raise ValueError("weighted: weights=[] must name one weight per snapshot, oldest first")
        normalised(self.weights)
        if not math.isclose(math.fsum(self.weights), 1, rel_tol=1e-6):
            warnings.warn(f"weights {list(self.weights)} do not sum to 1; they are normalised", stacklevel=3)

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """The last ``len(positions)`` of the given weights."""
        if len(positions) > len(self.weights):
            raise ValueError(
                f"weighted: {len(self.weights)} weights for {len(positions)} snapshots; give one per snapshot"
            )
        return list(self.weights[-len(positions) :])
