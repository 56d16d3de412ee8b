"""What a merging method is, and the registry of all of them."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

METHODS: dict[str, type[MergeMethod]] = {}
"""Every registered method by its name."""


class MergeMethod:
    """A way to merge snapshots: a dataclass of options with a name and a source.

    Register an own one in five lines::

        @register_method("middle", reference="our lab notes, 2026")
        @dataclass(frozen=True)
        class Middle(LinearMethod):
            def raw_weights(self, positions):
                return [float(i == len(positions) // 2) for i in range(len(positions))]
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""

    def options(self) -> dict[str, Any]:
        """The options as primitives, for provenance."""
        return {key: v if _is_primitive(v) else repr(v) for key, v in asdict(self).items()}  # type: ignore[call-overload]


class LinearMethod(MergeMethod, ABC):
    """A method that is one weighted sum: ``Σ w̃_i θ_i`` with ``w̃ = w / Σw``, oldest snapshot first."""

    @abstractmethod
    def raw_weights(self, positions: Sequence[float]) -> Sequence[float]:
        """One weight a snapshot, oldest first, not yet normalised.

        Args:
            positions: where each snapshot lies along the run (tokens, or steps), ascending.
        """

    def normalised_weights(self, positions: Sequence[float]) -> list[float]:
        """The normalised weights of snapshots at ``positions`` (tokens, or steps), oldest first.

        Raises:
            ValueError: for no snapshots, or weights that are not finite or sum to about 0.
        """
        if not positions:
            raise ValueError(f"method {self.name!r} needs at least one snapshot to merge, got none")
        return normalised(self.raw_weights(positions))


M = TypeVar("M", bound=type[MergeMethod])


def register_method(name: str, reference: str) -> Callable[[M], M]:
    """Class decorator: makes a method known as ``name``, with the source of its definition."""

    def register(method: M) -> M:
        if name in METHODS:
            raise ValueError(f"a merging method named {name!r} is already registered: {METHODS[name]}")
        method.name, method.reference = name, reference
        METHODS[name] = method
        return method

    return register


def resolve_method(method: str | MergeMethod, **options: Any) -> MergeMethod:
    """The method object for a name (with its options) or for itself.

    Raises:
        ValueError: for an unknown name (the known ones are listed) or options it does not have.
    """
    if isinstance(method, MergeMethod):
        if options:
            raise ValueError(f"options {sorted(options)} were given beside the method object {method!r}")
        return method
    if method not in METHODS:
        raise ValueError(f"unknown merging method {method!r}; choose one of {', '.join(sorted(METHODS))}")
    try:
        return METHODS[method](**options)
    except TypeError as error:
        raise ValueError(f"method {method!r}: {error}") from None


def normalised(weights: Sequence[float]) -> list[float]:
    """``w / Σw``; refuses non-finite weights and a sum near 0, warns of negative ones.

    Raises:
        ValueError: names the weights and the reason.
    """
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights {list(weights)} are not all finite")
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    if abs(total) <= 1e-6 * size or size == 0:
        raise ValueError(f"weights {list(weights)} sum to {total:g}, so they cannot be normalised to 1")
    if min(weights) < 0:
        warnings.warn(f"weights {list(weights)}: negative weights extrapolate", stacklevel=2)
    return [w / total for w in weights]


def _is_primitive(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_primitive, value))
    return value is None or isinstance(value, (str, int, float, bool))
