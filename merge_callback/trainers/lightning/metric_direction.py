"""Finds out whether lower or higher is better for a metric."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from merge_callback.engine.metric_names import said_lower, sounds_lower
from merge_callback.metrics import MERGED

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class MetricDirections:
    """Whether lower is better for each metric of a validation, if that is known.

    The sources, in this order: the options; the ``mode`` of a callback or scheduler that monitors it; the
    torchmetrics object whose value was logged (as the object, as the result of its ``compute``, or under its
    name in the module or a collection); a standard name, such as ``val_rmse``.

    Args:
        lower: ``fnmatch`` patterns of names for which lower is better.
        higher: the same for those for which higher is better.
    """

    def __init__(self, lower: Sequence[str] = (), higher: Sequence[str] = ()) -> None:
        self._lower, self._higher = lower, higher
        self._heard: dict[str, Metric] = {}

    @contextmanager
    def listening(self, module: LightningModule) -> Iterator[None]:
        """In this context, notes which metrics' values are logged: ``log_dict(collection.compute())``."""
        kind, metrics = type(module), [part for part in module.modules() if isinstance(part, Metric)]
        log: Callable[..., None] = kind.log
        was_own = "log" in vars(kind)

        def heard(self_: LightningModule, name: str, value: Any, *args: Any, **options: Any) -> None:
            for metric in metrics if self_ is module else ():
                if _is_of(value, metric):
                    self._heard[name] = metric
            log(self_, name, value, *args, **options)

        kind.log = heard  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            if was_own:
                kind.log = log  # type: ignore[method-assign]
            else:
                del kind.log

    def lower_is_better(
        self, name: str, trainer: Trainer, results: Mapping[str, Any], module: nn.Module | None = None
    ) -> bool | None:
        """Whether lower is better for a metric; ``None`` if unknown.

        Args:
            name: its name in ``trainer.callback_metrics``.
            trainer: its callbacks and schedulers may monitor the metric.
            results: the results of the validation that logged it.
            module: the module, which may hold the metric object.
        """
        logged = name.split("/dataloader_idx_")[0]
        for known in (name, logged):
            if (lower := said_lower(known, self._lower, self._higher)) is not None:
                return lower
        if (monitored := _monitored(name, trainer)) is not None:
            return monitored
        names = {logged, logged.removesuffix("_epoch")}
        objects = [r.value for r in results.values() if r.meta.name in names]
        objects += [self._heard[n] for n in names if n in self._heard]
        for found in (objects, _held_as(logged, module) if module else []):
            directions = {not higher for o in found if (higher := _higher_is_better(o)) is not None}
            if len(directions) == 1:
                return directions.pop()
        return sounds_lower(logged)


def _monitored(name: str, trainer: Trainer) -> bool | None:
    modes = {
        callback.mode
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if str(getattr(callback, "monitor", None)).removeprefix(MERGED) == name
    }
    modes |= {
        config.scheduler.mode
        for config in getattr(trainer, "lr_scheduler_configs", ())
        if str(config.monitor).removeprefix(MERGED) == name and hasattr(config.scheduler, "mode")
    }
    return modes == {"min"} if modes in ({"min"}, {"max"}) else None


def _is_of(value: Any, metric: Metric) -> bool:
    """Whether a metric object has just returned this value."""
    for own in (metric._computed, metric._forward_cache):
        if own is not None and any(value is v for v in (own.values() if isinstance(own, dict) else (own,))):
            return True
    return False


def _held_as(name: str, module: nn.Module) -> list[Metric]:
    """The metric objects named ``name``, or its last part, in the module or in a collection."""
    held: list[tuple[str, Metric]] = []
    for path, part in module.named_modules():
        if isinstance(part, MetricCollection):
            held += [(str(key), metric) for key, metric in part.items(keep_base=False)]
        elif isinstance(part, Metric):
            held.append((path.rpartition(".")[2], part))
    return [m for key, m in held if key and re.search(rf"(^|[^a-zA-Z0-9]){re.escape(key)}(_epoch)?$", name)]


def _higher_is_better(found: Any) -> bool | None:
    higher = getattr(found, "higher_is_better", None)
    if higher is None and isinstance(found, WrapperMetric):  # it lacks the attribute of the metric it wraps
        higher = getattr(getattr(found, "metric", None), "higher_is_better", None)
    return higher
