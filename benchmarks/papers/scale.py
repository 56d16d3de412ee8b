"""The gain of the merge against the size of the model and the learning rate; experts against dense."""

from __future__ import annotations

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Study

SEEDS = 3
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
"""Peak learning rates, constant after the warm-up."""
WIDTHS = (16, 32, 64, 128)
"""Of the residual stream, of dense models."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [
        *(dense(study, seed, width, rate) for width in WIDTHS for rate in rates(width)),
        *pair(study, seed, 32),
        *pair(study, seed, 64),
    ]


def rates(width: int) -> tuple[float, ...]:
    """The learning rates of a width: the widest model has two, the second one has one."""
    return {32: (8e-3,), 128: (4e-3, 8e-3)}.get(width, RATES)


def dense(study: Study, seed: int, width: int, rate: float) -> Spec:
    if (width, rate) == (64, 8e-3):
        return study.trunk("dense", seed)
    long = width == 32
    return study.trunk(
        "dense", seed, width=width, learning_rate=rate, steps=study.steps(2400 if long else 1000)
    )


def pair(study: Study, seed: int, width: int) -> tuple[Spec, Spec]:
    """A dense model and one with experts whose active parameters are as many."""
    expert = (
        study.trunk("moe", seed)
        if width == 32
        else study.trunk("moe", seed, width=64, steps=study.steps(1000))
    )
    return dense(study, seed, width, 8e-3), expert
