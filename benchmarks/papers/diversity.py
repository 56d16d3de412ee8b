"""Diversity."""

from __future__ import annotations

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Study


def runs(study: Study, seed: int) -> list[Spec]:
    return study.standard(seed)
