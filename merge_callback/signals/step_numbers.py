"""What one rank has of an optimizer step, on the host or on the device, and how it is summed up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor


class StepSums(NamedTuple):
    """The results of a step's sums over all ranks."""

    loss: float | None
    norm: float | None
    scale: float | None
    tokens: float
    scalars: list[float] = []  # noqa: RUF012  # in the order of ``_take_scalars``; empty if none are watched


class OwnNumbers(NamedTuple):
    """What one rank has of a step: numbers of its own, each on the host or on the device."""

    losses: list[float | Tensor]
    factors: list[float]
    norms: list[float | Tensor]
    tokens: float | Tensor
    scale: float | Tensor
    scalars: list[float | Tensor]

    def parts(self) -> list[float | Tensor]:
        """All that may be on the device."""
        return [*self.losses, *self.norms, self.tokens, self.scale, *self.scalars]

    def of(self, parts: list[float]) -> OwnNumbers:
        """The same with other ``parts``."""
        begin, end = len(self.losses), len(self.losses) + len(self.norms)
        tokens, scale, *scalars = parts[end:]
        return OwnNumbers([*parts[:begin]], self.factors, [*parts[begin:end]], tokens, scale, [*scalars])

    def alone(self) -> StepSums:
        """The sums of a lone rank, once all is on the host."""
        mean = weighted_sum(self.losses, self.factors) / len(self.losses) if self.losses else None
        norm = sum(norm**2 for norm in self.norms) ** 0.5 if self.norms else None
        return StepSums(mean, norm, self.scale or None, self.tokens, self.scalars)  # type: ignore[arg-type]

    def sums(self, counts: bool) -> list[float | Tensor]:
        """What is summed over the ranks."""
        loss, count = weighted_sum(self.losses, self.factors), float(len(self.losses))
        counted = [loss, count, self.tokens] if counts else [0.0, 0.0, 0.0]
        square = sum(norm**2 for norm in self.norms) if self.norms else 0.0
        return [*counted, _is_bad(loss), square, float(len(self.norms)), self.scale, *self.scalars]


def own_copy(value: Tensor | float) -> Tensor | float:
    """A copy that no later step overwrites; a plain number if that needs no waiting."""
    if type(value) is not Tensor:  # which it nearly always is, and looking for what it lacks takes a while
        if full_tensor := getattr(
            value, "full_tensor", None
        ):  # a DTensor; its class takes a second to import
            value = full_tensor()
        if not isinstance(value, Tensor):
            return value
    if not value.is_cuda:
        return (value if value.numel() == 1 else value.detach().double().mean()).item()
    if value.numel() != 1:
        return value.detach().double().mean()
    return value.detach().reshape(()).to(torch.float64, copy=True)  # one launch


def reduced(numbers: list[float], ranks: int) -> StepSums:
    """The results of ``OwnNumbers.sums``, summed over all ranks."""
    loss, count, tokens, bad, square, squares, scale, *scalars = numbers
    mean = loss / count if count else None
    if bad and (mean is None or math.isfinite(mean)):  # on a rank whose loss is not summed up
        mean = math.nan
    return StepSums(mean, square**0.5 if squares else None, scale / ranks or None, tokens, scalars)


def weighted_sum(losses: Sequence[float | Tensor], factors: Sequence[float]) -> float | Tensor:
    """The sum of the losses of a step's micro-batches, each times its factor."""
    if len(losses) == 1:
        return losses[0] * factors[0]
    total: float | Tensor = sum(map(mul, losses, factors))
    return total


def _is_bad(loss: float | Tensor) -> float | Tensor:
    return (
        loss.isfinite().logical_not().double() if isinstance(loss, Tensor) else float(not math.isfinite(loss))
    )
