"""Collects loss, gradient norm and tokens of every optimizer step, one step late to avoid waiting."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_callback.sharding import Ranks
from merge_callback.signals.async_scalars import send, send_sum
from merge_callback.signals.step_numbers import OwnNumbers, StepSums, own_copy, reduced, weighted_sum
from merge_callback.signals.token_clock import TokenClock

log = logging.getLogger(__name__)

_REMEMBERED = 128  # steps whose own losses are kept

_PATIENCE = timedelta(seconds=30)
"""How long a checkpoint waits for the numbers of other ranks, which may be gone."""


class Statistics(NamedTuple):
    """The statistics of one optimizer step, on all ranks together.

    Args:
        step: the optimizer step (the count after it).
        loss: mean over its micro-batches, not divided for accumulation; ``None`` if none was returned.
        grad_norm: global 2-norm of its gradients before clipping; ``None`` unless it is watched.
        skipped: whether fp16 loss scaling skipped it.
        tokens: tokens in its micro-batches; 0 if they can't be counted.
        scalars: further watched numbers by name; each is the mean over the ranks that had it.
        unknown_scalars: whether some rank had one under a name that is not among ``StepStatistics.names``.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    skipped: bool
    tokens: int = 0
    scalars: Mapping[str, float] = MappingProxyType({})
    unknown_scalars: bool = False


class StepStatistics:
    """Sums up micro-batches on their device and returns each step's numbers when the next step ends.

    With several ranks the sums are reduced over all of them, in one all-reduce of seven fp64 numbers per step
    (and two for each further watched scalar). On CUDA they are copied to pinned memory in one small transfer.
    Both are waited for one optimizer step later, when the whole next step is in the device's queue, so the
    device never idles for them.

    Args:
        ranks: the ranks that end every step together; default: this process alone.
        counts: whether this rank's batches are summed up. Tensor-parallel ranks share a batch, and only one
            of them counts it; the losses of the others are only checked for being finite.
        device: the device that training uses.
        clock: advanced by the tokens of every step once they are known: with a single rank at its end, unless
            they are counted on the device.
        own_part: returns the part of a parameter's gradient that this rank counts, as a plain tensor, so that
            each gradient is summed up once; ``None`` if it has none. Default: the whole gradient, which is
            right for a single rank.

    Attributes:
        names: names of further scalars, in the same order on all ranks; ``None`` if none are watched.
    """

    def __init__(
        self,
        ranks: Ranks | None = None,
        counts: bool = True,
        device: torch.device | str = "cpu",
        clock: TokenClock | None = None,
        own_part: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self._ranks, self._counts, self._device = ranks or Ranks(), counts, torch.device(device)
        self._clock, self._own_part = clock or TokenClock(), own_part or _gradient
        self._losses: list[float | Tensor] = []
        self._factors: list[float] = []  # that the losses are still to be multiplied by
        self._norms: list[float | Tensor] = []
        self._tokens: float | Tensor = 0.0
        self._on_device = False  # whether one of these is a tensor
        self.names: list[str] | None = None
        self._scalars: Mapping[str, Tensor | float] = {}
        self._own_losses: deque[tuple[int, list[float | Tensor], list[float]]] = deque(maxlen=_REMEMBERED)
        self._scale: float | None = None  # the loss scale after the last step that was read; None if unknown
        self._last: _Pending | None = None

    def add_loss(self, outputs: Any, divided_by: int) -> None:
        """Notes the loss of a micro-batch.

        Args:
            outputs: what Lightning passes to ``on_train_batch_end``; without a ``"loss"`` nothing is noted.
            divided_by: what Lightning divided the loss by (``accumulate_grad_batches``; 1 if manual).
        """
        loss = loss_in(outputs)
        if isinstance(loss, Tensor):
            loss = own_copy(loss)
            self._on_device |= isinstance(loss, Tensor)
        elif not isinstance(loss, float):
            return
        self._losses.append(loss)
        self._factors.append(divided_by)

    def add_tokens(self, tokens: float | Tensor) -> None:
        """Notes the tokens of a micro-batch; NaN if they can't be counted, which stops the clock."""
        if isinstance(tokens, Tensor):
            tokens = own_copy(tokens.reshape(()))
            self._on_device |= isinstance(tokens, Tensor)
        self._tokens = self._tokens + tokens

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[Tensor], scale: Tensor | None = None) -> None:
        """Notes the norm of the gradients that one optimizer is about to apply.

        Args:
            parameters: the optimizer's.
            scale: what their gradients are multiplied by, as fp16 needs it; ``None`` if they are as is.
        """
        gradients = [dense(part) for p in parameters if (part := self._own_part(p)) is not None]
        if gradients:
            norm = own_copy(torch.nn.utils.get_total_norm(gradients))
            self._norms.append(norm if scale is None else norm / own_copy(scale))
            self._on_device |= isinstance(norm, Tensor)

    def set_gradient_norm(self, norm: Tensor | float) -> None:
        """Notes the global norm of the step's gradients, if the loop has computed it on all ranks already."""
        norm = own_copy(norm)
        self._norms = [norm if self._ranks.is_first else 0.0]
        self._on_device |= isinstance(norm, Tensor)

    def add_scalars(self, values: Mapping[str, Tensor | float]) -> None:
        """Notes further scalars of the step that ends now, by name."""
        self._scalars = values

    def own_losses(self, steps: Iterable[int]) -> list[float | None]:
        """This rank's own mean losses of some of the last steps; waits for them. ``None`` if unknown."""
        known = {step: (losses, factors) for step, losses, factors in self._own_losses}
        return [
            float(weighted_sum(*known[step]) / len(known[step][0])) if step in known else None
            for step in steps
        ]

    @torch.no_grad()
    def gradient_norm(self, parameters: Iterable[Tensor]) -> float:
        """The global 2-norm of the present gradients; waits for it. All ranks have to call this."""
        gradients = [dense(part) for p in parameters if (part := self._own_part(p)) is not None]
        square = float(torch.nn.utils.get_total_norm(gradients)) ** 2 if gradients else 0.0
        return math.sqrt(sum(self._ranks.exchange(square)))

    def end_step(self, step: int, scale: Tensor | None) -> Statistics | None:
        """Ends optimizer step ``step``; all ranks have to call this.

        Args:
            step: the count after it.
            scale: the loss scale after it, if fp16 needs one: it falls when a step is skipped.

        Returns:
            The statistics of the previous step; ``None`` at the first one.
        """
        if self._losses:
            self._own_losses.append((step, self._losses, self._factors))
        own = self._take(scale)
        last, self._last = self._last, self._send(step, own)
        if self._ranks.group is None and not isinstance(own.tokens, Tensor):
            self._last.counted = True
            self._clock.add(own.tokens)
        return None if last is None else self._read(last)

    def flush_to_clock(self) -> None:
        """Advances the clock by the step that has just ended; waits for the sum over the ranks, if any."""
        if self._last is not None:
            self._count(self._last)

    def forget(self) -> None:
        """Drops numbers that are not read yet: they belong to replaced weights, and an old loss scale.

        The tokens of the step that has just ended are counted first.
        """
        self.flush_to_clock()
        self._losses, self._factors, self._norms, self._scalars = [], [], [], {}
        self._scale, self._last = None, None

    def close(self) -> None:
        """Waits for a pending sum, unless the other ranks are gone."""
        if self._last is not None:
            with suppress(Exception):
                self._last.read(_PATIENCE)

    def state_dict(self) -> dict[str, Any]:
        """The state as primitives, including this rank's micro-batches since the last step.

        It waits for the sum of that step, and leaves it out if the other ranks are gone.
        """
        return {
            "losses": [float(loss) * by for loss, by in zip(self._losses, self._factors, strict=True)],
            "square_norms": [float(norm) ** 2 for norm in self._norms],
            "tokens": float(self._tokens),
            "scale": self._scale,
            "names": self.names,
            "last": self._last_step(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the first rank's ``state_dict``; only the first rank gets its micro-batches back."""
        first = self._ranks.is_first
        self._losses = list(state["losses"]) if first else []
        self._factors = [1.0] * len(self._losses)
        self._norms = [square**0.5 for square in state["square_norms"]] if first else []
        self._tokens = state["tokens"] if first else 0.0
        self._scale = state["scale"]
        self._last = None
        if self.names is not None:
            self.names = list(state.get("names") or [])
        if state["last"] is not None and "names" in state:  # an older version saved other numbers
            step, names, *sums = state["last"]
            self._last = _Pending(step, names, StepSums(*sums))
            self._last.counted = True

    def _last_step(self) -> list[Any] | None:
        if self._last is None:
            return None
        try:
            self._count(self._last, _PATIENCE)
        except Exception as error:  # errors differ between backends
            log.warning("merge: the statistics of step %s are not saved: %s", self._last.step, error)
            return None
        return [self._last.step, self._last.names, *self._last.read()]

    def _take(self, scale: Tensor | None) -> OwnNumbers:
        """What this rank has of the step that ends; nothing is left for the next one."""
        scalars = [] if self.names is None else self._take_scalars(self.names)
        known = 0.0 if scale is None else own_copy(scale)
        self._on_device |= isinstance(known, Tensor)
        own = OwnNumbers(self._losses, self._factors, self._norms, self._tokens, known, scalars)
        self._losses, self._factors, self._norms, self._tokens = [], [], [], 0.0
        return own

    def _take_scalars(self, names: Sequence[str]) -> list[float | Tensor]:
        """Whether there are unknown scalars; then for each known name its value, and whether there is one."""
        found, self._scalars = self._scalars, {}
        numbers: list[float | Tensor] = [float(any(name not in names for name in found))]
        for name in names:
            value = found.get(name)
            own = 0.0 if value is None else own_copy(value)
            numbers += [own, float(value is not None)]
            self._on_device |= isinstance(own, Tensor)
        return numbers

    def _send(self, step: int, own: OwnNumbers) -> _Pending:
        """Begins to sum a step's numbers: on the host if this rank is alone, since each launch costs."""
        ranks = self._ranks
        on_device, self._on_device = self._on_device, False
        if ranks.group is not None:
            read = send_sum(own.sums(self._counts), ranks, self._device)
            return _Pending(step, self.names, wait=lambda within: reduced(read(within), ranks.size))
        if not on_device:
            return _Pending(step, self.names, own.alone())
        read = send(own.parts(), are_own=True)
        return _Pending(step, self.names, wait=lambda within: own.of(read(within)).alone())

    def _count(self, pending: _Pending, within: timedelta | None = None) -> None:
        """Advances the clock by a step's tokens, unless that is done already."""
        if not pending.counted:
            self._clock.add(pending.read(within).tokens)
            pending.counted = True

    def _read(self, pending: _Pending) -> Statistics:
        if not pending.counted:
            self._count(pending)
        loss, norm, scale, tokens, *further = pending.sums or pending.read()
        skipped = scale is not None and self._was_skipped(loss, norm, scale)
        self._scale = scale
        tokens = 0 if math.isnan(tokens) else int(tokens)
        if not further[0]:
            return Statistics(pending.step, loss, norm, skipped, tokens)
        unknown, *values = further[0]
        pairs = zip(pending.names or [], values[::2], values[1::2], strict=True)
        scalars = {name: value / count for name, value, count in pairs if count}
        return Statistics(pending.step, loss, norm, skipped, tokens, scalars, bool(unknown))

    def _was_skipped(self, loss: float | None, norm: float | None, scale: float) -> bool:
        if self._scale is None:  # the first step, or the first after a restore: only an overflow shows
            return not all(math.isfinite(number) for number in (loss, norm) if number is not None)
        return scale < self._scale


class _Pending:
    """A step that has ended, whose numbers may not have arrived yet."""

    def __init__(
        self,
        step: int,
        names: list[str] | None = None,
        sums: StepSums | None = None,
        wait: Callable[[timedelta | None], StepSums] | None = None,
    ) -> None:
        self.step, self.names = step, names
        self.counted = False  # whether the clock has its tokens
        self.sums, self._wait = sums, wait  # one of the two is given

    def read(self, within: timedelta | None = None) -> StepSums:
        if self.sums is None:
            assert self._wait is not None
            self.sums = self._wait(within)
        return self.sums


def loss_in(outputs: Any) -> Any:
    """The loss that a training step returned, if any."""
    return outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def dense(gradient: Tensor) -> Tensor:
    """The values of a gradient; of a sparse one only the stored values."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
