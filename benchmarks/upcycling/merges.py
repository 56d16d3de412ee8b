"""Merges of experts, with λ and density tuned on validation examples as in the paper's App. B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.upcycling.model import Task, Weights, accuracies, mean
from merge_callback import merge_state_dicts


def _range(first: int, last: int, step: int) -> list[float]:
    return [i / 100 for i in range(first, last + 1, step)]


GRIDS: dict[str, tuple[list[float], list[float]]] = {
    "average": ([1.0], [1.0]),
    "task_arithmetic": (_range(5, 100, 5), [1.0]),
    "ties": (_range(50, 150, 10), [0.1, 0.2, 0.3]),
    "dare": (_range(5, 55, 5), [0.2]),
}
"""Of each method the values of λ, and of the density."""

METHODS = tuple(GRIDS)


@dataclass(frozen=True)
class Merge:
    """A merge and its scores.

    Args:
        scale: λ that validation chose.
        density: that validation chose.
        validation: mean accuracy over the tasks, in percent.
        test: of each task.
    """

    method: str
    scale: float
    density: float
    validation: float
    test: list[float]


def merged(
    base: Weights, experts: Sequence[Weights], method: str, scale: float, density: float = 1.0
) -> dict[str, Tensor]:
    """θ_0 + λ Σ τ_t (task arithmetic, DARE), θ_0 + λ · the elected mean (TIES), or the plain mean."""
    if method == "average":
        return merge_state_dicts(experts, "sma")
    options: dict[str, Any] = {} if method == "task_arithmetic" else {"density": density}
    # λ of the paper's plain sum is λ K times the mean
    factor = scale if method == "ties" else scale * len(experts)
    return merge_state_dicts(experts, method, base=base, scale=factor, **options)


def tuned(
    base: Weights, experts: Sequence[Weights], tasks: Sequence[Task], methods: Sequence[str]
) -> dict[str, Merge]:
    """The best merge by each method, judged on all tasks."""
    return {method: _tuned(base, experts, tasks, method) for method in methods}


def _tuned(base: Weights, experts: Sequence[Weights], tasks: Sequence[Task], method: str) -> Merge:
    scales, densities = GRIDS[method]

    def score(scale: float, density: float) -> float:
        return mean(accuracies(merged(base, experts, method, scale, density), tasks, "validation"))

    # λ at the middle density first, then the other densities at this λ
    middle = densities[len(densities) // 2]
    value, scale = search(scales, lambda x: score(x, middle))
    others = [(score(scale, density), density) for density in densities if density != middle]
    value, density = max([(value, middle), *others])
    test = accuracies(merged(base, experts, method, scale, density), tasks, "test")
    return Merge(method, scale, density, value, test)


def search(grid: Sequence[float], score: Callable[[float], float]) -> tuple[float, float]:
    """The best score on a grid, and where: every fourth value first, then the neighbours of the best.

    A score that rises and falls once is found with half the grid's evaluations.
    """
    known: dict[int, float] = {}
    wanted = set(range(0, len(grid), 4))
    for reach in (2, 1, 0):
        known |= {i: score(grid[i]) for i in wanted - known.keys()}
        best = max(known, key=lambda i: known[i])
        wanted = {i for i in (best - reach, best + reach) if 0 <= i < len(grid)}
    return known[best], grid[best]
