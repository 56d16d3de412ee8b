"""A claim."""

from __future__ import annotations

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Study


def runs(study: Study, seed: int) -> list[Spec]:
    return [*study.standard(seed), cosine(study, seed)]


def cosine(study: Study, seed: int) -> Spec:
    """A run whose learning rate falls along a cosine to a tenth, as Pythia's."""
    return study.trunk("dense", seed, schedule="cosine", floor=0.1)
