"""Live against merged curves on one chart: the layout of TensorBoard's page of custom scalars."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from merge_callback.metrics import (
    BASELINE,
    DIVERSITY_RMS,
    FORECAST,
    GAIN,
    IS_SPIKING,
    LR_RATIO,
    MERGED,
    PHASE,
    RESTORES,
    THRESHOLD,
    WINDOW,
)

log = logging.getLogger(__name__)

_BESIDE = {
    "Merging": {
        "diversity": [DIVERSITY_RMS],
        "phase (0 warmup, 1 stable, 2 decay) and learning rate": [PHASE, LR_RATIO],
        "snapshots in the window": [WINDOW],
    },
    "Loss spikes": {"loss": [BASELINE, THRESHOLD], "events": [IS_SPIKING, RESTORES]},
}
"""The charts that do not depend on what is validated."""


class Charts:
    """Gives a ``SummaryWriter`` the layout of a run's curves, as soon as it is known what is validated.

    Only a writer that curves were written to may be handed in, so that no event file is begun for the layout.
    A failure is logged, and the layout is not tried again.

    Args:
        tag: of a logged name, in TensorBoard.
        merged: before the name of a merged metric.
    """

    def __init__(self, tag: Callable[[str], str] = str, merged: str = MERGED) -> None:
        self._tag, self._merged = tag, merged
        self._metrics: set[str] = set()
        self._has_failed = False

    def show(self, writer: Any, logged: Iterable[str]) -> None:
        """Writes the layout, if metrics were logged that are not in it yet: TensorBoard reads the last one.

        Args:
            writer: what the curves were written with; one that knows no layouts is left alone.
            logged: names that were just logged.
        """
        merged = {name.removeprefix(self._merged) for name in logged if name.startswith(self._merged)}
        if self._has_failed or merged <= self._metrics or not hasattr(writer, "add_custom_scalars"):
            return
        self._metrics |= merged
        try:
            writer.add_custom_scalars(self.layout(self._metrics))
        except Exception:
            self._has_failed = True
            log.exception("merge: TensorBoard could not show the charts; training goes on")

    def layout(self, metrics: Collection[str]) -> dict[str, dict[str, list[Any]]]:
        """The layout as ``add_custom_scalars`` takes it: by category and title, with patterns of tags."""
        # Logged per step and epoch, a metric is ``x_epoch`` to Lightning's loggers; ``x`` is no curve.
        every = sorted(name for name in metrics if f"{name}_epoch" not in metrics)
        of = {name: [n[: -len(name) - 1] for n in every if n.endswith(self._end(name))] for name in every}
        names = [name for name in every if not any(name.endswith(self._end(other)) for other in every)]
        merged = {n: [f"{self._merged}{c}{self._end(n)}" for c in of[n]] for n in names}
        charts = {
            "Live and merged": {
                name: [name, f"{self._merged}{name}", *merged[name], f"{FORECAST}{name}"] for name in names
            },
            "Gain of the merge": {
                name: [f"{GAIN}{name}", *(f"{GAIN}{candidate}/{name}" for candidate in of[name])]
                for name in names
            },
            **_BESIDE,
        }
        return {
            category: {title: ["Multiline", [*map(self._pattern, tags)]] for title, tags in titles.items()}
            for category, titles in charts.items()
        }

    def _end(self, name: str) -> str:
        """How the name of a candidate's metric ends, whose metric is called ``name``."""
        return f"{self._merged[-1]}{name}"

    def _pattern(self, name: str) -> str:
        return f"{re.escape(self._tag(name))}$"
