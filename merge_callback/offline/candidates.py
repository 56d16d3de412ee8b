"""The merges that a sweep tries: which checkpoints, by which method, in which order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from merge_callback.merging import Extrapolate, MergeMethod, Sma, Weighted, resolve_method

SEARCHES = ("greedy", "metric-weighted")
"""Methods of a sweep alone: they choose by the scores of other merges."""

_COARSE = [0.25 * i for i in range(9)]
_HALVINGS = 2


@dataclass(frozen=True)
class Candidate:
    """One merge that is tried.

    Args:
        name: for people; no other candidate of the sweep has it.
        method: how.
        inputs: which of the sweep's checkpoints, by their places, ascending.
    """

    name: str
    method: MergeMethod
    inputs: tuple[int, ...]


Search = Generator[Sequence[Candidate], Sequence[float], None]
"""Yields candidates, receives their scores (higher is better, minus infinity for NaN), and yields more."""


def plain_candidates(
    methods: Sequence[tuple[str, dict[str, Any]]],
    lasts: Sequence[int | None],
    orders: Sequence[str],
    count: int,
) -> tuple[list[Candidate], list[str]]:
    """Every combination of methods, numbers of checkpoints and orders that means something.

    Args:
        methods: registered names, each with its options.
        lasts: how many of the newest checkpoints, not more than there are; ``None`` for all.
        orders: as every method's ``order``.
        count: of the checkpoints that there are.

    Returns:
        The candidates, and a line for each combination that was left out.

    Raises:
        ValueError: for an unknown method, or options that it does not have.
    """
    found: dict[str, Candidate] = {}
    out: list[str] = []
    for name, options in methods:
        resolve_method(name, **options)  # what is wrong with it is wrong with all of its combinations
    for (name, options), last, order in product(methods, lasts, orders):
        label = _label(name, options, last or count, order)
        try:
            method = resolve_method(name, **options, **_places(last, count, order))
        except ValueError as error:
            out.append(f"left out: {error}")
            continue
        found.setdefault(label, Candidate(label, method, tuple(range(count - (last or count), count))))
    return [*found.values()], list(dict.fromkeys(out))


def single(place: int) -> Candidate:
    """A checkpoint by itself."""
    return Candidate(f"checkpoint {place + 1}", Sma(), (place,))


def greedy_soup(inputs: Sequence[int]) -> Search:
    """The greedy soup of arXiv 2203.05482: best first, each is added if the mean does not get worse."""
    scores = yield [single(i) for i in inputs]
    order = [i for _, i in sorted(zip(scores, inputs, strict=True), key=lambda s: s[0], reverse=True)]
    kept, best = order[:1], max(scores)
    for place in order[1:]:
        trial = tuple(sorted([*kept, place]))
        told = ",".join(str(i + 1) for i in trial)
        (score,) = yield [Candidate(f"greedy [{told}]", Sma(), trial)]
        if score >= best and score > -math.inf:
            kept, best = [*trial], score


def metric_weighted(inputs: Sequence[int], temperature: float | None = None) -> Search:
    """The mean weighted by each checkpoint's own score (arXiv 2504.18580): ``softmax(score / T)``.

    Args:
        inputs: places of the checkpoints.
        temperature: T, in the metric's unit; default: the standard deviation of their scores.
    """
    scores = yield [single(i) for i in inputs]
    scored = [(i, score) for i, score in zip(inputs, scores, strict=True) if math.isfinite(score)]
    if len(scored) < 2:
        return
    values = [score for _, score in scored]
    t = temperature or statistics.pstdev(values) or 1.0
    weights = [math.exp((score - max(values)) / t) for score in values]
    method = Weighted(weights=tuple(w / math.fsum(weights) for w in weights))
    yield [Candidate(f"metric-weighted-{len(inputs)} T={t:.4g}", method, tuple(i for i, _ in scored))]


def line_search(start: Candidate) -> Search:
    """Tries ``extrapolate`` at λ = 0, .25, …, 2, then twice halfway to both sides of the best."""

    def at(scale: float) -> Candidate:
        method = replace(start.method, scale=scale)  # type: ignore[call-arg]
        return Candidate(f"{start.name} λ={scale:g}", method, start.inputs)

    assert isinstance(start.method, Extrapolate)
    tried: dict[float, float] = {}
    step, asked = _COARSE[1], _COARSE
    for _ in range(1 + _HALVINGS):
        scores = yield [at(scale) for scale in asked]
        tried |= zip(asked, scores, strict=True)
        best = max(tried, key=lambda scale: tried[scale])
        step /= 2
        asked = [scale for scale in (best - step, best + step) if scale >= 0]


def searches(
    names: Sequence[str], lasts: Sequence[int | None], count: int, temperature: float | None
) -> list[tuple[str, Callable[[], Search]]]:
    """The searches that are named, for each number of checkpoints that there are."""
    made: list[tuple[str, Callable[[], Search]]] = []
    for name, last in product(names, dict.fromkeys(last or count for last in lasts)):
        inputs = range(count - last, count)
        if name == "greedy":
            made.append((f"greedy-{last}", lambda inputs=inputs: greedy_soup(inputs)))  # type: ignore[misc]
        else:
            made.append(
                (f"{name}-{last}", lambda inputs=inputs: metric_weighted(inputs, temperature))  # type: ignore[misc]
            )
    return made


def _label(name: str, options: dict[str, Any], last: int, order: str) -> str:
    told = "".join(f" {option}={value}" for option, value in options.items())
    return f"{name}-{last}{told}" + ("" if order == "forward" else f" {order}")


def _places(last: int | None, count: int, order: str) -> dict[str, Any]:
    """``last`` and ``order`` of a method, as far as they change anything."""
    return {
        **({} if last is None or last == count else {"last": last}),
        **({} if order == "forward" else {"order": order}),
    }
