"""The learning rates that optimizer steps are really taken with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from operator import mul
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from merge_callback.signals.async_scalars import Read, send


class AppliedLR:
    """Notes each optimizer's rates just before its step, before the schedulers change them.

    An optimizer without a rate (a parameter-free one, Adafactor's relative steps) counts as having a constant
    rate of 1.

    A rate that is a tensor on an accelerator (``capturable`` optimizers) is known one step late, as nobody
    waits for it; only the first one is waited for.

    Args:
        optimizers: all optimizers of the run, in the trainer's order. They may take turns.
        numel: returns a parameter's number of elements, over all ranks that it is sharded over.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], numel: Callable[[Tensor], int] = Tensor.numel
    ) -> None:
        self._optimizers, self._numel = list(optimizers), numel  # held, so that no other object gets its id
        self._index = {id(optimizer): index for index, optimizer in enumerate(self._optimizers)}
        self._rates: dict[int, list[float]] = {}  # by optimizer
        self._under_way: dict[
            int, Read
        ] = {}  # those of the last step, of optimizers that have some on a device
        self._sizes: dict[int, list[int]] = {}
        self._total: float | None = None  # of these rates and sizes

    def note(self, optimizer: Optimizer) -> None:
        """Reads the groups of an optimizer that is about to step."""
        index, groups = self._index.get(id(optimizer), -1), optimizer.param_groups
        sizes = self._sizes.get(index)
        if sizes is None or len(sizes) != len(groups):
            self._sizes[index], self._total = [self._size(group) for group in groups], None
        rates: list[Any] = [group.get("lr") for group in groups]
        for rate in rates:
            if type(rate) is not float:  # which nearly all are
                rates = self._read(index, [_rate(group) for group in groups])
                break
        if rates != self._rates.get(index):
            self._rates[index], self._total = rates, None

    @property
    def rates(self) -> list[float]:
        """The last noted rate of every group of every optimizer."""
        return list(chain.from_iterable(self._rates.values()))

    @property
    def total(self) -> float:
        """The last noted rates, summed over all parameters."""
        if self._total is None:
            rates = chain.from_iterable(self._rates.values())
            sizes = chain.from_iterable(self._sizes.values())
            self._total = float(sum(map(mul, rates, sizes)))
        return self._total

    def state_dict(self) -> dict[str, list[list[float]]]:
        """The last noted rates, as primitives; waits for those that are under way."""
        return {
            str(index): [
                [*group] for group in zip(rates, self._sizes[index], *self._next(index), strict=True)
            ]
            for index, rates in self._rates.items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Goes on from a ``state_dict``."""
        self._rates = {int(i): [rate for rate, *_ in groups] for i, groups in state.items()}
        self._sizes = {int(i): [int(n) for _, n, *_ in groups] for i, groups in state.items()}
        after = {int(i): [rate for _, _, rate in groups] for i, groups in state.items() if len(groups[0]) > 2}
        self._total = None
        self._under_way = {i: partial(_known, rates) for i, rates in after.items()}

    def _read(self, index: int, rates: list[float | Tensor]) -> list[float]:
        """An optimizer's rates; those of its last step, if some of the present ones are on a device."""
        if not any(isinstance(rate, Tensor) for rate in rates):
            return rates  # type: ignore[return-value]
        sent = send(rates)
        before = self._under_way.get(index, sent)
        self._under_way[index] = sent
        return before(None)

    def _next(self, index: int) -> list[list[float]]:
        """The rates of an optimizer that are under way, if some are."""
        read = self._under_way.get(index)
        return [] if read is None else [read(None)]

    def _size(self, group: dict[str, Any]) -> int:
        return sum(self._numel(parameter) for parameter in group["params"])


def _rate(group: Mapping[str, Any]) -> float | Tensor:
    rate = group.get("lr")
    if isinstance(rate, Tensor) and rate.is_cuda:
        return rate
    return 1.0 if rate is None else float(rate)


def _known(rates: list[float], within: timedelta | None) -> list[float]:
    return rates
