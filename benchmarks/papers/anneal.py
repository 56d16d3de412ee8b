"""A constant learning rate with a merge against forks that anneal: all along, by length, by learning rate."""

from __future__ import annotations

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import LENGTHS, MODELS, Model, Study

POINTS = (400, 800, 1200, 1600, 2000, 2400)
"""Steps at which forks leave to anneal, by 1-sqrt, for a quarter as many."""
LEAVE, SHORT, LONG = 1600, (40, 80, 160), 800
"""Where forks of other lengths leave, and these lengths."""
RATES, EARLY = (4e-3, 1.6e-2), 800
"""Other peak learning rates, and where their forks leave, for 200 steps."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [
        *study.standard(seed),
        *(spec for model in MODELS for spec in _own(study, model, seed)),
        *(other(study, seed, rate) for rate in RATES),
    ]


def _own(study: Study, model: Model, seed: int) -> list[Spec]:
    lengths = [study.decay(model, seed, point) for point in POINTS if point not in LENGTHS]
    return [constant(study, model, seed), *lengths, *(decay(study, model, seed, n) for n in (*SHORT, LONG))]


def constant(study: Study, model: Model, seed: int) -> Spec:
    """The trunk, and on at the same learning rate for as long as its last decay."""
    return study.trunk(model, seed).fork(study.steps(2400), study.steps(600))


def decay(study: Study, model: Model, seed: int, length: int) -> Spec:
    """A decay of another length."""
    return study.trunk(model, seed).fork(study.steps(LEAVE), study.steps(length), schedule="1-sqrt")


def other(study: Study, seed: int, rate: float) -> Spec:
    """The decay from another learning rate."""
    width, steps = study.size.width, study.steps(1000)
    trunk = study.trunk("dense", seed, width=width, learning_rate=rate, steps=steps)
    return trunk.fork(study.steps(EARLY), study.steps(200), schedule="1-sqrt")
