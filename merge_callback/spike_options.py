"""The options of spikes, checked once: every message names the option, the value and the mend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer

from merge_callback.checks import not_negative, one_of, positive, true_or_false
from merge_callback.merging import LinearMethod, MergeMethod, resolve_method
from merge_callback.training.spike import HISTORY


@dataclass(frozen=True)
class SpikeOptions:
    """What is a loss spike, and what is done about it.

    A spike is a loss that is not finite, or ``patience`` losses in a row above
    ``median + max(threshold · 1.4826 · MAD, floor · |median|)`` of the last 128 losses that were not.

    Raises:
        ValueError: for an option that makes no sense; the message names it, its value and the mend.
    """

    action: Literal["restore", "warn", "off"] = "restore"
    """``"restore"`` the run from the merge of the snapshots before the spike and go on; ``"warn"`` only; or
    don't look at all, ``"off"`` (in quotes in YAML, where it else means false)."""
    threshold: float = 6.0
    """How many robust standard deviations above the median an outlier lies."""
    floor: float = 0.05
    """How far above the median an outlier lies at least, as a share of it."""
    patience: int = 5
    """Outliers in a row that make a spike; fewer heal by themselves. A NaN is one at once."""
    grad_norm: bool = False
    """Watch the norm of the unclipped gradients as well, by the same rule. Reads the gradients every step."""
    pma_window: int = 3
    """Snapshots that are merged into the restored weights (PMA-init, arXiv 2505.12082 section 4.5); fewer
    where the window holds fewer."""
    guard: int = 10
    """Optimizer steps before the first outlier from which on no snapshot is trusted: the damage is older than
    the loss shows (1 to 8 steps, arXiv 2304.13013 section 3.4)."""
    method: str | MergeMethod = "sma"
    """How they are merged."""
    optimizer: Literal["keep", "reset", "scale"] | Callable[[Optimizer], None] = "keep"
    """``"keep"`` the optimizers' state where it is finite (else it is reset), ``"reset"`` it in place,
    ``"scale"`` its moments as if all gradients had been ``optimizer_scale`` times as large; or a function of
    the optimizer. On the demo's models ``"keep"`` recovers soonest."""
    optimizer_scale: float = 0.1
    """See ``optimizer``."""
    rewarm_steps: int = 100
    """Optimizer steps over which the learning rate ramps up again, from 0 to where the schedule then is."""
    lr_factor: float = 1.0
    """Multiplies the learning rate for good, at each restore."""
    cooldown: int | None = None
    """Optimizer steps after a restore within which another spike means that it did not help: the next restore
    is from older snapshots, those after it halve the learning rate. Default: five times ``rewarm_steps``, at
    least 128."""
    max_restores: int = 5
    """Restores in a row, each within the cooldown of the one before; a further one stops the run."""
    no_snapshot: Literal["warn", "stop"] = "warn"
    """What to do about a spike before there is a snapshot old enough to restore."""

    def __post_init__(self) -> None:
        one_of("spike.action", self.action, ("restore", "warn", "off"))
        one_of("spike.no_snapshot", self.no_snapshot, ("warn", "stop"))
        if not callable(self.optimizer):
            one_of("spike.optimizer", self.optimizer, ("keep", "reset", "scale"))
        true_or_false("spike.grad_norm", self.grad_norm)
        for option in ("patience", "pma_window", "max_restores"):
            object.__setattr__(self, option, positive(f"spike.{option}", getattr(self, option)))
        if self.patience >= HISTORY:
            raise ValueError(
                f"spike.patience={self.patience} must be below {HISTORY}: so many make a new baseline"
            )
        for option in ("guard", "rewarm_steps", "cooldown"):
            if option != "cooldown" or self.cooldown is not None:
                object.__setattr__(self, option, not_negative(f"spike.{option}", getattr(self, option)))
        for option in ("threshold", "floor", "lr_factor", "optimizer_scale"):
            value, most = (
                getattr(self, option),
                1.0 if option in ("lr_factor", "optimizer_scale") else math.inf,
            )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= most or value == math.inf:
                bound = " of at most 1" if most == 1 else ""
                raise ValueError(f"spike.{option}={value!r} must be a positive number{bound}")
        self._check_merging()

    @property
    def merging(self) -> LinearMethod:
        """The method.

        Raises:
            ValueError: for an unknown one, or one that is not linear.
        """
        method = resolve_method(self.method)
        if not isinstance(method, LinearMethod):
            raise ValueError("it must be a linear method, e.g. 'sma'")
        return method

    @property
    def cooldown_steps(self) -> int:
        """The cooldown in optimizer steps."""
        return max(5 * self.rewarm_steps, 128) if self.cooldown is None else self.cooldown

    def _check_merging(self) -> None:
        """Makes sure that the method serves as many snapshots as there may be."""
        try:
            for size in range(1, self.pma_window + 1):
                self.merging.normalised_weights([float(i) for i in range(size)])
        except ValueError as error:
            raise ValueError(
                f"spike.method={self.method!r} does not serve spike.pma_window={self.pma_window}: {error}"
            ) from None


def resolve_spike(spike: SpikeOptions | None) -> SpikeOptions:
    """The defaults where nothing is given.

    Raises:
        ValueError: for anything that is not a ``SpikeOptions``.
    """
    if spike is not None and not isinstance(spike, SpikeOptions):
        raise ValueError(f"spike={spike!r} must be a SpikeOptions, e.g. SpikeOptions(action='warn')")
    return spike or SpikeOptions()
