"""Numbers, as a page shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]
"""A step, and a value."""


_MOST = 1e300  # beyond it the span of an axis overflows

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"


def number(value: object) -> float | None:
    """A value of an event as a finite number that can be drawn; ``None`` if it can't be."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) < _MOST else None


def shown(value: float | None, digits: int = 4) -> str:
    """A number to read: 1.234, 0.0001234, 1,234,567.

    >>> shown(1.23456), shown(1234567.0), shown(0.00012344), shown(None), shown(0.0)
    ('1.235', '1,234,567', '0.0001234', '–', '0')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A gain: its sign is always there.

    >>> signed(0.0812), signed(-0.5), signed(None)
    ('+0.0812', '−0.500', '–')
    """
    return f"+{shown(value, digits)}" if value is not None and value > 0 else shown(value, digits)


def compact(value: float) -> str:
    """A tick of an axis: 400, 4k, 1.5M.

    >>> compact(400), compact(1500), compact(2e6), compact(0.25), compact(0.00002)
    ('400', '1.5k', '2M', '0.25', '2e-5')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}".replace("-", MINUS)
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}".replace("-", MINUS)


def in_bytes(size: float | None) -> str:
    """A size.

    >>> in_bytes(999), in_bytes(16_400_000), in_bytes(None)
    ('999 B', '16.4 MB', '–')
    """
    if size is None:
        return MISSING
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def in_seconds(value: float) -> str:
    """A duration: 3.21 ms, 4.5 s, 3 min, 2.5 h.

    >>> in_seconds(0.00321), in_seconds(4.52), in_seconds(200), in_seconds(9000)
    ('3.21 ms', '4.5 s', '3.3 min', '2.5 h')
    """
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 90:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.2g} min" if value < 5400 else f"{value / 3600:,.1f} h"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` or fewer, but two at least if there are any.

    >>> ticks(0, 5400), ticks(1.2, 1.57)
    ([0.0, 2000.0, 4000.0], [1.2, 1.3, 1.4, 1.5])
    """
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span))
    for step in (power * f for f in (0.1, 0.2, 0.5, 1, 2, 5)):
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        if count <= most:
            break
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round((first + i) * step, digits) for i in range(count)]


def thinned(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Points with the lowest and the highest of each stretch, in order, if there are too many to draw."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
