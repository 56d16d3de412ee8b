"""The loss and the gradient norm of every optimizer step, read one step late: nothing waits for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What one optimizer step was like.

    Args:
        step: the optimizer step (the count after it).
        loss: mean over its micro-batches, not divided for accumulation; ``None`` where none was returned.
        grad_norm: global 2-norm of its gradients before clipping; ``None`` unless it is watched.
        skipped: whether fp16 loss scaling skipped it.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    skipped: bool


class StepStatistics:
    """Sums up micro-batches on their device and hands out each step's numbers when the next one ends.

    On CUDA the numbers travel in one small copy to pinned memory. It is waited for one optimizer step later,
    when the device has the whole next step in its queue: the device never idles for it.
    """

    def __init__(self) -> None:
        self._losses: list[float | Tensor] = []
        self._square_norms: list[float | Tensor] = []
        self._scale: float | None = None  # after the last step that was read; None where that is not known
        self._last: _Pending | None = None

    def add_loss(self, outputs: Any, divided_by: int) -> None:
        """Notes the loss of a micro-batch.

        Args:
            outputs: what Lightning hands to ``on_train_batch_end``; without a ``"loss"`` nothing is noted.
            divided_by: what Lightning divided it by (``accumulate_grad_batches``; 1 in manual optimization).
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, (Tensor, float)):
            self._losses.append(_own(loss, divided_by))

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Notes the norm of the gradients that one optimizer is about to apply."""
        gradients = [_dense(p.grad) for p in parameters if p.grad is not None]
        if gradients:
            self._square_norms.append(_own(torch.nn.utils.get_total_norm(gradients), 1) ** 2)

    def end_step(self, step: int, scale: Tensor | None) -> Statistics | None:
        """Ends optimizer step ``step``.

        Args:
            step: the count after it.
            scale: the loss scale after it, where fp16 needs one: it falls when a step is skipped.

        Returns:
            The statistics of the step before; ``None`` at the first one.
        """
        last, self._last = self._last, _Pending(step, self._take(), scale)
        return None if last is None else self._read(last)

    def forget(self) -> None:
        """Drops what is not read yet: it is about weights, and a loss scale, that are no longer there."""
        self._losses, self._square_norms = [], []
        self._scale, self._last = None, None

    def state_dict(self) -> dict[str, Any]:
        """What is noted, as primitives."""
        last = self._last
        return {
            "losses": [float(loss) for loss in self._losses],
            "square_norms": [float(square) for square in self._square_norms],
            "scale": self._scale,
            "last": None if last is None else [last.step, *last.read()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self._losses, self._square_norms = list(state["losses"]), list(state["square_norms"])
        self._scale = state["scale"]
        self._last = None
        if state["last"] is not None:
            step, loss, norm, scale = state["last"]
            self._last = _Pending(step, (loss, norm), scale)

    def _take(self) -> tuple[float | Tensor | None, float | Tensor | None]:
        losses, squares = self._losses, self._square_norms
        self._losses, self._square_norms = [], []
        loss = sum(losses) / len(losses) if losses else None
        return loss, sum(squares) ** 0.5 if squares else None

    def _read(self, pending: _Pending) -> Statistics:
        loss, norm, scale = pending.read()
        skipped = self._was_skipped(loss, norm, scale)
        self._scale = scale
        return Statistics(pending.step, loss, norm, skipped)

    def _was_skipped(self, loss: float | None, norm: float | None, scale: float | None) -> bool:
        if scale is None:
            return False
        if self._scale is None:  # the first step, or the first after a restore: only an overflow can tell
            return not all(math.isfinite(number) for number in (loss, norm) if number is not None)
        return scale < self._scale


class _Pending:
    """A step's numbers on their way to the host."""

    def __init__(
        self,
        step: int,
        numbers: tuple[float | Tensor | None, float | Tensor | None],
        scale: Tensor | float | None,
    ) -> None:
        self.step = step
        self._numbers: list[float | Tensor | None] = [*numbers, scale]
        self._copied: torch.cuda.Event | None = None
        on_device = [n for n in self._numbers if isinstance(n, Tensor)]
        if any(n.is_cuda for n in on_device):
            self._send([n.reshape(()).double() for n in on_device])
        else:
            self._numbers = [float(n) if isinstance(n, Tensor) else n for n in self._numbers]

    def read(self) -> list[float | None]:
        """Loss, gradient norm and loss scale."""
        if self._copied is not None:
            self._copied.synchronize()
            values = iter(self._host.tolist())
            self._numbers = [next(values) if isinstance(n, Tensor) else n for n in self._numbers]
            self._copied = None
        return self._numbers  # type: ignore[return-value]

    def _send(self, numbers: list[Tensor]) -> None:
        device = next(n.device for n in numbers if n.is_cuda)
        sent = torch.stack([n.to(device, non_blocking=True) for n in numbers])
        self._host = torch.empty(len(numbers), dtype=torch.float64, pin_memory=True)
        self._host.copy_(sent, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(device))


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _own(value: Tensor | float, factor: int) -> Tensor | float:
    """A copy that no later step writes over, times ``factor``: a number where that takes no waiting."""
    if isinstance(value, Tensor) and value.is_cuda:
        return value.detach().double().mean() * factor
    if isinstance(value, Tensor):
        return (value if value.numel() == 1 else value.detach().double().mean()).item() * factor
    return value * factor
