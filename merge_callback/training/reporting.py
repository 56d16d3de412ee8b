"""What the user sees while training: logged metrics and a line of advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def gains(trainer: Trainer, live: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, float]:
    """How much better the merged weights score, by metric: positive is better whichever way it improves."""
    mode_of = metric_modes(trainer)
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
            f"merge: the snapshots lie {-change_percent:.0f} % closer together than at first: merging has little "
            "left to gain, the live weights score about the same."
        )
    return None


def metric_modes(trainer: Trainer) -> Callable[[str], str]:
    """Which way each metric improves: ``"min"`` or ``"max"`` for a live metric's name.

    What a callback monitors with an explicit mode counts first (``ModelCheckpoint(monitor="val_f1",
    mode="max")``); then the name: a loss, error, perplexity or distance is better when lower.
    """
    monitored = {
        str(c.monitor).removeprefix("merged/"): c.mode
        for c in trainer.callbacks  # type: ignore[attr-defined]
        if getattr(c, "monitor", None) and getattr(c, "mode", None) in ("min", "max")
    }
    return lambda name: monitored.get(name) or ("min" if _sounds_like_loss(name) else "max")


_LOWER_IS_BETTER = {"loss", "nll", "ce", "xent", "perplexity", "ppl", "error", "err", "bpb", "bpc", "bpt"}
_LOWER_IS_BETTER |= {
    "mse",
    "rmse",
    "mae",
    "mape",
    "wer",
    "cer",
    "kl",
    "divergence",
    "distance",
    "entropy",
    "brier",
}


def _sounds_like_loss(name: str) -> bool:
    words = "".join(c.lower() if c.isalnum() else " " for c in name).split()
    return any(w in _LOWER_IS_BETTER or w.endswith(("loss", "error", "entropy", "perplexity")) for w in words)
