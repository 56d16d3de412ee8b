"""What the user sees while training: logged metrics and a line of advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from merge_callback.signals.lr_phase import Phase
from merge_callback.trainers.lightning.metric_direction import MetricDirections


def logged_step(trainer: Trainer) -> int:
    """Where training is on the axis that all curves share.

    That is the step Lightning logs the module's metrics at, or what the module itself logs as ``step``.
    """
    results: Mapping[str, Any] = trainer._results or {}
    if any(r.meta.name == "step" and not r.has_reset for r in results.values()):  # of the loop that runs now
        return int(trainer.callback_metrics["step"])
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Sends scalars to every logger, and to ``trainer.callback_metrics``: on all ranks at the same time."""
    show_metrics(trainer, metrics)
    tell_loggers(trainer, metrics, logged_step(trainer))


def show_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Makes scalars known to callbacks that monitor them: all ranks have to know the same."""
    known = {name: torch.tensor(value, device="cpu") for name, value in metrics.items()}
    trainer.callback_metrics.update(known)


def tell_loggers(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Sends scalars to every logger, at ``step``."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
        logger.save()


def gains(
    live: Mapping[str, Tensor], merged: Mapping[str, Tensor], lower: Mapping[str, bool | None]
) -> dict[str, float]:
    """How much better the merged weights score, by metric: positive is better whichever way it improves.

    Args:
        live: what the live weights score.
        merged: what the merged ones do.
        lower: whether lower is better, by metric; of those with ``None`` there is no gain to tell.
    """
    return {
        f"merge/gain/{name}": float(live[name] - merged[name]) * (1 if lower[name] else -1)
        for name in merged
        if name in live and lower.get(name) is not None
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
            f"merge: the snapshots lie {-change_percent:.0f} % closer together than at first: merging has "
            "little left to gain, the live weights score about the same."
        )
    return None


def lower_is_better(name: str, trainer: Trainer, results: Mapping[str, Any]) -> bool | None:
    """Whether a metric improves downwards, where no options say so: see ``MetricDirections``."""
    return MetricDirections().lower_is_better(name, trainer, results)
