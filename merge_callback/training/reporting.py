"""What the user sees while training: logged metrics and a line of advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from merge_callback.training.lr_phase import Phase


def log_metrics(trainer: Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Sends scalars to every logger at the trainer's current step, and to ``trainer.callback_metrics``."""
    scalars = {name: float(value) for name, value in metrics.items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
    # The step on which Lightning logs what the module logs now, so that all curves share one axis.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def gains(live: Mapping[str, Any], merged: Mapping[str, Any], mode_of: Any) -> dict[str, float]:
    """How much better the merged weights score, by metric: positive is better whichever way it improves."""
    return {
        f"merge/gain/{name}": float(live[name] - value)
        if mode_of(name) == "min"
        else float(value - live[name])
        for name, value in merged.items()
        if name in live
    }


def advice(phase: Phase, since: int, change_percent: float | None, given: list[str]) -> str | None:
    """One line for the user when merging stops paying; each is given once a segment (``given`` is updated).

    Source: the gain of a merge follows its diversity, and both die with the learning rate ("Practical
    Guidelines for Model Merging in LLMs Pre-Training", Tab. 2 and Fig. 3).
    """
    if phase is Phase.DECAY and f"decay {since}" not in given:
        given.append(f"decay {since}")
        return (
            f"merge: the learning rate decays since step {since}: the gain of merging will fade with it. "
            "Merges of the stable phase preview what this decay will reach; they are never mixed with it."
        )
    if change_percent is not None and change_percent <= -90 and "spent" not in given:
        given.append("spent")
        return (
            f"merge: the snapshots' diversity has fallen by {-change_percent:.0f} %: merging has stopped "
            "paying, the live weights are as good as their mean."
        )
    return None
