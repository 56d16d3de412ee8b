"""A constant learning rate with a merge against forks that anneal: all along, by length, by learning rate."""

from __future__ import annotations

from benchmarks.papers import rates
from benchmarks.papers.spec import Spec
from benchmarks.papers.study import MODELS, Model, Study

POINTS = (400, 800, 1200, 1600, 2000, 2400)
"""Steps at which forks leave to anneal, by 1-sqrt, for a quarter as many."""
LEAVE, SHORT = 1600, (40, 80, 160)
"""Where shorter forks of the dense model leave, and their lengths."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [
        *(constant(study, model, seed) for model in MODELS),
        *(study.decay(model, seed, point) for model in MODELS for point in POINTS),
        *(short(study, seed, length) for length in SHORT),
        *(rates.decay(study, seed, rate) for rate in rates.RATES),
    ]


def constant(study: Study, model: Model, seed: int) -> Spec:
    """The trunk, and on at the same learning rate for as long as its last decay."""
    return study.trunk(model, seed).fork(study.steps(2400), study.steps(600))


def short(study: Study, seed: int, length: int) -> Spec:
    """A shorter decay."""
    return study.trunk("dense", seed).fork(study.steps(LEAVE), study.steps(length), schedule="1-sqrt")
