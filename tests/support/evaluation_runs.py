"""Runs whose merges are validated, and what is seen of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from evaluated_modules import (
    BatchIterating,
    Collected,
    Combined,
    Diffusing,
    Forces,
    Forked,
    Holding,
    Impatient,
    Normed,
    OwnAverage,
    OwnAxis,
    OwnLogging,
    OwnSchedule,
    Ranked,
    Reassigning,
    Remembering,
    Rolling,
    Scored,
    Tracked,
    TwoLoaders,
    Wrapped,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset
from training_runs import (
    Classifier,
    Probe,
    loader,
    rows,
    seed,
    train,
)

from merge_callback import CheckpointMergeCallback


class Curves(Logger):
    """A logger that keeps what it is told."""

    name, version, save_dir = "curves", "0", None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.rows if name in metrics}

    def live(self) -> list[tuple[int, dict[str, float]]]:
        """What is logged apart from the merging."""
        kept = [
            (step, {n: v for n, v in metrics.items() if not n.startswith(("merge/", "merge_", "merged/"))})
            for step, metrics in self.rows
        ]
        return [row for row in kept if row[1]]


class Metrics(Callback):
    """What a callback that stands behind the merging can see after each validation."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.seen[trainer.global_step] = {n: float(v) for n, v in trainer.callback_metrics.items()}


class Tally:
    """Counts, out of reach of whatever restores the attributes of a module and of objects in it."""

    _counts: ClassVar[WeakKeyDictionary["Tally", Counter]] = WeakKeyDictionary()

    @property
    def counts(self) -> Counter:
        return self._counts.setdefault(self, Counter())


def merging(folder: Path, **options) -> CheckpointMergeCallback:
    """A snapshot every second step: each validation, after 8 steps, has a merge of 3."""
    options = {"window": 3, "every_n_steps": 2, "keep_last": None, "dirpath": folder / "merges", **options}
    return CheckpointMergeCallback(**options)


# Cases


class Unsized(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        yield from rows(32)


def two_loaders():
    return [loader(16), loader(24, batch_size=4)]


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader({"a": loader(16), "b": loader(24, batch_size=4)}, mode)


def shuffled(seed: int = 3) -> DataLoader:
    return loader(32, shuffle=True, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A module, its validation data and options of the trainer."""

    make: Callable[[], LightningModule] = Classifier
    val: Callable[[], Any] = lambda: loader(32)
    trainer: dict[str, Any] = field(default_factory=dict)
    repeatable: bool = True  # a second validation of the same weights gives the same metrics
    own_weights: bool = False  # it is validated with weights that are no part of it: nothing is merged/…


CASES = {
    "plain": Case(),
    "limited": Case(trainer={"limit_val_batches": 2}),
    "limited to a part": Case(trainer={"limit_val_batches": 0.5}),
    "two loaders": Case(TwoLoaders, two_loaders),
    "two loaders, limited": Case(TwoLoaders, two_loaders, {"limit_val_batches": 1}),
    "sequential": Case(TwoLoaders, lambda: CombinedLoader(two_loaders(), "sequential")),
    "min_size": Case(Combined, combined("min_size")),
    "max_size": Case(Combined, combined("max_size")),
    "max_size_cycle": Case(Combined, combined("max_size_cycle")),
    "inside the epoch": Case(Scored, trainer={"val_check_interval": 3}),
    "across epochs": Case(Scored, trainer={"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "every second epoch": Case(trainer={"check_val_every_n_epoch": 2, "max_epochs": 4}),
    "sanity check": Case(Scored, trainer={"num_sanity_val_steps": 2}),
    "reloaded": Case(trainer={"reload_dataloaders_every_n_epochs": 1}),
    "accumulation": Case(Scored, trainer={"val_check_interval": 3, "accumulate_grad_batches": 2}),
    "bf16-mixed": Case(Scored, trainer={"precision": "bf16-mixed"}),
    "bf16-true": Case(trainer={"precision": "bf16-true"}),
    "profiled": Case(trainer={"profiler": "simple"}),
    "metric objects": Case(Scored),
    "collections": Case(Collected),
    "collections, inside": Case(Collected, trainer={"val_check_interval": 3}),
    "lists": Case(Ranked, trainer={"val_check_interval": 3}, repeatable=False),
    "wrappers": Case(Wrapped, trainer={"val_check_interval": 3}),
    "tracker": Case(Tracked, repeatable=False),
    "forked": Case(Forked),
    "unsized": Case(val=lambda: DataLoader(Unsized(), 8)),
    "iterator": Case(BatchIterating),
    "forces": Case(Forces),
    "shuffled": Case(val=shuffled, repeatable=False),
    "shuffled, limited": Case(val=shuffled, trainer={"limit_val_batches": 2}, repeatable=False),
    "shuffled globally": Case(val=lambda: loader(32, shuffle=True), repeatable=False),
    "workers": Case(Scored, lambda: loader(32, num_workers=1, persistent_workers=True)),
    "random": Case(Rolling, repeatable=False),
    "modes": Case(Normed, repeatable=False),
    "reassigned buffers": Case(Reassigning),
    "attributes": Case(Remembering),
    "own generators": Case(Diffusing, repeatable=False),
    "own containers": Case(Holding, repeatable=False),
    "own average": Case(OwnAverage, own_weights=True),
    "own schedule": Case(OwnSchedule, trainer={"max_epochs": 3}),
    "own stopping": Case(Impatient),
    "averaging callback": Case(trainer={"callbacks": lambda: [EMAWeightAveraging(decay=0.5)]}),
    "own logging": Case(OwnLogging),
    "own axis": Case(OwnAxis, repeatable=False),
}


@dataclass
class Run:
    module: LightningModule
    probe: Probe
    curves: Curves
    metrics: Metrics
    trainer: Trainer


def fit(case: Case, *callbacks: Callback, **options) -> Run:
    seed()
    run = Run(case.make(), Probe(), Curves(), Metrics(), None)  # type: ignore[arg-type]
    options = {"max_epochs": 2, "log_every_n_steps": 1, "logger": run.curves, **case.trainer, **options}
    more = options.pop("callbacks", list)()
    run.trainer = train(
        run.module,
        *callbacks,
        *more,
        run.probe,
        run.metrics,
        data=loader(shuffle=True),
        val=case.val(),
        **options,
    )
    return run


# Callbacks that monitor


class Watching(EarlyStopping):
    """Notes what it was given to judge by."""

    def __init__(self, **options) -> None:
        super().__init__(**{"monitor": "merged/val_loss", "patience": 100, **options})
        self.judged: list[float] = []

    def _evaluate_stopping_criteria(self, current):
        self.judged.append(float(current))
        return super()._evaluate_stopping_criteria(current)
