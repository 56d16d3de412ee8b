"""A claim."""

from __future__ import annotations

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import MODELS, Study


def runs(study: Study, seed: int) -> list[Spec]:
    return [study.trunk(model, seed) for model in MODELS]
