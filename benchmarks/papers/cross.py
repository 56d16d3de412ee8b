"""Merges across data mixes, decay schedules and phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Model, Study

LENGTH = 1600
"""Steps before the decays part."""
FORKS: dict[str, dict[str, Any]] = {
    "both": {},
    "both, other order": {"order": 1},
    "code": {"mix": "code"},
    "prose": {"mix": "prose"},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
}
"""Decays of the same trunk: on both texts by 1-sqrt, except for what is changed."""


MIXED = ("both", "both, other order", "code", "prose")
"""Those that the mixture of experts takes, too."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [fork(study, model, seed, name) for model, names in forks().items() for name in names]


def forks() -> dict[Model, Sequence[str]]:
    """The names of each model's decays."""
    return {"dense": tuple(FORKS), "moe": MIXED}


def fork(study: Study, model: Model, seed: int, name: str) -> Spec:
    """One of the decays."""
    return study.decay(model, seed, LENGTH, **FORKS[name])
