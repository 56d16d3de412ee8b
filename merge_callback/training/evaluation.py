"""Validation with other weights, inside a running fit.

``trainer.validate()`` inside fit corrupts the loops' state, so this runs Lightning's own evaluation loop
beside the trainer's: same dataloaders, limits, precision and module hooks, but its own results, no other
callbacks, and a logger connector that logs nothing.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.merge import Merge
from merge_callback.training.reporting import gains, log_metrics

log = logging.getLogger(__name__)


class MergedValidation:
    """Validates each merge once and makes ``merged/…`` known to callbacks that monitor it."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.step = -1
        self.metrics: dict[str, float] = {}

    def update(self, merge: Merge | None) -> None:
        """Validates ``merge`` if it is new. A validation that fails is reported; the run goes on."""
        live = dict(self.trainer.callback_metrics)
        if merge is not None and merge.step != self.step:
            try:
                merged = validate_with(self.trainer, self.module, merge.arena)
            except Exception:
                log.exception("merge: validation with the merged weights failed; the live weights are back")
            else:
                self.step = merge.step
                self.metrics = {f"merged/{name}": float(value) for name, value in merged.items()}
                log_metrics(self.trainer, {**self.metrics, **gains(self.trainer, live, merged)})
        # A monitor must find its key from the first validation on: so far the merge is the model itself.
        known = {f"merged/{k}": v for k, v in live.items() if not k.startswith(("merge/", "merged/"))}
        known |= {name: torch.tensor(value) for name, value in self.metrics.items()}
        self.trainer.callback_metrics.update(known)

    def state_dict(self) -> dict[str, Any]:
        """The last validated merge and its metrics, as primitives."""
        return {"step": self.step, "metrics": dict(self.metrics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.step, self.metrics = state["step"], dict(state["metrics"])


def validate_with(trainer: Trainer, module: LightningModule, merged: Arena) -> dict[str, Tensor]:
    """Runs the fit's validation with ``merged`` in place of the live weights.

    To be called from ``on_validation_end``. Whatever happens inside, the live weights, all buffers, the
    module's torchmetrics and every random generator come back bit for bit.

    Returns:
        Every metric the module logged for the epoch, by its name in ``trainer.callback_metrics``.

    Raises:
        Exception: whatever the module's validation raises.
    """
    loop = _BesideLoop(trainer)
    silent = _SilentLoggerConnector(trainer)
    with ExitStack() as stack:
        # This hook runs under the outer loop's inference mode, whose tensors could never be trained on.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(isolate_rng(include_cuda=torch.cuda.is_available()))
        stack.enter_context(_kept_generators(trainer))
        stack.enter_context(_kept_metrics(module))
        stack.enter_context(_swapped_weights(module, merged))
        stack.enter_context(_replaced(trainer, "callbacks", []))
        stack.enter_context(_replaced(trainer, "_logger_connector", silent))
        stack.enter_context(_replaced(trainer.fit_loop.epoch_loop, "val_loop", loop))
        loop.run()
    return dict(silent._callback_metrics)


class _BesideLoop(_EvaluationLoop):
    """An evaluation loop that shares the dataloaders of the trainer's validation loop."""

    def __init__(self, trainer: Trainer) -> None:
        self._live = trainer.fit_loop.epoch_loop.val_loop
        super().__init__(
            trainer,
            TrainerFn.FITTING,
            RunningStage.VALIDATING,
            verbose=False,
            inference_mode=self._live.inference_mode,
        )

    def setup_data(self) -> None:
        self._combined_loader = self._live._combined_loader
        self._max_batches = self._live._max_batches
        self._seen_batches_per_dataloader = defaultdict(int)


class _SilentLoggerConnector(_LoggerConnector):
    """Collects metrics as ever; sends nothing to the loggers."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


@contextmanager
def _swapped_weights(module: LightningModule, merged: Arena) -> Iterator[None]:
    model = ModelTensors.of(module)
    tensors = model.tensors
    live = Arena.empty(Layout.of(tensors), merged.buffer.device)
    live.copy_from(tensors)
    transient = [(buffer, buffer.clone()) for buffer in model.transient]
    try:
        merged.copy_to(tensors)
        yield
    finally:
        live.copy_to(tensors)
        for buffer, kept in transient:
            buffer.copy_(kept)


@contextmanager
def _kept_metrics(module: nn.Module) -> Iterator[None]:
    """The module's torchmetrics start empty and end as they were, down to the states they share."""
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    collections = [part for part in module.modules() if isinstance(part, MetricCollection)]
    kept = [(owner, dict(vars(owner))) for owner in (*metrics, *collections)]
    for metric in metrics:
        for name, default in metric._defaults.items():
            if isinstance(default, list):
                setattr(metric, name, [])  # reset() would clear the live list itself
        metric.reset()
    for collection in collections:
        collection._state_is_copy = True  # makes it link the states of its compute groups again
    try:
        yield
    finally:
        for owner, attributes in kept:
            vars(owner).clear()
            vars(owner).update(attributes)


@contextmanager
def _kept_generators(trainer: Trainer) -> Iterator[None]:
    """Generators that a dataloader or its sampler owns: drawn from, they would shift later validations."""
    loader = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    owners = [o for dl in (loader.flattened if loader else []) for o in _owners(dl)]
    generators = [g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)]
    kept = [(g, g.get_state()) for g in generators]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def _owners(dataloader: Any) -> list[Any]:
    sampler, batches = getattr(dataloader, "sampler", None), getattr(dataloader, "batch_sampler", None)
    return [dataloader, sampler, getattr(batches, "sampler", None)]


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
