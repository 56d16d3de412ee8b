"""The merge of an expert that trains with its finished siblings, tuned at each validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from merge_callback.engine.siblings import Siblings
from merge_callback.merging import MergeMethod
from merge_callback.messages import info
from merge_callback.metrics import EXPERTS
from merge_callback.options import Options
from merge_callback.publish.export import Naming
from merge_callback.sharding import Ranks, Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.layout import Layout

_STEPS = [round(0.05 * i, 2) for i in range(1, 21)]
GRIDS: Mapping[str, Mapping[str, list[float]]] = {
    "task_arithmetic": {"scale": _STEPS},
    "ties": {"scale": [round(0.5 + 0.1 * i, 1) for i in range(11)], "density": [0.1, 0.2, 0.3]},
    "dare": {"scale": _STEPS[:11]},
}
"""What is tried for each method on validation data (*Less Is More*, App. B)."""

_PLAIN_SUM = {"task_arithmetic", "dare"}  # as the paper defines them, which the grids are for

Metrics = Mapping[str, Any]
"""Of a validation, by their names: numbers, or tensors that hold one."""


class ExpertMerge:
    """Merges the live expert with its siblings, and finds the best λ and density on validation data.

    The first time all of the method's grid is tried; afterwards what is next to the best of the last time, as
    long as that is better.

    Args:
        siblings: the others.
        method: how; a method of ``GRIDS`` is tuned, if ``is_tuned``.
        is_tuned: whether the method's options are ours to choose.
        ranks: the run's.
    """

    def __init__(self, siblings: Siblings, method: MergeMethod, is_tuned: bool, ranks: Ranks) -> None:
        self._siblings, self._ranks = siblings, ranks
        self._grid = dict(GRIDS.get(method.name, {})) if is_tuned else {}
        self._method = method
        if self._grid and method.name in _PLAIN_SUM:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it overshoots on the snapshots of one run: these are not
                self._method = replace(method, normalize=False)  # type: ignore[call-arg]
        self._best: tuple[int, ...] | None = None
        self._has_told = False

    @classmethod
    def of(
        cls, options: Options, model: ModelTensors, naming: Naming, sharding: Sharding, layout: Layout
    ) -> ExpertMerge | None:
        """The merge of a run's expert with its siblings, if the options name any.

        Raises:
            ValueError, OSError: on all ranks, if one can't open them.
        """
        if (given := options.experts) is None:
            return None
        siblings = sharding.ranks.agreed(
            partial(Siblings, given.base, given.paths, model, naming, sharding, layout, options.exclude)
        )
        if siblings.apart:
            info(
                f"merge: {', '.join(sorted(siblings.apart)[:5])}{' …' * (len(siblings.apart) > 5)} stay this "
                "expert's own in merges with others: the base has no such tensors, or of other shapes"
            )
        return cls(siblings, given.method, given.is_tuned, sharding.ranks)

    def validate(
        self,
        model: ModelTensors,
        evaluate: Callable[[Arena], Metrics | None],
        lower_is_better: Mapping[str, bool | None],
        wanted: Sequence[str] = (),
    ) -> tuple[Metrics, dict[str, float]] | None:
        """Evaluates the merges of the live weights; all ranks have to.

        Args:
            model: the live tensors.
            evaluate: gives the metrics of a merge; ``None`` if it failed, on any rank.
            lower_is_better: the metrics' names, each with the direction if that is known.
            wanted: the names of those that something monitors, by which λ and density are rather tuned.

        Returns:
            The metrics of the best merge, and what to log of it: its λ and density, the number of merges
            that were evaluated, and the interference with each sibling. ``None`` if an evaluation failed.

        Raises:
            Exception: on all ranks, if a merge can't be made on one of them.
        """
        name = self._tuned_by(lower_is_better, wanted) if self._grid else None
        sign = -1.0 if name and lower_is_better[name] else 1.0
        self._ranks.agreed(partial(self._siblings.take, model))
        found: dict[tuple[int, ...], Metrics] = {}
        scores: dict[tuple[int, ...], float] = {}

        def value(at: tuple[int, ...]) -> float:
            if at not in scores:
                merged = self._ranks.agreed(partial(self._siblings.merge, self._at(at)))
                if (metrics := evaluate(merged)) is None:
                    raise _FailedError
                found[at] = metrics
                own = sign * float(metrics.get(name, math.nan)) if name else 0.0
                worth = self._ranks.from_first(own)  # it may differ by rank
                scores[at] = -math.inf if math.isnan(worth) else worth
            return scores[at]

        try:
            best = self._search(value) if name else self._start
            value(best)
        except _FailedError:
            return None
        self._best = best
        numbers = {
            **{o: float(getattr(self._at(best), o, math.nan)) for o in ("scale", "density")},
            "evaluated": float(len(found)),
            **self._ranks.from_first(self._ranks.agreed(self._siblings.interference)),
        }
        return found[best], {f"{EXPERTS}{n}": v for n, v in numbers.items() if not math.isnan(v)}

    def state_dict(self) -> dict[str, Any]:
        """The best options found last, as primitives."""
        return {"best": dict(zip(self._grid, self._best, strict=True)) if self._best else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``; of another method, it begins from scratch."""
        if state["best"].keys() == self._grid.keys():
            self._best = tuple(
                min(max(0, state["best"][name]), len(values) - 1) for name, values in self._grid.items()
            )

    def _tuned_by(self, lower: Mapping[str, bool | None], wanted: Sequence[str]) -> str | None:
        """The metric to tune by: one that is monitored, else a loss, else any with a known direction."""
        named = [*wanted, *sorted(lower, key=lambda name: "loss" not in name)]
        name = next((name for name in named if lower.get(name) is not None), None)
        if not self._has_told:
            self._has_told = True
            what = " and ".join(self._grid)
            how = (
                f"tuned by its {name}"
                if name
                else (
                    "not tuned, since it is not known of any metric whether lower is better; pass "
                    "lower_is_better=[…], or higher_is_better="
                )
            )
            info(f"merge: {what} of the merge with the other experts: {how}")
        return name

    @property
    def _start(self) -> tuple[int, ...]:
        """What is taken before anything is tuned: the method's own options, or what is nearest to them."""
        if self._best is not None:
            return self._best
        return tuple(
            min(range(len(values)), key=lambda i: abs(values[i] - getattr(self._method, name)))
            for name, values in self._grid.items()
        )

    def _at(self, at: tuple[int, ...]) -> MergeMethod:
        chosen: dict[str, Any] = {
            name: values[i] for (name, values), i in zip(self._grid.items(), at, strict=True)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return replace(self._method, **chosen) if chosen else self._method

    def _search(self, value: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
        if self._best is None:
            return max(product(*(range(len(values)) for values in self._grid.values())), key=value)
        best = self._best
        while (near := max([best, *self._next_to(best)], key=value)) != best:
            best = near
        return best

    def _next_to(self, at: tuple[int, ...]) -> list[tuple[int, ...]]:
        moved = ((*at[:axis], at[axis] + way, *at[axis + 1 :]) for axis in range(len(at)) for way in (-1, 1))
        sizes = [len(values) for values in self._grid.values()]
        return [m for m in moved if all(0 <= i < size for i, size in zip(m, sizes, strict=True))]


class _FailedError(Exception):
    """An evaluation failed."""
