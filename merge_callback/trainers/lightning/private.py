"""Everything private to Lightning: names that may change with its next version are used only here.

Lightning is published twice, with the same code: as ``lightning`` and as ``pytorch_lightning``. An object of
one is not an instance of the other's classes, so names are looked up for the trainer at hand.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

_HOMES = {
    "Callback": "pytorch",
    "DDPStrategy": "pytorch.strategies",
    "DeepSpeedStrategy": "pytorch.strategies",
    "EarlyStopping": "pytorch.callbacks",
    "FSDPStrategy": "pytorch.strategies",
    "LightningModule": "pytorch",
    "ModelParallelStrategy": "pytorch.strategies",
    "RunningStage": "pytorch.trainer.states",
    "SingleDeviceStrategy": "pytorch.strategies",
    "SingleDeviceXLAStrategy": "pytorch.strategies",
    "TrainerFn": "pytorch.trainer.states",
    "XLAStrategy": "pytorch.strategies",
    "AttributeDict": "fabric.utilities.data",
    "MisconfigurationException": "fabric.utilities.exceptions",
    "_EvaluationLoop": "pytorch.loops.evaluation_loop",
    "_DataLoaderIterDataFetcher": "pytorch.loops.fetchers",
    "_LoggerConnector": "pytorch.trainer.connectors.logger_connector.logger_connector",
    "_MockOptimizer": "pytorch.core.optimizer",
    "_ResultCollection": "pytorch.trainer.connectors.logger_connector.result",
    "_call_strategy_hook": "pytorch.trainer.call",
    "_collect_rng_states": "fabric.utilities.seed",
    "_set_rng_states": "fabric.utilities.seed",
}


class Names:
    """The names of one Lightning package.

    Args:
        package: ``"lightning"`` or ``"pytorch_lightning"``.
    """

    def __init__(self, package: str) -> None:
        self._roots = {
            "pytorch": "lightning.pytorch" if package == "lightning" else package,
            "fabric": "lightning.fabric" if package == "lightning" else "lightning_fabric",
        }

    def __getattr__(self, name: str) -> Any:
        root, _, rest = _HOMES[name].partition(".")
        found = getattr(import_module(".".join(filter(None, (self._roots[root], rest)))), name)
        vars(self)[name] = found
        return found


@lru_cache
def _names(package: str) -> Names:
    return Names(package)


def names_of(trainer: object) -> Names:
    """The names of the package that a trainer belongs to."""
    roots = [kind.__module__.partition(".")[0] for kind in type(trainer).__mro__]
    return _names("pytorch_lightning" if "pytorch_lightning" in roots else "lightning")


def callback_bases() -> tuple[type[Callback], ...]:
    """``Callback`` of each package that is imported already, or else of the one that is installed.

    Raises:
        ModuleNotFoundError: if neither is installed.
    """
    packages = ("lightning.pytorch", "pytorch_lightning")
    known = [name for name in packages if name in sys.modules]
    known = known or [name for name in packages if find_spec(name.partition(".")[0]) is not None][:1]
    if not known:
        raise ModuleNotFoundError(
            "CheckpointMergeCallback and WarmupAdaptiveDecay need Lightning: pip install "
            "'merge-callback[lightning]'. For your own training loop use merge_callback.CheckpointMerger"
        )
    return tuple(import_module(name).Callback for name in known)


RESULTS, LOGGER_CONNECTOR = "_results", "_logger_connector"
"""Attributes of a loop and of a trainer that are replaced for a while."""


def results_of(loop: Any) -> Mapping[str, Any]:
    """What has been logged in a loop."""
    found: Mapping[str, Any] = loop._results
    return found


def own_logger_connector(trainer: Trainer) -> Any:
    """A connector for the trainer with a copy of its ``callback_metrics``, for modules that read them."""
    connector = names_of(trainer)._LoggerConnector(trainer)
    connector._callback_metrics = dict(trainer.callback_metrics)
    return connector


def pause_stopping(callback: Callback, is_paused: bool) -> None:
    """Has an ``EarlyStopping`` pass over a validation, or judge again."""
    own: dict[str, Any] = vars(callback)
    if is_paused:
        own["_run_early_stopping_check"] = _passed_over
    elif own.get("_run_early_stopping_check") is _passed_over:
        del own["_run_early_stopping_check"]


def _passed_over(trainer: Trainer) -> None: ...


def callback_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """The dictionary behind ``trainer.callback_metrics``, to read from and add to; nothing is computed."""
    found: dict[str, Tensor] = trainer._logger_connector._callback_metrics
    return found


def checkpoint_connector(trainer: Trainer) -> Any:
    """The object that makes the trainer's checkpoints."""
    return trainer._checkpoint_connector


def validation_results(trainer: Trainer) -> Mapping[str, Any]:
    """The results that the fit's last validation logged."""
    return trainer.fit_loop.epoch_loop.val_loop._results


def validation_loader(trainer: Trainer) -> Any:
    """The dataloaders of the fit's validation; ``None`` before the first."""
    return trainer.fit_loop.epoch_loop.val_loop._combined_loader


def training_loader(trainer: Trainer) -> Any:
    """The dataloaders of the fit."""
    return trainer.fit_loop._combined_loader


def takes_from_iterator(trainer: Trainer) -> bool:
    """Whether the training step gets an iterator instead of batches."""
    return isinstance(trainer.fit_loop._data_fetcher, names_of(trainer)._DataLoaderIterDataFetcher)


def epoch_metrics(results: Mapping[str, Any], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``known`` metrics that a validation logged for its epoch."""
    forked: Any = results
    names = [n for r in results.values() if r.meta.on_epoch for n in forked._forked_name(r, on_step=False)]
    return {name: known[name] for name in names if name in known and name != "step"}  # an axis, not a metric


def is_validation_next(trainer: Trainer) -> bool:
    """Whether the fit validates after this batch; Lightning's own check takes ten times as long to say no."""
    loop = trainer.fit_loop
    progress, every = loop.epoch_loop.batch_progress, trainer.val_check_batch
    if every is not None and not progress.is_last_batch and not trainer.should_stop:
        if every == math.inf:  # the length of an epoch is not known
            every = trainer.limit_train_batches
        # Depending on the options, the batches of the epoch or of the run count.
        if isinstance(every, float) or (progress.current.ready % every and progress.total.ready % every):
            return False
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def logged_step(trainer: Trainer) -> int:
    """The position of training on the axis that all curves share.

    That is the step at which Lightning logs the module's metrics, or what the module logs as ``step``.
    """
    results: Mapping[str, Any] = trainer._results or {}
    for own in results.values():
        if own.meta.name == "step" and not own.has_reset:  # of the loop that runs now
            # Not callback_metrics while there is another way: that one waits for all that the module logs.
            return int(own._forward_cache if own.meta.on_step else trainer.callback_metrics["step"])
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def step_progress(trainer: Trainer) -> Any:
    """The progress whose ``completed`` is ``trainer.global_step``, without seven properties in between."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        return loop.automatic_optimization.optim_progress.optimizer.step.total
    return loop.manual_optimization.optim_step_progress.total


def logged_now(trainer: Trainer) -> list[tuple[str, str, Any]]:
    """What the module has logged per step: key, name, and the newest value, as it was passed."""
    results: Mapping[str, Any] = trainer._results or {}
    return [(k, r.meta.name, None if r.has_reset else r._forward_cache) for k, r in results.items()]


def run_training_step(trainer: Trainer, batch: Any, batch_idx: int) -> Any:
    """The result of the module's ``training_step`` for a batch, called as Lightning does."""
    loop, names = trainer.fit_loop.epoch_loop, names_of(trainer)
    loop._results.batch, loop._results.batch_size = batch, None
    arguments = loop._build_kwargs(OrderedDict(), batch, batch_idx)
    return names._call_strategy_hook(trainer, "training_step", *arguments.values())


@lru_cache
def _merged_evaluation_loop(evaluation_loop: Any) -> Any:
    class MergedEvaluationLoop(evaluation_loop):  # type: ignore[misc]
        """An evaluation loop that shares the dataloaders of the trainer's validation loop."""

        def __init__(self, trainer: Trainer, names: Names, at_most: float) -> None:
            self._at_most = at_most
            self._live = trainer.fit_loop.epoch_loop.val_loop
            super().__init__(
                trainer,
                names.TrainerFn.FITTING,
                names.RunningStage.VALIDATING,
                verbose=False,
                inference_mode=self._live.inference_mode,
            )

        def setup_data(self) -> None:
            """Takes the dataloaders of the trainer's loop."""
            self._combined_loader = self._live._combined_loader
            self._max_batches = [min(n, self._at_most) for n in self._live._max_batches]
            self._seen_batches_per_dataloader: dict[int, int] = defaultdict(int)

    return MergedEvaluationLoop


def validation_loop(trainer: Trainer, at_most: float = math.inf) -> Any:
    """A second evaluation loop of Lightning's, with its own results, on the validation's dataloaders.

    Args:
        trainer: a trainer in fit.
        at_most: the most batches of each dataloader.
    """
    names = names_of(trainer)
    return _merged_evaluation_loop(names._EvaluationLoop)(trainer, names, at_most)


def tag_prefix(logger: Any) -> str:
    """What a logger puts before every name."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""
