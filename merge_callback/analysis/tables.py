"""Distances as text: tables for the terminal, tidy rows for a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from merge_callback.analysis.pairwise import changes, consecutive

WHOLE_MODEL = "whole model"

_COLUMNS = "group first second lag first_step second_step first_tokens second_tokens rms change_percent"


@dataclass(frozen=True)
class Source:
    """The checkpoint of one row and column of the distances.

    Args:
        path: the checkpoint's path.
        step: optimizer steps, if known.
        tokens: tokens seen, if known.
    """

    path: Path
    step: int | None = None
    tokens: int | None = None


def source_table(sources: Sequence[Source]) -> Iterator[str]:
    """The checkpoints, with the numbers that the other tables use for them."""
    yield f"{'':5}{'step':>10}{'tokens':>18}  checkpoint"
    for number, s in enumerate(sources, start=1):
        yield f"{_label(number)}{_grouped(s.step):>10}{_grouped(s.tokens):>18}  {s.path}"


def matrix_table(
    distances: Tensor, what: str = "RMS distance", unit: str = ", in the unit of the weights"
) -> Iterator[str]:
    """The distances of all pairs of checkpoints, in units of a power of ten."""
    exponent = power_of_ten(distances)
    yield f"{what} in 1e{exponent:+03d}{unit}"
    count = len(distances)
    yield f"{'':5}" + "".join(f"{f'[{j}]':>8}" for j in range(1, count))
    for i in range(1, count):
        cells = (f"{value / 10**exponent:8.3f}" for value in distances[i, :i].tolist())
        yield f"{_label(i + 1)}" + "".join(cells)


def curve_table(distances: Tensor, lags: Sequence[int]) -> Iterator[str]:
    """The distance to the checkpoint ``lag`` before, and its change from the first such distance."""
    exponent = power_of_ten(distances)
    yield f"distance to an earlier checkpoint in 1e{exponent:+03d}, and its change from the first one in %"
    yield f"{'':5}" + "".join(f"{f'{lag} before':>12}{'change':>8}" for lag in lags)
    curves = {lag: consecutive(distances, lag) for lag in lags}
    for i in range(min(lags), len(distances)):
        yield _label(i + 1) + "".join(_curve_cell(curves[lag], i - lag, exponent) for lag in lags).rstrip()


def layer_table(layers: Mapping[str, Tensor], lag: int) -> Iterator[str]:
    """The same curve of every layer, one per line."""
    exponent = max(map(power_of_ten, layers.values()))
    width = max(map(len, layers))
    yield f"distance to the checkpoint {lag} before in 1e{exponent:+03d}, and the last one's change in %"
    count = len(next(iter(layers.values())))
    yield " " * width + "".join(f"{f'[{i + 1}]':>8}" for i in range(lag, count)) + f"{'change':>8}"
    for group, distances in layers.items():
        curve = consecutive(distances, lag)
        cells = "".join(f"{value / 10**exponent:8.3f}" for value in curve)
        yield f"{group:{width}}{cells}{_signed(changes(curve)[-1]):>8}"


def write_csv(
    path: Path,
    sources: Sequence[Source],
    groups: Mapping[str, Tensor],
    functional: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes one line per group and pair, the older checkpoint first; ``change_percent`` is relative to the
    first pair of the same lag. Checkpoints are named by their paths, and unknown values are left empty.

    Args:
        path: the file; replaced if it exists.
        sources: the checkpoints of the rows and columns.
        groups: the distances, ``(N, N)``, of the whole model and of any layers.
        functional: the functional distances of the whole model, ``(N, N)`` each: one more column each.
    """
    functional = functional or {}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS.split(), *functional])
        for group, distances in groups.items():
            more = functional if group == WHOLE_MODEL else {}
            writer.writerows(_csv_rows(group, sources, distances, more))


def _csv_rows(
    group: str, sources: Sequence[Source], distances: Tensor, functional: Mapping[str, Tensor]
) -> Iterator[list[object]]:
    for lag in range(1, len(sources)):
        curve = consecutive(distances, lag)
        more = [consecutive(matrix, lag) for matrix in functional.values()]
        pairs = zip(sources, sources[lag:], curve, changes(curve), strict=False)
        for i, (a, b, value, change) in enumerate(pairs):
            pair = [a.path, b.path, lag, a.step, b.step, a.tokens, b.tokens]
            yield [group, *pair, value, None if math.isnan(change) else change, *(m[i] for m in more)]


def power_of_ten(distances: Tensor) -> int:
    """The exponent of the largest distance, 0 if all are 0."""
    largest = float(distances.nan_to_num(posinf=0.0).max())
    return math.floor(math.log10(largest)) if largest else 0


def _label(number: int) -> str:
    return f"{f'[{number}]':>5}"


def _grouped(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _curve_cell(curve: Sequence[float], index: int, exponent: int) -> str:
    if index < 0:
        return " " * 20
    return f"{curve[index] / 10**exponent:12.3f}{_signed(changes(curve)[index]) if index else '-':>8}"


def _signed(change: float) -> str:
    return "-" if math.isnan(change) else f"{change:+.1f}"
