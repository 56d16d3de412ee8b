"""Checks that several options share."""

from __future__ import annotations

from collections.abc import Sequence


def positive(option: str, value: float) -> int:
    """``value`` if it is a positive whole number.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 4e9 in YAML is a float
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{option}={value!r} must be a positive whole number")
    return value


def not_negative(option: str, value: float) -> int:
    """``value`` if it is 0 or a positive whole number.

    Raises:
        ValueError: otherwise.
    """
    return 0 if value == 0 and value is not False else positive(option, value)


def one_of(option: str, value: str, choices: Sequence[str]) -> None:
    """Makes sure that ``value`` is one of ``choices``.

    Raises:
        ValueError: otherwise.
    """
    if value not in choices:
        raise ValueError(f"{option}={value!r} must be one of {', '.join(map(repr, choices))}")


def patterns(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Name patterns as a tuple; one string is one pattern.

    Raises:
        ValueError: for anything that is not a string in it.
    """
    found = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{option}={value!r} must be a list of name patterns, e.g. ['*.router.bias']")
    return found
