"""What benchmarks that train under Lightning have in common: a quiet process, and what is noted of a run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


def on_one_quiet_thread() -> None:
    """Makes this process compute on one thread, and say nothing but errors."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class Losses(Callback):
    """Notes the loss of every batch, NaN for a batch without one."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.values.append(float("nan") if loss is None else float(loss))


class SaveAt(Callback):
    """Saves a checkpoint after an optimizer step: the trunk, from which several ways go on."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
