"""The learning rates that optimizer steps are really taken with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import mul
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class AppliedLR:
    """Notes each optimizer's rates just before its step, before the schedulers change them.

    An optimizer without a rate (a parameter-free one, Adafactor's relative steps) counts as having a constant
    rate of 1.

    A rate that is a tensor on an accelerator (``capturable`` optimizers) costs one wait per step: keep such
    rates on the CPU, as ``torch.optim`` recommends.

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
        self._sizes: dict[int, list[int]] = {}

    def note(self, optimizer: Optimizer) -> None:
        """Reads the groups of an optimizer that is about to step."""
        index, groups = self._index.get(id(optimizer), -1), optimizer.param_groups
        sizes = self._sizes.get(index)
        if sizes is None or len(sizes) != len(groups):
            self._sizes[index] = [self._size(group) for group in groups]
        self._rates[index] = [_rate(group) for group in groups]

    @property
    def rates(self) -> list[float]:
        """The last noted rate of every group of every optimizer."""
        return list(chain.from_iterable(self._rates.values()))

    @property
    def total(self) -> float:
        """The last noted rates, summed over all parameters."""
        rates = chain.from_iterable(self._rates.values())
        sizes = chain.from_iterable(self._sizes.values())
        return float(sum(map(mul, rates, sizes)))

    def state_dict(self) -> dict[str, list[list[float]]]:
        """The last noted rates, as primitives."""
        return {
            str(index): [[rate, n] for rate, n in zip(rates, self._sizes[index], strict=True)]
            for index, rates in self._rates.items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Goes on from a ``state_dict``."""
        self._rates = {int(i): [rate for rate, _ in groups] for i, groups in state.items()}
        self._sizes = {int(i): [int(n) for _, n in groups] for i, groups in state.items()}

    def _size(self, group: dict[str, Any]) -> int:
        return sum(self._numel(parameter) for parameter in group["params"])


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr")
    return 1.0 if rate is None else float(rate)
