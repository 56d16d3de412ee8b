"""Verdicts on claims, and the intervals that they rest on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Says = Literal["holds", "holds in part", "does not hold here"]

_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % of Student's t with 1, 2, … degrees of freedom."""


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95 % interval by Student's t."""

    mean: float
    half: float

    def shown(self, digits: int = 3, sign: bool = True) -> str:
        """``+.012 ± .003``."""
        number = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return f"{number} ± {self.half:.{digits}f}" if math.isfinite(self.half) else number

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.mean - self.half > 0

    @property
    def is_negative(self) -> bool:
        """Whether all of it lies below 0."""
        return self.mean + self.half < 0


def interval(values: Sequence[float]) -> Interval:
    """The mean of one value per seed with its 95 % interval; of one seed it is infinite."""
    count = len(values)
    if count < 2:
        return Interval(statistics.mean(values), math.inf)
    quantile = _QUANTILES[min(count - 1, len(_QUANTILES)) - 1]
    return Interval(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count))


@dataclass(frozen=True)
class Verdict:
    """What became of one claim.

    Args:
        claim: a sentence: what the paper says.
        source: where, e.g. ``"[PG] Tab. 2"``.
        paper: its figure.
        ours: ours, with its interval.
        says: the verdict.
        why: the reason, if it does not hold or holds in part.
    """

    claim: str
    source: str
    paper: str
    ours: str
    says: Says
    why: str = ""

    def __post_init__(self) -> None:
        if self.says != "holds" and not self.why:
            raise ValueError(f"the verdict on {self.claim!r} is {self.says!r}: say why")

    def line(self) -> str:
        """All of it on one line."""
        return f"{self.source}: {self.says}. {self.claim} Paper: {self.paper}. Here: {self.ours}."


def says(all_of: Sequence[bool]) -> Says:
    """The verdict on a claim with several parts."""
    return "holds" if all(all_of) else "holds in part" if any(all_of) else "does not hold here"


def plain(value: Any) -> Any:
    """Figures as JSON has them: five digits, text as keys, no infinities."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
