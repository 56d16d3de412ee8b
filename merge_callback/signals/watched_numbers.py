"""The numbers of a run that are watched for spikes, each with its own detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from merge_callback.signals.drift import Drift, SpikeScore
from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_detector import SpikeDetector
from merge_callback.signals.spike_event import SpikeEvent
from merge_callback.signals.step_statistics import Statistics
from merge_callback.spike_options import SpikeOptions

LOSS, GRAD_NORM = "loss", "gradient norm"

_STALE = 16  # steps after which a number that is no longer read is ignored

_ORDER = {"spike": 0, "rise": 1, "shift": 2}


class WatchedNumbers:
    """The loss, the gradient norm and further scalars, each judged by its own history.

    If several optimizers take turns (the two sides of a GAN), each has losses of its own kind. So there is a
    detector for every number and every set of optimizers that stepped.

    Args:
        options: what counts as a spike.
    """

    def __init__(self, options: SpikeOptions) -> None:
        self.drift, self.score = Drift(options.floor), SpikeScore()
        self._rule = (options.threshold, options.floor, options.patience)
        self._detectors: dict[tuple[str, str], SpikeDetector] = {}
        self._step = 0  # the last step that was read, and the last one of each number
        self._read: dict[tuple[str, str], int] = {}
        self._key = ""  # optimizers of the last loss
        self._loss = self._detector(LOSS, "")

    def __getitem__(self, watched: str) -> SpikeDetector:
        """The detector of a number, for the optimizers that stepped last."""
        return self._detector(watched, self._key)

    @property
    def loss(self) -> SpikeDetector:
        """The detector of the loss."""
        return self._loss

    @property
    def is_within_baseline(self) -> bool:
        """Whether nothing speaks against the weights."""
        # A loop, since this is called every step, and a generator takes three times as long.
        for key, detector in self._detectors.items():
            if not detector.is_within_baseline and self._step - self._read.get(key, 0) < _STALE:
                return False
        return True

    @property
    def takes_turns(self) -> bool:
        """Whether different sets of optimizers step in turn."""
        return len({optimizers for watched, optimizers in self._read if watched == LOSS}) > 1

    def observe(
        self, seen: Statistics, warmup: Warmup, optimizers: str, is_broken: Callable[[], bool]
    ) -> list[SpikeEvent]:
        """Reads the numbers of one optimizer step; returns the events to report, spikes first.

        Args:
            seen: the numbers.
            warmup: whether the learning rate rises.
            optimizers: the optimizers that stepped, as a key.
            is_broken: finds out whether weights, gradients or optimizer state are not finite; called only if
                a number is not.
        """
        if optimizers != self._key:
            self._key, self._loss = optimizers, self._detector(LOSS, optimizers)
        events = []
        self._step = seen.step
        loss, skipped = seen.loss, seen.skipped
        if loss is not None:
            broken = not math.isfinite(loss) and not skipped and is_broken()
            self._read[LOSS, optimizers] = seen.step
            if event := self._loss.observe(seen.step, loss, warmup, skipped, broken):
                events.append(event)
            if not skipped:
                self.score.observe(loss)
        further = {logged_name(name): value for name, value in seen.scalars.items()} if seen.scalars else {}
        if seen.grad_norm is not None and not skipped:
            further[GRAD_NORM] = seen.grad_norm
        for watched, value in further.items():
            broken = not math.isfinite(value) and not skipped and is_broken()
            self._read[watched, optimizers] = seen.step
            if event := self[watched].observe(seen.step, value, warmup, False, broken):
                events.append(event)
        return sorted(events, key=lambda event: _ORDER[event.kind]) if events else events

    def drifted(self, seen: Statistics, warmup: Warmup) -> tuple[float, float] | None:
        """The best level of the loss and the present one, if it has crept up from there."""
        if warmup is not Warmup.NONE:
            self.drift.restart()
        elif seen.loss is not None and self._loss.onset is None:
            return self.drift.observe(seen.loss, self._margin)
        return None

    def _margin(self) -> float:
        return self.loss.threshold - self.loss.baseline

    def restored(self, unmoved: int) -> None:
        """Notes that all numbers are those of restored weights from now on."""
        self.drift.restart()
        for detector in self._detectors.values():
            detector.restored(unmoved)

    def state_dict(self) -> dict[str, Any]:
        """The state as primitives."""
        return {
            "detectors": [[*key, d.state_dict(), self._read.get(key)] for key, d in self._detectors.items()],
            "step": self._step,
            "key": self._key,
            "drift": self.drift.state_dict(),
            "score": self.score.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self._key = state["key"]
        self._loss = self._detector(LOSS, self._key)
        self._step = state["step"]
        for watched, optimizers, detector, read in state["detectors"]:
            self._detector(watched, optimizers).load_state_dict(detector)
            if read is not None:
                self._read[watched, optimizers] = read
        self.drift.load_state_dict(state["drift"])
        self.score.load_state_dict(state["score"])

    def _detector(self, watched: str, optimizers: str) -> SpikeDetector:
        key = (watched, optimizers)
        if key not in self._detectors:
            self._detectors[key] = SpikeDetector(*self._rule, watched=watched)
        return self._detectors[key]


def logged_name(name: str) -> str:
    """The name of a watched scalar; it may not be ``loss``, though a module may log one as that."""
    return f"logged {name}" if name in (LOSS, GRAD_NORM) else name
