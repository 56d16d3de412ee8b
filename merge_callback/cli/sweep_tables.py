"""What a sweep has found, as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from merge_callback.noise import spread
from merge_callback.offline.sweep import Objective, Scored
from merge_callback.offline.sweep_results import SweepResults

TABLE, PICTURE = "results.csv", "pareto.png"
_SHOWN = 40  # merges in the table on the terminal


def as_csv(ranked: Sequence[Scored]) -> bytes:
    """All merges with all metrics."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for one in ranked for name in one.metrics))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["candidate", "method", "checkpoints", *names])
    for one in ranked:
        values = [one.metrics.get(name, "") for name in names]
        writer.writerow([one.candidate.name, one.candidate.method.name, len(one.candidate.inputs), *values])
    return text.getvalue().encode()


def as_table(ranked: Sequence[Scored], best: Scored, metric: str) -> Iterator[str]:
    """Lines for the terminal: the best marked, the selected metric first."""
    names = [metric, *(name for name in best.metrics if name != metric)][:5]
    width = max(len(one.candidate.name) for one in ranked[:_SHOWN])
    yield f"  {'merge':{width}}" + "".join(f"  {name[-14:]:>14}" for name in names)
    for one in ranked[:_SHOWN]:
        mark = "*" if one is best else " "
        cells = "".join(f"  {one.metrics.get(name, math.nan):14.6g}" for name in names)
        yield f"{mark} {one.candidate.name:{width}}{cells}"
    if len(ranked) > _SHOWN:
        yield f"  … {len(ranked) - _SHOWN} more in {TABLE}"


def noise_of(found: Sequence[Scored], metric: str) -> str:
    """How far the checkpoints' own scores scatter around their trend, if enough of them are known."""
    single = sorted(
        (one.candidate.inputs, one.metrics[metric]) for one in found if len(one.candidate.inputs) == 1
    )
    noise = spread([value for _, value in single if math.isfinite(value)])
    return (
        "" if noise is None else f"single checkpoints scatter by {noise:.2g} around their trend in {metric}"
    )


def pictured(
    asked: Sequence[str] | None,
    objective: Objective,
    ranked: Sequence[Scored],
    alone: Scored,
    results: SweepResults,
) -> list[str]:
    """Draws two metrics, if there are two; returns why not.

    Args:
        asked: their names; default: the selected one and the next.
        objective: what is to be best.
        ranked: all merges.
        alone: what they are compared with.
        results: where the picture goes.

    Raises:
        ValueError: for a metric that there is not.
    """
    chosen_one = objective.of(alone.metrics)
    pair = asked or [chosen_one, *(name for name in alone.metrics if name != chosen_one)][:2]
    if len(pair) < 2:
        return []
    if missing := [name for name in pair if name not in alone.metrics]:
        raise ValueError(f"--pareto {missing[0]}: the evaluation gives {', '.join(alone.metrics)}")
    if find_spec("matplotlib") is None:
        return ["no picture is drawn: matplotlib is missing: pip install 'merge-callback[demo]'"]
    from merge_callback.analysis.pareto import draw_pareto, pareto_front

    try:
        signs = [-1 if objective.lower(name) else 1 for name in pair]
    except ValueError as error:
        return [f"no picture is drawn: {error}"]
    points = {one.candidate.name: tuple(one.metrics.get(name, math.nan) for name in pair) for one in ranked}
    finite: dict[str, Any] = {n: p for n, p in points.items() if all(map(math.isfinite, p))}
    front = pareto_front({n: (p[0] * signs[0], p[1] * signs[1]) for n, p in finite.items()})
    told = tuple(
        f"{n} ({'lower' if s < 0 else 'higher'} is better)" for n, s in zip(pair, signs, strict=True)
    )
    reference = alone.candidate.name if alone.candidate.name in finite else None
    return [results.replace(PICTURE, draw_pareto(finite, front, (told[0], told[1]), reference))]
