"""The learning rates an optimizer step is really taken with."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class AppliedLR:
    """Notes each optimizer's rates just before its step, when the schedulers have not moved on yet.

    A rate that is a tensor on an accelerator (``capturable`` optimizers) costs one wait a step: keep such
    rates on the CPU, as ``torch.optim`` recommends.
    """

    def __init__(self) -> None:
        self._rates: dict[int, list[float]] = {}
        self._sizes: dict[int, list[int]] = {}

    def note(self, optimizer: Optimizer) -> None:
        """Reads the groups of an optimizer that is about to step."""
        groups = optimizer.param_groups
        key = id(groups)
        self._rates[key] = [float(group["lr"]) for group in groups]
        if len(self._sizes.get(key, ())) != len(groups):
            self._sizes[key] = [_numel(group) for group in groups]

    @property
    def rates(self) -> list[float]:
        """The last noted rate of every group of every optimizer."""
        return [rate for rates in self._rates.values() for rate in rates]

    @property
    def sizes(self) -> list[int]:
        """The number of parameters in each of those groups."""
        return [size for sizes in self._sizes.values() for size in sizes]


def _numel(group: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in group["params"])
