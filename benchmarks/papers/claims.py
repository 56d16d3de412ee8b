"""The claims by name, and what a claim's module consists of."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from matplotlib.figure import Figure

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Study
from benchmarks.papers.verdict import Verdict

NAMES = (
    "phases",
    "methods",
    "window",
    "diversity",
    "anneal",
    "init",
    "recovery",
    "cross",
    "geometry",
    "scale",
    "candidates",
)
"""The claims' modules, ``benchmarks.papers.<name>``, in the order of the page."""


class Claim(Protocol):
    """What the module of a claim has; figures are a tree of plain numbers and text, as in its JSON file."""

    TITLE: str
    """A heading."""
    CONCLUSION: str
    """What a user should conclude, for the page."""

    def runs(self, study: Study, seed: int) -> Sequence[Spec]:
        """The runs that a seed's figures need."""

    def measure(self, study: Study) -> dict[str, Any]:
        """The figures, with a list of one number per seed at each place."""

    def verdicts(self, figures: dict[str, Any]) -> list[Verdict]:
        """What they say about the papers' claims."""

    def draw(self, figures: dict[str, Any]) -> Figure:
        """A picture of them."""


def claim(name: str) -> Claim:
    """The module of a claim."""
    return cast(Claim, import_module(f"benchmarks.papers.{name}"))


def specs(name: str, study: Study, seed: int) -> Sequence[Spec]:
    """The runs of a seed; none of a seed beyond the module's ``SEEDS``, which the dearest claims have."""
    module = claim(name)
    return module.runs(study, seed) if seed < getattr(module, "SEEDS", seed + 1) else ()


def ready(name: str, study: Study) -> list[int]:
    """The seeds whose runs are finished."""
    found = {seed: specs(name, study, seed) for seed in study.seeds}
    return [seed for seed, needed in found.items() if needed and study.is_ready(needed)]
