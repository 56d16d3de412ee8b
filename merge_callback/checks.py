"""Checks that several options share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

import torch

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    if value == 0 and value is not False:
        return 0
    try:
        return positive(option, value)
    except ValueError:
        raise ValueError(f"{option}={value!r} must be 0 or a positive whole number") from None


def true_or_false(option: str, value: bool) -> bool:
    """``value`` if it is one of the two; ``"no"`` would pass for true.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{option}={value!r} must be True or False")
    return value


def one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """``value``, which has to be one of ``choices``.

    Raises:
        ValueError: otherwise.
    """
    if value not in choices:
        raise ValueError(f"{option}={value!r} must be one of {', '.join(map(repr, choices))}")
    return value


def patterns(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Name patterns as a tuple; one string is one pattern.

    Raises:
        ValueError: for anything that is not a string in it.
    """
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{option}={value!r} must be a list of name patterns, e.g. ['*.router.bias']")
    return tuple(found)


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` matches one of the ``fnmatch`` patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def resolve_dtype(option: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by its short name (``"bf16"``) or itself.

    Raises:
        ValueError: for any other name or dtype.
    """
    found = dtype
    if isinstance(dtype, str):
        found = DTYPES.get(dtype, getattr(torch, dtype.removeprefix("torch."), None))
    if found is not None and found in DTYPES.values():
        return found  # type: ignore[return-value]
    if dtype is None:
        return None
    raise ValueError(f"{option}={dtype!r} must be one of {', '.join(DTYPES)}, or None")


def resolve_size(option: str, size: int | str) -> int:
    """``"5GB"`` (or a number of bytes) in bytes.

    Raises:
        ValueError: for any other text, or a size that is not positive.
    """
    nbytes = size
    if isinstance(size, str):
        text = size.upper().replace(" ", "")
        unit = next((u for u in ("TB", "GB", "MB", "KB", "B") if text.endswith(u)), "")
        with suppress(ValueError, OverflowError):
            nbytes = int(float(text.removesuffix(unit)) * _UNITS[unit or "B"])
    try:
        return positive(option, nbytes)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"{option}={size!r} must be a size like '5GB', or bytes") from None
