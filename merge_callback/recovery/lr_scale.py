"""Scales the learning rates that are applied, without the schedulers noticing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LRScale:
    """Multiplies each optimizer step's learning rates by a re-warm-up and a lasting factor.

    The rates are scaled just before the update, after the closure and all other hooks, and set back just
    after it. So this works with every scheduler, also with those that compute the next rate from the present
    one. No hook is installed while there is nothing to scale.

    An optimizer that reads its rate before it calls the closure is not slowed down (in torch, only LBFGS).

    Args:
        optimizers: all optimizers of the run.
        current_step: returns the number of optimizer steps taken so far.
    """

    def __init__(self, optimizers: Sequence[Optimizer], current_step: Callable[[], int]) -> None:
        self._optimizers, self._current_step = list(optimizers), current_step
        self.lasting = 1.0
        self._start, self._steps = 0, 0  # of the re-warm-up
        self._handles: list[RemovableHandle] = []
        self._scheduled: dict[Optimizer, list[float | Tensor]] = {}

    def rewarm(self, step: int, steps: int, lasting: float) -> None:
        """Ramps up linearly over the ``steps`` after ``step`` to the factor ``lasting``, which then stays."""
        self._start, self._steps, self.lasting = step, steps, lasting
        self._install()

    def factor(self, step: int) -> float:
        """The factor on the rates of the update after ``step`` optimizer steps."""
        done = (step - self._start + 1) / self._steps if self._steps else 1.0
        return self.lasting * min(1.0, done)

    def end_step(self, step: int) -> None:
        """Removes the hooks if the update after ``step`` optimizer steps is no longer scaled."""
        if self._handles and self.factor(step) == 1:
            self.close()

    def close(self) -> None:
        """Removes the hooks and sets back any rate that an exception left scaled."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for optimizer in list(self._scheduled):
            self._restore(optimizer)

    def state_dict(self) -> dict[str, float]:
        """The re-warm-up and the factor, as primitives."""
        return {"start": self._start, "steps": self._steps, "lasting": self.lasting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self._start, self._steps, self.lasting = state["start"], state["steps"], state["lasting"]
        if self.factor(self._current_step()) != 1:
            self._install()

    def _install(self) -> None:
        if not self._handles:
            for optimizer in self._optimizers:
                after = optimizer.register_step_post_hook(self._after)
                hooks: Any = optimizer._optimizer_step_post_hooks
                hooks.move_to_end(after.id, last=False)  # before all others
                self._handles += [optimizer.register_step_pre_hook(self._before), after]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scales the rates after the closure, since the user's hooks read and set them in it."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._apply(optimizer)
            return None

        def closure_then_scale() -> Any:
            self._restore(optimizer)  # LBFGS calls it several times per step
            result = closure()
            self._apply(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_scale}
        return (args[0], closure_then_scale, *args[2:]), kwargs

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore(optimizer)

    def _apply(self, optimizer: Optimizer) -> None:
        self._restore(optimizer)  # a step() that calls super().step() comes here twice
        factor, groups = self.factor(self._current_step()), optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self._scheduled[optimizer] = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        for group in groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] *= factor
        # A tensor is scaled in place, since a captured or compiled step reads it. Groups may share it.
        for shared in {id(rate): rate for rate in rates if isinstance(rate, Tensor)}.values():
            shared.mul_(factor)

    def _restore(self, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled.pop(optimizer, []), strict=False):
            group["lr"] = group["lr"].copy_(rate) if isinstance(rate, Tensor) else rate
