"""The interface of a training loop, which the engine needs to merge and rescue its run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer


class HeldBatch(NamedTuple):
    """A micro-batch, and its index in the epoch."""

    batch: Any
    batch_idx: int


LossOf = Callable[[Sequence[HeldBatch]], float]
"""The mean training loss of some batches, on this rank, with the weights that the module has now."""

Rehearsal = AbstractContextManager[LossOf]
"""A context in which losses can be computed with other weights in the module.

On exit the module, its weights, metrics and logs, and all random generators are as they were, bit for bit.
Each call of ``LossOf`` draws the same random numbers. Signals are deferred on entry and on exit.
"""


class UnrepeatableStepError(RuntimeError):
    """The training step can't be run again just to compute a loss; the message says why."""


Spare = Callable[[Any], AbstractContextManager[Any]]
"""Gives, for a ``Layout``, an ``Arena`` in memory that is not needed for a while."""


class Record(Protocol):
    """Adds an event to the run's event file; see ``EventFile.write``."""

    def __call__(self, kind: str, step: int, **entries: Any) -> None: ...  # noqa: D102


def _forget(kind: str, step: int, **entries: Any) -> None: ...


class Host(Protocol):
    """One training run, as its training loop presents it to the engine.

    To support a new training framework, write a subclass and call a ``MergeSession`` with it. A subclass has
    to supply everything before ``# Defaults``, and of the rest what its framework can do.

    Attributes:
        module: the module whose parameters and buffers are merged, under its own names.
        root: the module as the loop calls it: wrapped for several devices (DDP, FSDP), or the module itself.
        optimizers: all optimizers of the run, always in the same order.
        device: the device that training computes on; the parameters may lie elsewhere.
        default_folder: where merges are published if the user names no folder; a local path or a URL.
        processes: number of the run's processes on this machine.
        scaler: the scaler of fp16 losses; ``None`` if there is none.
        log_every: optimizer steps between the logs of spike metrics; 0 for no such logs.
        counts_batches: whether this rank counts its batches. Of tensor-parallel ranks, which share their
            batches, only one does.
        further_files: contents, by name, of the files that the model's users need besides its weights, such
            as a tokenizer's.
        is_manual: whether the number of optimizer steps per batch is not known in advance.
        will_validate: whether the loop is going to validate merged weights.
        validates_now: whether it does so before the next step.
        epoch: number of completed epochs.
        record: adds an event to the run's event file. The session sets it, on the first rank.
        spare: gives room for a copy of the live weights, for a while; ``None`` is new memory on the host. The
            session sets it.
    """

    module: nn.Module
    root: nn.Module
    optimizers: Sequence[Optimizer]
    device: torch.device
    default_folder: str
    processes: int

    @property
    def step(self) -> int:
        """Optimizer steps taken so far by all optimizers; read after every batch, so it has to be cheap."""
        ...

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; ``None`` if it has no end, or if that is not known."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends scalars to the run's loggers; each rank calls it when it has them."""
        ...

    def stop(self) -> None:
        """Ends the run after this step."""
        ...

    # Defaults

    scaler: GradScaler | None = None
    log_every: int = 50
    counts_batches: bool = True
    is_manual: bool = False
    further_files: Mapping[str, bytes] = MappingProxyType({})
    record: Record = staticmethod(_forget)
    spare: Spare | None = None

    @property
    def will_validate(self) -> bool:  # noqa: D102
        return True

    @property
    def validates_now(self) -> bool:  # noqa: D102
        return False

    @property
    def epoch(self) -> int:  # noqa: D102
        return 0

    @property
    def total_batches(self) -> int | None:
        """The ``total_steps`` with one optimizer step per batch."""
        return self.total_steps

    @property
    def log_step(self) -> int:
        """The run's position on the axis that its other curves are drawn over."""
        return self.step

    def expose(self, metrics: Mapping[str, float]) -> None:
        """Makes scalars available to whatever monitors them; all ranks call it with the same ones at once."""
        return

    def log_text(self, text: str, step: int) -> None:
        """Shows an event in every logger that takes text; a logger's failure must not end the run."""
        return

    def sample_indices(self, epoch: int, batch_idx: int) -> list[int] | None:
        """The data set's indices of a batch on this rank; ``None`` if they are not known."""
        return None

    def logged_scalars(self, patterns: Sequence[str]) -> Callable[[], Mapping[str, Tensor | float]]:
        """Returns a function that gives the scalars newly logged under matching names, without waiting."""
        return dict

    @property
    def probed(self) -> nn.Module:
        """The module whose ``forward`` takes a batch and returns logits."""
        return self.module

    def forward_pass(self) -> AbstractContextManager[Callable[..., Any]]:
        """A context for a forward pass of ``probed`` in evaluation mode, between two steps, on all ranks.

        It yields what to call with the arguments of ``forward``, and sees to the loop's precision and to what
        the module logs. The engine keeps and restores everything else. DDP's wrapper is left out: it would
        talk to the other ranks, and note that it was called.
        """
        is_ddp = isinstance(self.root, nn.parallel.DistributedDataParallel)
        return nullcontext(self.module if is_ddp else self.root)

    def rehearse(self, source: str) -> Rehearsal:
        """A rehearsal of training batches (``"batch"``) or of the first validation ones (``"validation"``).

        Args:
            source: ``"batch"`` or ``"validation"``.

        Raises:
            UnrepeatableStepError: if the loop can't do it; raised on entry at the latest.
        """
        raise UnrepeatableStepError(f"this training loop can't compute the loss of a {source} again")

    def validation_loss(self) -> float:
        """The loss of the last validation; NaN if there is none."""
        return math.nan


def report(host: Host, metrics: Mapping[str, float]) -> None:
    """Logs scalars now and exposes them; all ranks call it at the same time."""
    host.expose(metrics)
    log(host, metrics, host.step, host.log_step)


def log(host: Host, metrics: Mapping[str, float], step: int, log_step: int) -> None:
    """Logs scalars and records them.

    Args:
        host: the run.
        metrics: the scalars, by name.
        step: optimizer steps taken when they arose.
        log_step: the step on the loggers' axis.
    """
    host.log(metrics, log_step)
    host.record("metrics", step, values=metrics, log_step=log_step)
