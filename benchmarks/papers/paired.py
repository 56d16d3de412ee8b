"""Differences between figures of the same seeds, and how they are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.papers.verdict import Interval, interval


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """a − b, seed by seed."""
    return interval([x - y for x, y in zip(a, b, strict=True)])


def ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    """a / b in percent, seed by seed."""
    return interval([100 * x / y for x, y in zip(a, b, strict=True)])


def extent(intervals: Iterable[Interval], digits: int = 3, unit: str = "", sign: bool = True) -> str:
    """From the least mean to the greatest, with the widest interval: ``+.012 to +.020 (± .003 at most)``."""
    found = list(intervals)
    low, high = (Interval(pick(each.mean for each in found), 0.0) for pick in (min, max))
    ends = [each.shown(digits, sign).split(" ± ")[0] for each in (low, high)]
    widest = max(each.half for each in found)
    return f"{ends[0]} to {ends[1]}{unit} (± {widest:.{digits}f} at most)"


def listed(found: Mapping[Any, Interval | Sequence[Interval]], digits: int = 3) -> str:
    """``name +.012 ± .003, +.020 ± .002; name …``."""
    parts = []
    for name, each in found.items():
        several = [each] if isinstance(each, Interval) else each
        parts.append(f"{name} {', '.join(one.shown(digits) for one in several)}")
    return "; ".join(parts)
