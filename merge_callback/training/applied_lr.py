"""The learning rates an optimizer step is really taken with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class AppliedLR:
    """Notes each optimizer's rates just before its step, when the schedulers have not moved on yet.

    A rate that is a tensor on an accelerator (``capturable`` optimizers) costs one wait a step: keep such
    rates on the CPU, as ``torch.optim`` recommends.

    Args:
        optimizers: all of the run's, in the trainer's order. They may take turns.
        numel: elements of a parameter, over all ranks it is sharded over.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], numel: Callable[[Tensor], int] = Tensor.numel
    ) -> None:
        self._optimizers, self._numel = list(optimizers), numel
        self._groups: dict[int, list[tuple[float, int]]] = {}  # (rate, parameters) by optimizer

    def note(self, optimizer: Optimizer) -> None:
        """Reads the groups of an optimizer that is about to step."""
        index = next((i for i, known in enumerate(self._optimizers) if known is optimizer), -1)
        known, groups = self._groups.get(index, []), optimizer.param_groups
        sizes = (
            [n for _, n in known] if len(known) == len(groups) else [self._size(group) for group in groups]
        )
        self._groups[index] = [(float(group["lr"]), n) for group, n in zip(groups, sizes, strict=True)]

    @property
    def rates(self) -> list[float]:
        """The last noted rate of every group of every optimizer."""
        return [rate for groups in self._groups.values() for rate, _ in groups]

    @property
    def sizes(self) -> list[int]:
        """The number of parameters in each of those groups."""
        return [size for groups in self._groups.values() for _, size in groups]

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What was last noted, as primitives."""
        return {str(index): [list(group) for group in groups] for index, groups in self._groups.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Goes on from a ``state_dict``."""
        self._groups = {int(i): [(rate, int(n)) for rate, n in groups] for i, groups in state.items()}

    def _size(self, group: dict[str, Any]) -> int:
        return sum(self._numel(parameter) for parameter in group["params"])
