"""Runs at other peak learning rates than the standard one, which several claims look at."""

from __future__ import annotations

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Study

RATES = (4e-3, 8e-3, 1.6e-2)
"""Peak learning rates; the middle one is the standard trunk's."""

EARLY = 800
"""Steps after which they are compared."""


def trunk(study: Study, seed: int, rate: float) -> Spec:
    """A dense run at a constant rate: of 1,000 steps, but the standard one."""
    if rate == RATES[1]:
        return study.trunk("dense", seed)
    width, steps = study.size.width, study.steps(1000)
    return study.trunk("dense", seed, width=width, learning_rate=rate, steps=steps)


def decay(study: Study, seed: int, rate: float) -> Spec:
    """A decay of it."""
    return trunk(study, seed, rate).fork(study.steps(EARLY), study.steps(EARLY / 4), schedule="1-sqrt")
