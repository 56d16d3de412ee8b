"""Merges across data mixes, decay schedules and phases."""

from __future__ import annotations

from typing import Any

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import MODELS, Model, Study

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


def runs(study: Study, seed: int) -> list[Spec]:
    return [fork(study, model, seed, name) for model in MODELS for name in FORKS]


def fork(study: Study, model: Model, seed: int, name: str) -> Spec:
    """One of the decays."""
    return study.decay(model, seed, LENGTH, **FORKS[name])
