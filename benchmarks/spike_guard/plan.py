"""The sizes and lengths of the runs, and the ways in which they are restored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from merge_callback import SpikeOptions

Record = dict[str, Any]

GUARDS, WINDOWS, POLICIES = (5, 10, 30, 100), (1, 3, 10), ("keep", "reset")
DEFAULT = (10, 3, "keep")
MODELS = ("dense", "moe")


@dataclass(frozen=True)
class Plan:
    """The lengths in optimizer steps, and the sizes; a cache holds the runs of one plan only."""

    warmup: int = 100
    trunk: int = 1188
    """Where the ways part."""
    onset: int = 1200
    """Steps taken before the first one that is broken."""
    steps: int = 1500
    rewarm: int = 30
    every: int = 10
    window: int = 24
    """Enough for ten snapshots that are 100 steps old, with what comes in until the spike is noticed."""
    batch_size: int = 32
    context: int = 16
    width: int = 32
    validations: tuple[int, ...] = (1460, 1480, 1500)
    validation_batches: int = 32


PLAN = Plan()


def arm_name(guard: int, window: int, policy: str) -> str:
    return f"guard={guard} pma_window={window} optimizer={policy}"


ARMS: dict[str, SpikeOptions] = {
    "no action": SpikeOptions(action="warn"),
    **{
        arm_name(guard, window, policy): SpikeOptions(
            guard=guard,
            pma_window=window,
            optimizer=policy,  # type: ignore[arg-type]
            rewarm_steps=PLAN.rewarm,
        )
        for guard, window, policy in itertools.product(GUARDS, WINDOWS, POLICIES)
    },
}
