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
        self._square_norms: list[float | Tensor] = []
        self._tokens: float | Tensor = 0.0
        self._on_device = False  # whether one of these is a tensor
        self.names: list[str] | None = None
        self._scalars: Mapping[str, Tensor | float] = {}
        self._own_losses: deque[tuple[int, float | Tensor]] = deque(maxlen=_REMEMBERED)
        self._scale: float | None = None  # the loss scale after the last step that was read; None if unknown
        self._last: _Pending | None = None

    def add_loss(self, outputs: Any, divided_by: int) -> None:
        """Notes the loss of a micro-batch.

        Args:
            outputs: what Lightning passes to ``on_train_batch_end``; without a ``"loss"`` nothing is noted.
            divided_by: what Lightning divided the loss by (``accumulate_grad_batches``; 1 if manual).
        """
        loss = loss_in(outputs)
        if isinstance(loss, (Tensor, float)):
            loss = _own(loss, divided_by)
            self._losses.append(loss)
            self._on_device |= isinstance(loss, Tensor)

    def add_tokens(self, tokens: float | Tensor) -> None:
        """Notes the tokens of a micro-batch; NaN if they can't be counted, which stops the clock."""
        if isinstance(tokens, Tensor):
            tokens = _own(tokens.reshape(()), 1)
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
            norm = _own(torch.nn.utils.get_total_norm(gradients), 1)
            square = (norm if scale is None else norm / _own(scale, 1)) ** 2
            self._square_norms.append(square)
            self._on_device |= isinstance(square, Tensor)

    def set_gradient_norm(self, norm: Tensor | float) -> None:
        """Notes the global norm of the step's gradients, if the loop has computed it on all ranks already."""
        square = _own(norm, 1) ** 2
        self._square_norms = [square if self._ranks.is_first else 0.0]
        self._on_device |= isinstance(square, Tensor)

    def add_scalars(self, values: Mapping[str, Tensor | float]) -> None:
        """Notes further scalars of the step that ends now, by name."""
        self._scalars = values

    def own_losses(self, steps: Iterable[int]) -> list[float | None]:
        """This rank's own mean losses of some of the last steps; waits for them. ``None`` if unknown."""
        known = dict(self._own_losses)
        return [None if (loss := known.get(step)) is None else float(loss) for step in steps]

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
        if losses := self._losses:
            self._own_losses.append((step, losses[0] if len(losses) == 1 else sum(losses) / len(losses)))
        tokens, numbers = self._tokens, self._take(scale)
        last, self._last = self._last, self._send(step, numbers)
        if self._ranks.group is None and not isinstance(tokens, Tensor):
            self._last.counted = True
            self._clock.add(tokens)
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
        self._losses, self._square_norms, self._scalars = [], [], {}
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
            "losses": [float(loss) for loss in self._losses],
            "square_norms": [float(square) for square in self._square_norms],
            "tokens": float(self._tokens),
            "scale": self._scale,
            "names": self.names,
            "last": self._last_step(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the first rank's ``state_dict``; only the first rank gets its micro-batches back."""
        first = self._ranks.is_first
        self._losses = list(state["losses"]) if first else []
        self._square_norms = list(state["square_norms"]) if first else []
        self._tokens = state["tokens"] if first else 0.0
        self._scale = state["scale"]
        self._last = None
        if self.names is not None:
            self.names = list(state.get("names") or [])
        if state["last"] is not None and "names" in state:  # an older version saved other numbers
            step, names, *sums = state["last"]
            self._last = _Pending(step, names, _Sums(*sums))
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

    def _take(self, scale: Tensor | None) -> list[float | Tensor]:
        """The sums of the step that ends; resets them for the next one."""
        losses, squares, tokens = self._losses, self._square_norms, self._tokens
        self._losses, self._square_norms, self._tokens = [], [], 0.0
        loss = sum(losses)
        counted = [loss, float(len(losses)), tokens] if self._counts else [0.0, 0.0, 0.0]
        bad = 0.0 if self._ranks.group is None else _is_bad(loss)
        numbers = [*counted, bad, sum(squares), float(len(squares)), 0.0 if scale is None else scale]
        return numbers if self.names is None else [*numbers, *self._take_scalars(self.names)]

    def _take_scalars(self, names: Sequence[str]) -> list[float | Tensor]:
        """Whether there are unknown scalars; then for each known name its value, and whether there is one."""
        found, self._scalars = self._scalars, {}
        numbers: list[float | Tensor] = [float(any(name not in names for name in found))]
        for name in names:
            value = found.get(name)
            own = 0.0 if value is None else _own(value, 1)
            numbers += [own, float(value is not None)]
            self._on_device |= isinstance(own, Tensor)
        return numbers

    def _send(self, step: int, numbers: list[float | Tensor]) -> _Pending:
        ranks = self._ranks
        on_device, self._on_device = self._on_device or isinstance(numbers[6], Tensor), False
        if ranks.group is None and not on_device:
            return _Pending(step, self.names, _reduced(numbers, 1))  # type: ignore[arg-type]
        read = send(numbers) if ranks.group is None else send_sum(numbers, ranks, self._device)
        return _Pending(step, self.names, wait=lambda within: _reduced(read(within), ranks.size))

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


class _Sums(NamedTuple):
    """The results of a step's sums over all ranks."""

    loss: float | None
    norm: float | None
    scale: float | None
    tokens: float
    scalars: list[float] = []  # noqa: RUF012  # in the order of ``_take_scalars``; empty if none are watched


class _Pending:
    """A step that has ended, whose numbers may not have arrived yet."""

    def __init__(
        self,
        step: int,
        names: list[str] | None = None,
        sums: _Sums | None = None,
        wait: Callable[[timedelta | None], _Sums] | None = None,
    ) -> None:
        self.step, self.names = step, names
        self.counted = False  # whether the clock has its tokens
        self.sums, self._wait = sums, wait  # one of the two is given

    def read(self, within: timedelta | None = None) -> _Sums:
        if self.sums is None:
            assert self._wait is not None
            self.sums = self._wait(within)
        return self.sums


def loss_in(outputs: Any) -> Any:
    """The loss that a training step returned, if any."""
    return outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs


def _reduced(numbers: list[float], ranks: int) -> _Sums:
    loss, count, tokens, bad, square, squares, scale, *scalars = numbers
    mean = loss / count if count else None
    if bad and (mean is None or math.isfinite(mean)):  # on a rank whose loss is not summed up
        mean = math.nan
    return _Sums(mean, square**0.5 if squares else None, scale / ranks or None, tokens, scalars)


def _is_bad(loss: float | Tensor) -> float | Tensor:
    return (
        loss.isfinite().logical_not().double() if isinstance(loss, Tensor) else float(not math.isfinite(loss))
    )


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def dense(gradient: Tensor) -> Tensor:
    """The values of a gradient; of a sparse one only the stored values."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _own(value: Tensor | float, factor: int) -> Tensor | float:
    """A copy times ``factor`` that no later step overwrites; a plain number if that needs no waiting."""
    if full_tensor := getattr(value, "full_tensor", None):  # a DTensor; importing its class takes a second
        value = full_tensor()
    if isinstance(value, Tensor) and value.is_cuda:
        return value.detach().double().mean() * factor
    if isinstance(value, Tensor):
        return (value if value.numel() == 1 else value.detach().double().mean()).item() * factor
    return value * factor
