"""The warmup-stable-decay learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

DecayShape = Literal["1-sqrt", "linear", "cosine"]


def wsd_factor(step: int, warmup: int, stable: int, decay: int, shape: DecayShape = "1-sqrt") -> float:
    """Computes the share of the peak learning rate at one step of a warmup-stable-decay schedule.

    Args:
        step: Steps already taken; 0 gives the factor of the first step.
        warmup: Steps of linear rise; the last one is at the peak.
        stable: Steps at the peak.
        decay: Steps of decay; the step after the last one would be at 0.
        shape: With x the share of the decay that is over: `1-sqrt` is 1 − √x, `linear` is 1 − x, `cosine` is
            (1 + cos πx) / 2.

    Raises:
        ValueError: For an unknown `shape`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if step < warmup + stable:
        return 1.0
    return _decay_curve(min(1.0, (step - warmup - stable) / max(1, decay)), shape)


def _decay_curve(x: float, shape: DecayShape) -> float:
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(x)
    if shape == "linear":
        return 1.0 - x
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * x))
    raise ValueError(f"Unknown decay shape {shape!r}: choose '1-sqrt', 'linear' or 'cosine'.")


@dataclass(frozen=True)
class WSDSchedule:
    """A warmup-stable-decay schedule; the defaults are the demo's."""

    warmup: int = 200
    """Steps of linear rise."""
    stable: int = 4000
    """Steps at the peak."""
    decay: int = 1200
    """Steps of decay to 0."""
    shape: DecayShape = "1-sqrt"
    """Curve of the decay."""

    def __post_init__(self) -> None:
        if min(self.warmup, self.stable, self.decay) < 0:
            raise ValueError(f"The steps of {self} must not be negative.")
        self.factor(self.steps)  # finds an unknown shape now, not when the decay begins

    @property
    def steps(self) -> int:
        """Steps in total."""
        return self.warmup + self.stable + self.decay

    def factor(self, step: int) -> float:
        """Computes the share of the peak learning rate after `step` steps; see `wsd_factor`."""
        return wsd_factor(step, self.warmup, self.stable, self.decay, self.shape)


@dataclass(frozen=True)
class ExcessiveSchedule(WSDSchedule):
    """A schedule that goes wrong for a while, as after a restart with a wrong flag."""

    excess: float = 25.0
    """The factor on the learning rate during the excess."""
    excess_from: int = 800
    """The first step of the excess."""
    excess_steps: int = 40
    """The number of its steps."""

    def factor(self, step: int) -> float:
        """Computes the share of the peak learning rate after `step` steps."""
        wrong = self.excess_from <= step < self.excess_from + self.excess_steps
        return super().factor(step) * (self.excess if wrong else 1.0)
