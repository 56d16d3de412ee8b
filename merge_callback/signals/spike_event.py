"""What is reported of a watched number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SpikeEvent:
    """What a detector reports: a spike, a rise, or a shift to a level that is the new baseline from now on.

    ``onset`` is the step of the first outlier, ``step`` the step whose value decided. ``values`` are the
    outliers (of a shift those among its 128 values, of a spike the last 128, of a rise the last 16 values).
    ``baseline`` and ``threshold`` are those they were judged by, NaN if there were too few clean values.
    """

    kind: Literal["spike", "rise", "shift"]
    watched: str
    onset: int
    step: int
    values: list[float]
    baseline: float
    threshold: float

    @property
    def trigger(self) -> str:
        """What triggered the event, e.g. ``"loss"`` or ``"non-finite loss"``."""
        finite = all(map(math.isfinite, self.values))
        return self.watched if finite else f"non-finite {self.watched}"
