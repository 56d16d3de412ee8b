"""The options of spikes, checked once: every message names the option, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch.optim import Optimizer

from merge_callback.checks import not_negative, one_of, patterns, positive, true_or_false
from merge_callback.merging import LinearMethod, MergeMethod, resolve_method

HISTORY = 128
"""Number of values in a baseline, and number of values after which many outliers become the new baseline."""

_STOP_AFTER_RESTORE = "stop_after_restore"


@dataclass(frozen=True)
class SpikeOptions:
    """What counts as a loss spike, and what is done about it.

    A spike is ``patience`` consecutive losses above the limit set by the last 128 clean ones, or a loss that
    is not finite while weights, gradients or optimizer state are not finite either. Before the run is
    restored, the weights that would replace the live ones are tried on the batch that raised the alarm. Only
    if they do clearly better were the live weights to blame.

    Example::

        CheckpointMergeCallback(spike=SpikeOptions(patience=8, rewarm_steps=500))
        CheckpointMergeCallback(spike="warn")  # only the action; the rest by default

    Args:
        action: ``"restore"`` the run from the merge of the snapshots before the spike and go on, ``"warn"``
            only, or don't look at all: ``"off"`` (in quotes in YAML, which otherwise reads it as false).
        threshold: The distance of an outlier above the median, in robust standard deviations of the clean
            losses.
        floor: The least distance of an outlier above the median, as a share of the median.
        patience: Consecutive outliers, in optimizer steps, that make a spike; most shorter streaks heal by
            themselves.
        grad_norm: Watch the norm of the unclipped gradients as well, by the same rule. Reads the gradients
            every step.
        watch: Further scalars to watch by the same rule: one ``fnmatch`` pattern, or several, of names that
            the module logs while it trains, ``["train/mtp2_loss", "grad_norm/*"]``. A spike of one is only
            warned of. To restore the run on it (with the same evidence as for the loss), give a mapping:
            ``{"grad_norm/*": "restore"}``.
        evidence: The evidence needed before the weights are replaced: the loss of the ``"batch"`` that raised
            the alarm, computed again with both weights; the loss of the first 8 batches of the
            ``"validation"``, which also serves if the training step can't be run again; or nothing but the
            ``"rules"`` above.
        pma_window: Snapshots that are merged into the restored weights (PMA-init, arXiv 2505.12082 section
            4.5), or as many as the window holds.
        guard: No snapshot is trusted from this many optimizer steps before the first outlier on: the damage
            is 1 to 8 steps older than the loss shows (arXiv 2304.13013 section 3.4).
        method: How these snapshots are merged: a linear method.
        optimizer: What to do with the optimizers' state: ``"keep"`` it (reset it if it is not finite),
            ``"reset"`` it in place, ``"scale"`` its moments as if all gradients had been ``optimizer_scale``
            times as large, or a function of the optimizer that does it. On the demo's models ``"keep"``
            recovers soonest.
        optimizer_scale: The factor of ``optimizer="scale"``.
        rewarm_steps: Optimizer steps over which the learning rate ramps up again, from 0 to that of the
            schedule.
        lr_factor: Each restore multiplies the learning rate by this, for the rest of the run.
        cooldown: Clean losses (optimizer steps) after a restore and its warm-up that make it a success. After
            an earlier spike, the next restore uses older snapshots, and those after it halve the learning
            rate.
        max_restores: Consecutive restores without a success; after these, the next spike stops the run.
        no_snapshot: What to do about a spike before there is a snapshot old enough to restore.
        on_spike: A function that is called on all ranks after each event, with the event's line of
            ``spikes.jsonl`` as a mapping. If it returns ``"stop"``, training ends after this step, as with
            ``trainer.should_stop``. ``"stop_after_restore"`` does so after a restore.

    Raises:
        ValueError: for an option that makes no sense; the message names it, its value and the remedy.
    """

    action: Literal["restore", "warn", "off"] = "restore"
    threshold: float = 6.0
    floor: float = 0.05
    patience: int = 5
    grad_norm: bool = False
    watch: str | Sequence[str] | Mapping[str, str] = ()
    evidence: Literal["batch", "validation", "rules"] = "batch"
    pma_window: int = 3
    guard: int = 10
    method: str | MergeMethod = "sma"
    optimizer: Literal["keep", "reset", "scale"] | Callable[[Optimizer], None] = "keep"
    optimizer_scale: float = 0.1
    rewarm_steps: int = 100
    lr_factor: float = 1.0
    cooldown: int = 128
    max_restores: int = 5
    no_snapshot: Literal["warn", "stop"] = "warn"
    on_spike: Callable[[Mapping[str, Any]], object] | Literal["stop_after_restore"] | None = None

    def __post_init__(self) -> None:
        one_of("spike.action", self.action, ("restore", "warn", "off"))
        one_of("spike.no_snapshot", self.no_snapshot, ("warn", "stop"))
        one_of("spike.evidence", self.evidence, ("batch", "validation", "rules"))
        if not (self.on_spike in (None, _STOP_AFTER_RESTORE) or callable(self.on_spike)):
            raise ValueError(
                f"spike.on_spike={self.on_spike!r} must be a function of the event, "
                f"or {_STOP_AFTER_RESTORE!r}"
            )
        watch = _resolve_watch(self.watch)
        object.__setattr__(self, "watch", watch if isinstance(self.watch, Mapping) else tuple(watch))
        if not callable(self.optimizer):
            one_of("spike.optimizer", self.optimizer, ("keep", "reset", "scale"))
        true_or_false("spike.grad_norm", self.grad_norm)
        for option in ("patience", "pma_window", "max_restores"):
            object.__setattr__(self, option, positive(f"spike.{option}", getattr(self, option)))
        if self.patience >= HISTORY:
            raise ValueError(
                f"spike.patience={self.patience} must be below {HISTORY}: that many make a new baseline"
            )
        for option in ("guard", "rewarm_steps", "cooldown"):
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
        """The resolved method.

        Raises:
            ValueError: for an unknown one, or one that is not linear.
        """
        method = resolve_method(self.method)
        if not isinstance(method, LinearMethod):
            raise ValueError("it must be a linear method, e.g. 'sma'")
        return method

    @property
    def watched(self) -> Mapping[str, str]:
        """What is done about each pattern of ``watch``."""
        return _resolve_watch(self.watch)

    def wants_stop(self, event: Mapping[str, Any]) -> bool:
        """Passes an event to ``on_spike``; returns whether training has to end."""
        if callable(self.on_spike):
            return self.on_spike(event) == "stop"
        return self.on_spike == _STOP_AFTER_RESTORE and event["event"] == "restore"

    def _check_merging(self) -> None:
        """Checks that the method accepts every possible number of snapshots."""
        try:
            for size in range(1, self.pma_window + 1):
                self.merging.normalised_weights([float(i) for i in range(size)])
        except ValueError as error:
            raise ValueError(
                f"spike.method={self.method!r} does not serve spike.pma_window={self.pma_window}: {error}"
            ) from None


def _resolve_watch(watch: object) -> dict[str, str]:
    """What to do about each pattern."""
    if isinstance(watch, Mapping):
        for pattern, action in watch.items():
            one_of(f"spike.watch[{pattern!r}]", action, ("restore", "warn"))
        return {str(pattern): action for pattern, action in watch.items()}
    several = [watch] if isinstance(watch, str) else watch
    return dict.fromkeys(patterns("spike.watch", several), "warn")  # type: ignore[arg-type]


DEFAULT = SpikeOptions()
"""The default options; a run that can't be restored only reports spikes: see ``MergeSession``."""


def resolve_spike(spike: SpikeOptions | str | bool | Mapping[str, Any] | None, window: int) -> SpikeOptions:
    """The options from an object, a mapping or an action alone; ``DEFAULT`` for None.

    Args:
        spike: as given to the callback. ``False`` is YAML's ``off``.
        window: number of snapshots in the window.

    Raises:
        ValueError: for anything else, an unknown option, or more snapshots than the window has.
    """
    if spike is None:
        return DEFAULT
    if isinstance(spike, Mapping):
        known = [option.name for option in fields(SpikeOptions)]
        if unknown := sorted(str(name) for name in spike if name not in known):
            raise ValueError(f"spike has no option {', '.join(unknown)}; its options are {', '.join(known)}")
        spike = SpikeOptions(**spike)
    elif spike is False or isinstance(spike, str):
        spike = SpikeOptions(action=spike or "off")  # type: ignore[arg-type]
    if not isinstance(spike, SpikeOptions):
        raise ValueError(
            f"spike={spike!r} must be a SpikeOptions, e.g. SpikeOptions(action='warn'), a mapping of its "
            "options, or one of 'restore', 'warn', 'off'"
        )
    if spike.pma_window > max(window, DEFAULT.pma_window):
        raise ValueError(
            f"spike.pma_window={spike.pma_window} is more than window={window} holds; choose at most {window}"
        )
    return spike
