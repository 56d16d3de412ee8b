"""The ``Host`` of a Lightning fit."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from merge_callback.engine.charts import Charts
from merge_callback.metrics import SPIKE_TEXT
from merge_callback.signals.host import Host, Rehearsal
from merge_callback.trainers.lightning.private import (
    LOGGER_CONNECTOR,
    RESULTS,
    callback_metrics,
    is_validation_next,
    logged_now,
    logged_step,
    names_of,
    own_logger_connector,
    step_progress,
    tag_prefix,
    training_loader,
)
from merge_callback.trainers.lightning.quiet import quiet_logger
from merge_callback.trainers.lightning.rehearsal import (
    rehearsed_training,
    rehearsed_validation,
    validation_loss,
)
from merge_callback.trainers.lightning.undisturbed import replaced

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

_WALKED = 1_000_000  # samples of a rank; iterating over more would delay training


class LightningHost(Host):
    """One Lightning fit.

    Args:
        trainer: a trainer in fit, whose strategy has set up, moved and restored the model.
        module: its module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.lightning_module = trainer, module
        self.module: nn.Module = module
        self.device = trainer.strategy.root_device
        self.processes = trainer.num_devices
        self.scaler: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        self.log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.counts_batches = _counts_batches(trainer)
        self.is_manual = not module.automatic_optimization
        self._progress = step_progress(trainer)
        self._failing: list[Logger] = []
        self._charts: dict[int, Charts] = {}  # by the logger's id
        self._epochs: Any = trainer.fit_loop.epoch_progress.current

    @property
    def root(self) -> nn.Module:  # type: ignore[override]
        """The module as the strategy has wrapped it."""
        model = self.trainer.strategy.model
        assert model is not None
        return model

    @property
    def optimizers(self) -> Sequence[Optimizer]:  # type: ignore[override]
        """The trainer's optimizers."""
        return self.trainer.optimizers

    @property
    def default_folder(self) -> str:  # type: ignore[override]
        """``merges`` next to the folder that ``ModelCheckpoint`` saves in by default, by the same rule."""
        root = self.trainer.default_root_dir
        if self.trainer.loggers:
            logger = self.trainer.loggers[0]
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            save_dir = root if logger.save_dir is None else logger.save_dir
            root = os.path.join(save_dir, str(logger.name), version)
        return os.path.join(root, "merges")

    @property
    def step(self) -> int:
        """``trainer.global_step``."""
        return self._progress.completed  # type: ignore[no-any-return]

    @property
    def total_batches(self) -> int | None:
        """Batches the whole run will step with; ``None`` if it has no end."""
        steps = self.trainer.estimated_stepping_batches
        return None if steps == float("inf") or steps < 0 else int(steps)

    @property
    def total_steps(self) -> int | None:
        """Steps as counted by ``trainer.global_step``; ``None`` if the steps per batch are unknown."""
        batches = self.total_batches
        return None if self.is_manual and batches != self.trainer.max_steps else batches

    @property
    def loss_divisor(self) -> int:
        """The divisor of the loss that Lightning passes to ``on_train_batch_end``."""
        return 1 if self.is_manual else self.trainer.accumulate_grad_batches

    @property
    def will_validate(self) -> bool:
        """Whether the fit validates."""
        return self.trainer.enable_validation

    @property
    def validates_now(self) -> bool:
        """Whether the fit validates after this batch."""
        return self.will_validate and is_validation_next(self.trainer)

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return int(self._epochs.processed)

    @property
    def log_step(self) -> int:
        """The axis of the module's own curves."""
        return logged_step(self.trainer)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends scalars to every logger."""
        for logger in self.trainer.loggers:
            try:
                logger.log_metrics(dict(metrics), step=step)
                self._charts_of(logger).show(getattr(logger, "experiment", None), metrics)
                logger.save()
            except Exception:
                if logger not in self._failing:  # once: a server that is gone stays so
                    self._failing.append(logger)
                    log.exception("merge: %s failed; training goes on without", type(logger).__name__)

    def _charts_of(self, logger: Logger) -> Charts:
        prefix = tag_prefix(logger)
        return self._charts.setdefault(id(logger), Charts(lambda name: f"{prefix}{name}"))

    def expose(self, metrics: Mapping[str, float]) -> None:
        """Puts scalars into ``trainer.callback_metrics``."""
        known = {name: torch.tensor(value, device="cpu") for name, value in metrics.items()}
        callback_metrics(self.trainer).update(known)

    def log_text(self, text: str, step: int) -> None:
        """Shows an event in every logger that takes text (TensorBoard)."""
        for logger in self.trainer.loggers:
            try:
                experiment = getattr(logger, "experiment", None)
                if hasattr(experiment, "add_text"):
                    experiment.add_text(SPIKE_TEXT, text, step)  # type: ignore[union-attr]
            except Exception:
                log.exception("merge: %s could not show the event; training goes on", type(logger).__name__)

    def stop(self) -> None:
        """Sets ``trainer.should_stop``."""
        self.trainer.should_stop = True

    def sample_indices(self, epoch: int, batch_idx: int) -> list[int] | None:
        """The data set's indices of a batch on this rank, if the sampler is repeatable."""
        return sample_indices(self.trainer, epoch, batch_idx)

    def logged_scalars(self, patterns: Sequence[str]) -> Callable[[], Mapping[str, Tensor | float]]:
        """The values passed to ``self.log`` since the last step.

        Only values logged per step count (``on_step=True``, the default in training), because Lightning keeps
        no single values of others.
        """
        matches: dict[str, bool] = {}
        last: dict[str, Tensor] = {}

        def new_values() -> dict[str, Tensor | float]:
            found: dict[str, Tensor | float] = {}
            for key, name, value in logged_now(self.trainer):
                if key not in matches:
                    matches[key] = any(fnmatchcase(name, pattern) for pattern in patterns)
                if matches[key] and value is not None and value is not last.get(key):
                    found[name] = last[key] = value
            return found

        return new_values

    @property
    def probed(self) -> nn.Module:
        """The module; if it defines no ``forward``, the largest of its parts."""
        module = self.lightning_module
        if type(module).forward is not names_of(self.trainer).LightningModule.forward:
            return module
        return max(
            module.children(), key=lambda part: sum(p.numel() for p in part.parameters()), default=module
        )

    @contextmanager
    def forward_pass(self) -> Iterator[Callable[..., Any]]:
        """Calls the module in the trainer's precision; what it logs meanwhile goes nowhere."""
        trainer, probed = self.trainer, self.probed
        plugin, loop = trainer.precision_plugin, trainer.fit_loop.epoch_loop
        with ExitStack() as stack:
            called = stack.enter_context(super().forward_pass())
            if probed is not self.module:
                if called is not self.module:
                    raise RuntimeError(f"under FSDP, {type(self.module).__name__} has to define forward")
                called = probed
            quiet = [quiet_logger(logger) for logger in trainer.loggers]
            for owner, name, value in (
                (trainer, "loggers", quiet),
                (trainer, LOGGER_CONNECTOR, own_logger_connector(trainer)),
                (loop, RESULTS, names_of(trainer)._ResultCollection(training=True)),
            ):
                stack.enter_context(replaced(owner, name, value))

            def call(*args: Any, **kwargs: Any) -> Any:
                args, kwargs = plugin.convert_input((args, kwargs))
                with plugin.forward_context():
                    return called(*args, **kwargs)

            yield call

    def rehearse(self, source: str) -> Rehearsal:
        """Runs the training step, or the validation, again."""
        kind = {"batch": rehearsed_training, "validation": rehearsed_validation}[source]
        return kind(self.trainer, self.lightning_module, self.spare)

    def validation_loss(self) -> float:
        """The last logged validation loss; NaN if there is none."""
        name = validation_loss(self.trainer)
        return float(self.trainer.callback_metrics[name]) if name else math.nan


def _counts_batches(trainer: Trainer) -> bool:
    """Whether this rank counts its batches; of tensor-parallel ranks, which share theirs, the first does."""
    strategy: Any = trainer.strategy
    if not isinstance(strategy, names_of(trainer).ModelParallelStrategy):
        return True
    return bool(strategy.device_mesh["tensor_parallel"].get_local_rank() == 0)


def sample_indices(trainer: Trainer, epoch: int, batch_idx: int) -> list[int] | None:
    """The data set's indices of a batch on this rank, if the sampler gives the same ones each time.

    That is a sequential or a distributed sampler (which shuffles by seed and epoch), in batches of one size.
    """
    loaders = training_loader(trainer)
    loader = loaders.flattened[0] if loaders is not None and len(loaders.flattened) == 1 else None
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler:
        return None
    sampler: Any = batches.sampler
    size = batches.batch_size
    first = batch_idx * size
    if type(sampler) is SequentialSampler:
        return list(range(first, min(first + size, len(sampler)))) or None
    # Exactly this type: a wrapper of another sampler would draw from that again.
    if type(sampler) is DistributedSampler and sampler.epoch == epoch and len(sampler) <= _WALKED:
        return list(islice(iter(sampler), first, first + size))
    return None
