"""What a training loop must tell and do, so that its run can be merged and rescued."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer


class HeldBatch(NamedTuple):
    """A micro-batch, and its place in the epoch."""

    batch: Any
    batch_idx: int


LossOf = Callable[[Sequence[HeldBatch]], float]
"""The mean training loss of some batches, on this rank, with the weights that the module has now."""

Rehearsal = AbstractContextManager[LossOf]
"""A context within which losses can be computed with other weights in the module.

On exit the module, its weights, metrics and logs, and all random generators are as they were, bit for bit.
Each call of ``LossOf`` draws the same random numbers. Signals are deferred on entry and on exit.
"""


class UnrepeatableStepError(RuntimeError):
    """The training step can't be run again just to compute a loss; the message says why."""


class Host(Protocol):
    """One training run, as its training loop shows it to the engine.

    A new training framework supplies one of these and calls a ``MergeSession``. A subclass has to supply what
    stands before ``# Defaults``; of the rest, what its framework can do.

    Attributes:
        module: whose parameters and buffers are merged, under its own names.
        root: the same as the loop calls it: wrapped for several devices (DDP, FSDP), or the module itself.
        optimizers: all of the run's, in an order that stays.
        device: that training uses.
        default_folder: of what is published, if the user names none; a local path or a URL.
        processes: of the run, on this machine.
        scaler: of fp16 losses; ``None`` if there is none.
        log_every: optimizer steps between the logs of what is known of spikes; 0 for no such logs.
        counts_batches: whether this rank's batches are counted. Of tensor-parallel ranks, which share their
            batches, one counts them.
        further_files: contents, by name, of what a user of the model needs beside its weights: a tokenizer's.
        is_manual: whether nobody knows in advance how many optimizer steps a batch takes.
        will_validate: whether merged weights are going to be asked for, to be validated.
        epoch: epochs that are over.
    """

    module: nn.Module
    root: nn.Module
    optimizers: Sequence[Optimizer]
    device: torch.device
    default_folder: str
    processes: int

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, of all optimizers; read after every batch, so it has to be cheap."""
        ...

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; ``None`` if it has no end, or nobody knows."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends scalars to the run's loggers; each rank when it has them."""
        ...

    def stop(self) -> None:
        """Has the run end after this step."""
        ...

    # Defaults

    scaler: GradScaler | None = None
    log_every: int = 50
    counts_batches: bool = True
    is_manual: bool = False
    further_files: Mapping[str, bytes] = MappingProxyType({})

    @property
    def will_validate(self) -> bool:  # noqa: D102
        return True

    @property
    def epoch(self) -> int:  # noqa: D102
        return 0

    @property
    def total_batches(self) -> int | None:
        """What ``total_steps`` would be with one optimizer step a batch."""
        return self.total_steps

    @property
    def log_step(self) -> int:
        """The run's position on the axis that its other curves are drawn over."""
        return self.step

    def expose(self, metrics: Mapping[str, float]) -> None:
        """Makes scalars known to whatever monitors them: all ranks have the same ones at the same time."""
        return

    def log_text(self, text: str, step: int) -> None:
        """Shows an event in every logger that takes text; none that fails may end the run."""
        return

    def sample_indices(self, epoch: int, batch_idx: int) -> list[int] | None:
        """The data set's indices of a batch on this rank; ``None`` if nobody knows."""
        return None

    def logged_scalars(self, patterns: Sequence[str]) -> Callable[[], Mapping[str, Tensor | float]]:
        """Gives what the module logs in training under names that match, each value once, unwaited for."""
        return dict

    def rehearse(self, source: str, device: torch.device) -> Rehearsal:
        """A rehearsal of training batches (``"batch"``) or of the first validation ones (``"validation"``).

        Args:
            source: which.
            device: for the copy of the live weights.

        Raises:
            UnrepeatableStepError: if the loop can't do it; on entry at the latest.
        """
        raise UnrepeatableStepError(f"this training loop can't compute the loss of a {source} again")

    def validation_loss(self) -> float:
        """The loss of the last validation; NaN if there is none."""
        return math.nan


def report(host: Host, metrics: Mapping[str, float]) -> None:
    """Logs scalars now and exposes them: on all ranks at the same time."""
    host.expose(metrics)
    host.log(metrics, host.log_step)
