"""Averages of all of a run's weights, which a single copy holds while the run goes on.

All of them have the form θ̂ ← β θ̂ + (1−β) θ. A profile gives β; nothing here holds weights. Time is counted in
optimizer steps since the run began. β depends on the two steps alone, so an average may be updated at any of
them, and a resumed run goes on as if there had been no break.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from merge_callback.checks import positive
from merge_callback.merging.linear import DECAY_CURVES
from merge_callback.merging.method import Order

RUNNING: dict[str, type[RunningAverage]] = {}
"""The kinds of running averages that can be given by name."""


@dataclass(frozen=True)
class RunningAverage(ABC):
    """The profile of a running average: how much each step of the run weighs in it.

    Args:
        every_n_steps: optimizer steps between two updates.
        offload: keep the average of a model on a GPU in pinned host memory, and send it there and back at
            each update, on a stream of its own.

    Raises:
        ValueError: for an ``every_n_steps`` that is not a positive number.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""

    every_n_steps: int = field(default=1, kw_only=True)
    offload: bool = field(default=False, kw_only=True)

    def __init_subclass__(cls) -> None:
        RUNNING[cls.name] = cls

    def __post_init__(self) -> None:
        positive("every_n_steps", self.every_n_steps)

    @property
    @abstractmethod
    def label(self) -> str:
        """A name that tells it from others: of its metrics, and of its files."""

    @property
    def begins(self) -> int:
        """The step after which it begins."""
        return 0

    @abstractmethod
    def beta(self, previous: int, now: int) -> float:
        """What multiplies the average in the update after step ``now``, in [0, 1].

        Args:
            previous: the step of the last update; ``begins`` before the first one.
            now: a later one.
        """

    def is_due(self, last: int | None, now: int) -> bool:
        """Whether an update is due after step ``now``, if the last one was after ``last``."""
        return now > self.begins and (last is None or now // self.every_n_steps > last // self.every_n_steps)

    @property
    def newest(self) -> int | None:
        """``None``, as all steps are in it, and not so many snapshots; see ``MergeMethod``."""
        return None

    @property
    def arrangement(self) -> Order:
        """``"forward"``: see ``MergeMethod``."""
        return "forward"

    def options(self) -> dict[str, Any]:
        """The options as primitives."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {
            n: v if isinstance(v, (int, float, str)) else getattr(v, "__qualname__", repr(v))
            for n, v in given.items()
        }

    def record(self) -> dict[str, Any]:
        """Which average it is, as primitives: one that is updated more rarely, or elsewhere, is the same."""
        options = {n: v for n, v in self.options().items() if n not in ("every_n_steps", "offload")}
        return {"kind": self.name, **options}


@dataclass(frozen=True)
class PowerEma(RunningAverage):
    """An average whose memory grows with the run: step τ weighs in proportion to τ^γ (EDM2, eq. 1 to 5).

    β = (1 − Δt/t)^(γ+1). However long the run is, its last percents count: a width of .05 means that the
    standard deviation of the profile is 5 % of the run so far. From two of these, of widths .05 and .10, the
    average of any width between .05 and .15 is found afterwards (``posthoc_ema``).

    Args:
        sigma: the relative width, in (0, .28); .05 ↔ γ = 16.97, .10 ↔ γ = 6.94.

    Raises:
        ValueError: for another width.
    """

    name = "power_ema"
    reference = "arXiv 2312.02696, eq. 1 to 5"

    sigma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        gamma_of(self.sigma)

    @property
    def label(self) -> str:
        """E.g. ``power_ema-0.05``."""
        return f"{self.name}-{self.sigma:g}"

    @property
    def gamma(self) -> float:
        """The exponent of the profile."""
        return gamma_of(self.sigma)

    def beta(self, previous: int, now: int) -> float:
        """(previous / now)^(γ+1) = (1 − Δt/t)^(γ+1)."""
        return float((previous / now) ** (self.gamma + 1))


@dataclass(frozen=True)
class RunningEma(RunningAverage):
    """The classical exponential moving average.

    Its memory is a share of the run so far, which grows with the run (``half_life``), or of always the same
    number of steps (``decay``). Give one of the two.

    Args:
        half_life: f, after which share of the run so far a step's weight has halved: d = 2^(−1/(f t)).
        decay: d, what multiplies the average after one step, in (0, 1): .999 remembers 1,000 steps.

    Raises:
        ValueError: if not one of them is given, or its value makes no sense.
    """

    name = "ema"
    reference = "arXiv 2312.02696, section 3"

    half_life: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.half_life is None) == (self.decay is None):
            raise ValueError(
                f"running ema: half_life={self.half_life} and decay={self.decay} were given; give one "
                "of them, e.g. RunningEma(half_life=0.05) or RunningEma(decay=0.999)"
            )
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise ValueError(f"running ema: half_life={self.half_life} must be positive, e.g. 0.05")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"running ema: decay={self.decay} must lie between 0 and 1, e.g. 0.999")

    @property
    def label(self) -> str:
        """E.g. ``ema-half-life-0.05``."""
        if self.half_life is not None:
            return f"{self.name}-half-life-{self.half_life:g}"
        return f"{self.name}-decay-{self.decay:.10g}"

    def beta(self, previous: int, now: int) -> float:
        """d^Δt; 0 at first."""
        if previous == 0:
            return 0.0
        if self.decay is not None:
            return float(self.decay ** (now - previous))
        assert self.half_life is not None
        return float(2 ** -((now - previous) / (self.half_life * now)))


@dataclass(frozen=True)
class SmaSince(RunningAverage):
    """The mean of the weights of all steps after a given one: begin it where the warm-up ends.

    Args:
        step: the last step that is not in it.

    Raises:
        ValueError: for a negative step.
    """

    name = "sma_since"
    reference = "arXiv 1803.05407 (SWA)"

    step: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step < 0:
            raise ValueError(f"running sma: step={self.step} must not be negative")

    @property
    def label(self) -> str:
        """E.g. ``sma_since-1000``."""
        return f"{self.name}-{self.step}"

    @property
    def begins(self) -> int:
        """The step after which it begins."""
        return self.step

    def beta(self, previous: int, now: int) -> float:
        """The share of the steps up to ``previous`` in all of them."""
        return (previous - self.step) / (now - self.step)


@dataclass(frozen=True)
class RunningWsm(RunningAverage):
    """Weights that emulate a learning-rate decay from one step to another, in one copy.

    A ← A + (w_n / ΣW) (θ_n − A) with w_n = s(x_{n−1}) − s(x_n), where x is the share of the way that is gone.
    After the last step it stays as it is.

    Args:
        horizon: the step at which the emulated decay ends.
        start: that at which it begins.
        decay: ``"1-sqrt"``, ``"linear"``, ``"cosine"``, or a function s with s(0) = 1 and s(1) = 0.

    Raises:
        ValueError: for a horizon that is not after the start, or an unknown curve.
    """

    name = "wsm"
    reference = "arXiv 2507.17634"

    horizon: int
    start: int = 0
    decay: str | Callable[[float], float] = "1-sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.horizon:
            raise ValueError(f"running wsm: horizon={self.horizon} must lie after start={self.start} (≥ 0)")
        if isinstance(self.decay, str) and self.decay not in DECAY_CURVES:
            raise ValueError(
                f"running wsm: decay={self.decay!r} must be one of {', '.join(DECAY_CURVES)} or a function"
            )

    @property
    def label(self) -> str:
        """E.g. ``wsm-1000-5000``."""
        return f"{self.name}-{self.start}-{self.horizon}"

    @property
    def begins(self) -> int:
        """The step after which it begins."""
        return self.start

    def beta(self, previous: int, now: int) -> float:
        """1 − w_n / ΣW: what had been gone by ``previous`` of what is gone ``now``."""
        return self._gone(previous) / self._gone(now)

    def _gone(self, step: int) -> float:
        curve = DECAY_CURVES[self.decay] if isinstance(self.decay, str) else self.decay
        return 1 - curve(min(1.0, (step - self.start) / (self.horizon - self.start)))


@lru_cache
def gamma_of(sigma: float) -> float:
    """The exponent γ of the profile with a relative width (EDM2, eq. 3 and 4).

    It is the largest real root of γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²) = 0.

    Raises:
        ValueError: for a width that no γ > 0 has: all lie below 1/√12 = .289.
    """
    if not 0 < sigma < 12**-0.5:
        raise ValueError(f"sigma={sigma} must lie between 0 and 0.289, e.g. 0.05 or 0.1")
    square = sigma**-2
    low, high = 0.0, 1.0 / sigma + 1.0  # σ falls as γ grows, and σ < 1/(γ+2)
    for _ in range(200):  # to the last bit
        middle = (low + high) / 2
        if ((middle + 7) * middle + 16 - square) * middle + 12 - square < 0:
            low = middle
        else:
            high = middle
    return high


def resolve_running(running: object) -> dict[str, RunningAverage]:
    """The running averages by their names, from a list of them, or a mapping that names them.

    Raises:
        ValueError: for what is none, an unknown name, or two averages with one name.
    """
    if isinstance(running, (str, RunningAverage)):
        running = [running]
    if isinstance(running, Mapping):
        found = {str(name): _resolved(average) for name, average in running.items()}
    elif isinstance(running, Sequence):
        averages = [_resolved(average) for average in running]
        found = {average.label: average for average in averages}
        if len(found) < len(averages):
            raise ValueError(f"running={running!r} names one average twice")
    else:
        raise ValueError(f"running={running!r} must be a list, e.g. [PowerEma(0.05), PowerEma(0.1)]")
    for name in found:
        if not name or not all(character.isalnum() or character in "_.-" for character in name):
            raise ValueError(f"running: {name!r} is no name for files: use letters, digits, '_', '.' and '-'")
    return found


def _resolved(average: object) -> RunningAverage:
    if isinstance(average, RunningAverage):
        return average
    if isinstance(average, str) and average in RUNNING:
        try:
            return RUNNING[average]()
        except (TypeError, ValueError) as error:
            raise ValueError(f"running: {average!r} needs options: {error}") from None
    raise ValueError(
        f"running: {average!r} is no running average: give PowerEma(0.05), RunningEma(half_life=0.05), "
        "SmaSince(step=1000) or RunningWsm(horizon=10_000)"
    )
