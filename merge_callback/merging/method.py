"""The interface of merging methods, and their registry."""

from __future__ import annotations

import math
import random
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from merge_callback.checks import one_of, positive
from merge_callback.reduce import one_pass
from merge_callback.sharding import Piece, Ranks

Need = Literal["pairs", "task vectors", "randomness", "global sums"]

Order = Literal["forward", "reversed", "random"]
"""Which snapshot takes which place in a method: the oldest the first, the newest the first, or any."""

T = TypeVar("T")

METHODS: dict[str, type[MergeMethod]] = {}
"""Every registered method by its name."""


@dataclass(frozen=True)
class Shard:
    """This process's part of a tensor that is split over several processes.

    Args:
        piece: the part.
        ranks: the processes; each of them merges the same tensors in the same order.
    """

    piece: Piece
    ranks: Ranks


@dataclass(frozen=True)
class Inputs:
    """One tensor of every snapshot, or this process's part of it.

    Args:
        name: the tensor's name.
        tensors: flat, oldest snapshot first; one floating-point dtype, size and device. Never written to.
        base: the same tensor of another θ_init, if one was given.
        shard: which part they are. A method that needs global sums adds them up over its ranks.
    """

    name: str
    tensors: Sequence[Tensor]
    base: Tensor | None = None
    shard: Shard | None = None

    @property
    def whole_size(self) -> int:
        """Number of elements of the whole tensor."""
        return self.tensors[0].numel() if self.shard is None else math.prod(self.shard.piece.whole)

    def total(self, numbers: Tensor) -> Tensor:
        """Sums numbers (on the CPU) over all parts of the tensor, in place."""
        return numbers if self.shard is None else self.shard.ranks.total(numbers)


@dataclass(frozen=True)
class Trajectory:
    """The positions of the snapshots in their run, oldest first.

    Args:
        positions: tokens (or steps), ascending.
        steps: optimizer steps, which randomness is keyed on.
    """

    positions: Sequence[float]
    steps: Sequence[int]

    @classmethod
    def even(cls, count: int) -> Trajectory:
        """Evenly spaced snapshots, if nothing is known of them."""
        return cls(list(range(count)), list(range(count)))


@dataclass(frozen=True)
class MergeMethod(ABC):
    """A way to merge snapshots: a dataclass of options with a name, a source, and its needs.

    A method of your own that is a weighted sum takes five lines, see ``register_method``. Any other::

        @register_method("median", reference="our lab notes, 2026")
        class Median(MergeMethod):
            def merge(self, inputs, out, trajectory, survey=None):
                out.copy_(torch.stack(list(inputs.tensors)).float().median(0).values)

    Every method has three more options, to be given by name, e.g. ``Wsm(last=5, order="reversed")``.

    Args:
        last: how many of the newest snapshots are merged at most; default: all that are given.
        order: ``"reversed"`` gives the newest snapshot the place of the oldest, ``"random"`` each one any.
        order_seed: of a random order, which depends on it and on the newest snapshot's step.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]] = ()

    last: int | None = field(default=None, kw_only=True)
    order: Order = field(default="forward", kw_only=True)
    order_seed: int = field(default=0, kw_only=True)

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__.lower()  # until it is registered
        if "__repr__" not in vars(cls):
            cls.__repr__ = MergeMethod.__repr__  # type: ignore[method-assign]  # else a dataclass makes one

    def __repr__(self) -> str:
        own = [f.name for f in own_options(type(self))]
        told = [*own, *(n for n, f in _COMMON.items() if n not in own and getattr(self, n) != f.default)]
        told = [f"{name}={getattr(self, name)!r}" for name in told]
        return f"{type(self).__qualname__}({', '.join(told)})"

    def check_selection(self) -> None:
        """Makes sure that ``last`` and ``order`` have a meaning.

        Raises:
            ValueError: for a ``last`` below 2, or an order that there is not, or that changes nothing.
        """
        last, order = self.newest, self.arrangement
        if last is not None and positive("last", last) < 2:
            raise ValueError(f"{self.name}: last={last} leaves nothing to merge; choose 2 or more")
        one_of("order", order, ("forward", "reversed", "random"))
        if order != "forward" and self.name == "sma":
            raise ValueError(f"sma: order={order!r} changes nothing, as all snapshots weigh the same")
        if order != "forward" and getattr(self, "extrapolates", False):
            raise ValueError(f"{self.name}: order={order!r} has no meaning: it goes on along the run")

    def _selection(self, name: str) -> Any:
        """One of the options that all methods have; its default if the method has its own by that name."""
        common = _COMMON[name]
        is_common = type(self).__dataclass_fields__[name] is common
        return getattr(self, name) if is_common else common.default

    @property
    def newest(self) -> int | None:
        """How many of the newest snapshots are merged at most; ``None`` for all."""
        return self._selection("last")  # type: ignore[no-any-return]

    @property
    def arrangement(self) -> Order:
        """Which snapshot takes which place: the order that was chosen."""
        return self._selection("order")  # type: ignore[no-any-return]

    @property
    def label(self) -> str:
        """What tells it from others of its kind: its name, ``last`` and order.

        >>> from merge_callback.merging import Wsm
        >>> Wsm(last=5, order="reversed").label
        'wsm-5-reversed'
        """
        told = (self.name, self.newest, None if self.arrangement == "forward" else self.arrangement)
        return "-".join(re.sub(r"[^\w.+=-]", "_", str(part)) for part in told if part)

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """The newest ``last`` of some snapshots, oldest first."""
        return snapshots if (last := self.newest) is None else snapshots[-last:]

    def places(self, trajectory: Trajectory) -> list[int]:
        """For each place in the method, which of the snapshots takes it, in the order that was chosen."""
        order = list(range(len(trajectory.steps)))
        if (chosen := self.arrangement) == "reversed":
            order.reverse()
        elif chosen == "random":
            random.Random(f"{self.order_seed} {trajectory.steps[-1]}").shuffle(order)
        return order

    def arranged(self, snapshots: Sequence[T], trajectory: Trajectory) -> tuple[Sequence[T], Trajectory]:
        """Snapshots and their trajectory in the order in which ``merge`` is to take them."""
        order = self.places(trajectory)
        steps = [trajectory.steps[i] for i in order]
        return [snapshots[i] for i in order], replace(trajectory, steps=steps)

    def survey(self, model: Iterable[Inputs], trajectory: Trajectory) -> Any:
        """Optional pre-pass over the whole model, for methods whose result for a tensor depends on others.

        Args:
            model: every tensor that is going to be merged; may be iterated several times.
            trajectory: the positions of the snapshots.
        """
        return None

    @abstractmethod
    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """Writes the merge of one tensor.

        Args:
            inputs: the tensor of every snapshot.
            out: flat, of the same size; any floating-point dtype. Receives one final cast.
            trajectory: the positions of the snapshots.
            survey: the result of ``survey``.
        """

    def options(self) -> dict[str, Any]:
        """The options as primitives, for provenance; those that all methods have if they are in use."""
        own, found = {f.name for f in own_options(type(self))}, {**vars(self), **asdict(self)}
        told = {n: v for n, v in found.items() if n in own or n not in _COMMON or v != _COMMON[n].default}
        return {key: v if _is_primitive(v) else repr(v) for key, v in told.items()}


_COMMON: dict[str, Field[Any]] = {f.name: f for f in fields(MergeMethod)}


def own_options(method: type[MergeMethod]) -> list[Field[Any]]:
    """The options of a method that are its own, without those that all methods have."""
    own = [f for f in fields(method) if f is not _COMMON.get(f.name)]
    return sorted(own, key=lambda f: f.name in _COMMON)  # one by such a name has the place of the common one


class LinearMethod(MergeMethod):
    """A method that is one weighted sum: ``Σ w̃_i θ_i`` with ``w̃ = w / Σw``, oldest snapshot first."""

    extrapolates: ClassVar[bool] = False
    """Whether negative weights are what it is for, and nothing to warn of."""

    @abstractmethod
    def raw_weights(self, positions: Sequence[float]) -> Sequence[float]:
        """One weight per snapshot, oldest first, not yet normalised.

        Args:
            positions: the position of each snapshot in the run (tokens, or steps), ascending.
        """

    def normalised_weights(self, positions: Sequence[float]) -> list[float]:
        """The normalised weights of snapshots at ``positions`` (tokens, or steps), oldest first.

        Raises:
            ValueError: for no snapshots, or weights that are not finite or sum to about 0.
        """
        if not positions:
            raise ValueError(f"method {self.name!r} needs at least one snapshot to merge, got none")
        return normalised(self.raw_weights(positions), self.extrapolates)

    def task_vector_weights(self, positions: Sequence[float]) -> list[float]:
        """What multiplies each task vector, if θ_init is not one of the snapshots; they need not sum to 1."""
        return self.normalised_weights(positions)

    def weights_along(self, trajectory: Trajectory, of_task_vectors: bool = False) -> list[float]:
        """What multiplies each snapshot of a trajectory, oldest first, with the places in their order.

        Args:
            trajectory: theirs.
            of_task_vectors: whether θ_init is not one of them, so that their task vectors are multiplied.

        Raises:
            ValueError: as ``normalised_weights``.
        """
        of = self.task_vector_weights if of_task_vectors else self.normalised_weights
        weights = of(trajectory.positions)
        by_snapshot = sorted(zip(self.places(trajectory), weights, strict=True))
        return [weight for _, weight in by_snapshot]

    def arranged(self, snapshots: Sequence[T], trajectory: Trajectory) -> tuple[Sequence[T], Trajectory]:
        """Snapshots stay as they are: their weights are arranged, so that sums are formed in one order."""
        return snapshots, trajectory

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """The weighted sum, in fp32 (fp64 for fp64 tensors)."""
        one_pass(inputs.tensors, self.weights_along(trajectory), out)


M = TypeVar("M", bound=type[MergeMethod])


def register_method(name: str, reference: str = "") -> Callable[[M], M]:
    """Class decorator that registers a method as ``name``, with the source of its definition.

    ``reference`` may be left out. A class that is not a dataclass becomes a frozen one: its annotated
    attributes are the method's options.

    Example:
        >>> @register_method("newest", reference="our lab notes, 2026")
        ... class Newest(LinearMethod):
        ...     count: int = 2
        ...     def raw_weights(self, positions):
        ...         return [float(i < self.count) for i in reversed(range(len(positions)))]

    Raises:
        ValueError: if the name is taken, or is not a string.
        TypeError: if it is not used as a decorator; if the class is not a method's or lacks its computation;
            if it has an ``__init__`` of its own, which would hide the options that every merge records.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a method needs a name, e.g. @register_method('newest'), got {name!r}")
    if not isinstance(reference, str):  # register_method("newest", Newest) would register nothing
        raise TypeError(f"register_method is a decorator: @register_method({name!r}) before the class")

    def register(method: M) -> M:
        if not (isinstance(method, type) and issubclass(method, MergeMethod)):
            raise TypeError(
                f"{getattr(method, '__name__', method)!r} can't be registered as a merging method: it must "
                "be a class, a subclass of LinearMethod (with raw_weights) or of MergeMethod (with merge)"
            )
        if missing := sorted(method.__abstractmethods__):
            raise TypeError(f"{method.__name__} lacks {', '.join(missing)}, which says what it computes")
        if "__dataclass_fields__" not in vars(method):
            if "__init__" in vars(method):
                raise TypeError(
                    f"{method.__name__} has an __init__ of its own: annotate its options in the class "
                    "instead, as in a dataclass"
                )
            dataclass(frozen=True)(method)  # in place
        if name in METHODS:
            raise ValueError(f"a merging method named {name!r} is already registered: {METHODS[name]}")
        method.name, method.reference = name, reference
        METHODS[name] = method
        return method

    return register


def resolve_method(method: str | MergeMethod, **options: Any) -> MergeMethod:
    """The method object for a name (with its options), or the given method object.

    Raises:
        ValueError: for an unknown name (the known ones are listed), options it does not have, or anything
            that is neither a name nor a method object.
    """
    if isinstance(method, MergeMethod):
        if options:
            raise ValueError(f"options {sorted(options)} were given with the method object {method!r}")
        method.check_selection()
        return method
    if not isinstance(method, str):
        raise ValueError(f"{method!r} is not a method: give a name, or an object, e.g. Ema(alpha=0.1)")
    if method not in METHODS:
        raise ValueError(f"unknown merging method {method!r}; choose one of {', '.join(sorted(METHODS))}")
    known = [option.name for option in fields(METHODS[method])]
    if unknown := sorted(set(options) - set(known)):
        own = [option.name for option in own_options(METHODS[method])]
        has = f"its options are {', '.join(own)}" if own else "it has no options"
        raise ValueError(f"method {method!r} has no option {', '.join(unknown)}; {has}")
    try:
        resolved = METHODS[method](**options)
    except TypeError as error:
        raise ValueError(f"method {method!r} does not take {options}: {error}") from None
    resolved.check_selection()
    return resolved


def normalised(weights: Sequence[float], extrapolates: bool = False) -> list[float]:
    """``w / Σw``; refuses non-finite weights and a sum near 0, warns of negative ones unless they are meant.

    Raises:
        ValueError: names the weights and the reason.
    """
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights {list(weights)} are not all finite")
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    if abs(total) <= 1e-6 * size or size == 0:
        raise ValueError(f"weights {list(weights)} sum to {total:g}, so they cannot be normalised to 1")
    if min(weights) < 0 and not extrapolates:
        warnings.warn(f"weights {list(weights)}: negative weights extrapolate", stacklevel=2)
    return [w / total for w in weights]


def _is_primitive(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_primitive, value))
    return value is None or isinstance(value, (str, int, float, bool))
