"""What a page shows of one run: its curves, phases and costs, taken from its history."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from merge_callback.metrics import (
    DIVERSITY,
    DIVERSITY_CHANGE,
    DIVERSITY_RMS,
    FORECAST,
    FORECAST_ERROR,
    METRICS,
)
from merge_callback.noise import spread
from merge_callback.report.history import Event, History
from merge_callback.report.numbers import Point, number, shown

_SILENT = 600.0
"""Seconds without an event after which a run that has not ended may be dead."""

_AFTER = 3
"""Re-warm-ups after a restore until which live weights may be worse than they would be without the spike."""


class Best(NamedTuple):
    """The best gain of a metric: where it was, what it is, and what live and merged weights scored."""

    step: int
    gain: float
    live: float
    merged: float


class RunView:
    """One run, as it is shown.

    Args:
        name: that tells it from others.
        history: what happened in it.
    """

    def __init__(self, name: str, history: History) -> None:
        self.name, self.history, self.run = name, history, history.run
        self.snapshots, self.emissions = history.of("snapshot"), history.of("emission")
        self.validations = history.of("validation")

    @cached_property
    def step(self) -> int:
        """Optimizer steps, as far as the events go."""
        return max((event["step"] for event in self.history.events), default=0)

    @property
    def tokens(self) -> float | None:
        """Tokens seen at the newest snapshot."""
        return number(self.snapshots[-1].get("tokens")) if self.snapshots else None

    @property
    def status(self) -> tuple[str, str]:
        """A word for the state of the run, and a sentence about it."""
        if ends := self.history.of("end"):
            if ends[-1].get("finished"):
                return "finished", "The fit came to its end."
            return "stopped", "The fit was ended by an exception or a signal."
        if time.time() - self.history.ended < _SILENT:
            return "running", "The run was going on when this page was drawn."
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.history.ended))
        return "silent", f"No event since {when}: the run takes its time, or was killed."

    # --- scores

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the validation's metrics: first those with a gain, and of these losses first."""
        names = dict.fromkeys(n for e in self.validations for n in e["scores"].get("live", {}))
        gained = {n for e in self.validations for n in e.get("gains", {})}
        return sorted(names, key=lambda name: (name not in gained, "loss" not in name))

    def scores(self, metric: str) -> dict[str, list[Point]]:
        """The curves of a metric, by whose they are: ``live``, ``merged``, and others that were validated."""
        found: dict[str, list[Point]] = {}
        for event in self.validations:
            for whose, values in event["scores"].items():
                if (value := number(values.get(metric))) is not None:
                    found.setdefault(whose, []).append((event["step"], value))
        return found

    def gains(self, metric: str) -> list[Point]:
        """The gains of the merge in a metric."""
        values = [(event["step"], number(event.get("gains", {}).get(metric))) for event in self.validations]
        return [(step, value) for step, value in values if value is not None]

    def forecast(self, metric: str) -> list[Point]:
        """What the live weights would score after a decay, as it was forecast at each step."""
        return self.logged.get(f"{FORECAST}{metric}", [])

    def told_forecast(self, metric: str) -> str:
        """The newest forecast in a sentence; empty if there is none, or if the decay has begun."""
        forecasts, errors = self.forecast(metric), dict(self.logged.get(f"{FORECAST_ERROR}{metric}", []))
        if not forecasts or any(phase == "decay" and end >= self.step for phase, _, end in self.phases):
            return ""
        step, value = forecasts[-1]
        error = f" ± {shown(errors[step], 2)}" if step in errors else ""
        return f" A decay from step {step:,.0f} on would give {shown(value)}{error}."

    def noise(self, metric: str) -> float | None:
        """The standard deviation of a live metric's noise from one validation to the next."""
        return spread([value for _, value in self.scores(metric).get("live", [])])

    def best(self, metric: str) -> Best | None:
        """The best gain in a metric, apart from those over live weights that a spike has just spoilt."""
        live, merged = (dict(self.scores(metric).get(whose, [])) for whose in ("live", "merged"))
        known = live.keys() & merged.keys()
        gains = [p for p in self.gains(metric) if p[0] in known and not self._is_disturbed(p[0])]
        if not gains:
            return None
        step, gain = max(gains, key=lambda point: point[1])
        return Best(int(step), gain, live[step], merged[step])

    def _is_disturbed(self, step: float) -> bool:
        """Whether a step lies between the onset of a spike and what follows the restore."""
        return any(
            e["record"].get("onset", e["step"])
            <= step
            <= e["step"] + _AFTER * e["record"].get("rewarm_steps", 0)
            for e in self.restores
        )

    def validated(self, emission: Event) -> Event | None:
        """The validation of the merge that was published as an emission."""
        return next((e for e in self.validations if e.get("merge") == emission["step"]), None)

    # --- the model and its schedule

    @property
    def learning_rates(self) -> list[Point]:
        """The learning rate at each snapshot."""
        return _points(self.snapshots, "lr")

    @property
    def diversity(self) -> list[Point]:
        """The diversity of the model."""
        return _points(self.snapshots, "diversity")

    @property
    def layers(self) -> dict[str, list[Point]]:
        """The diversity of each layer."""
        names = dict.fromkeys(name for event in self.snapshots for name in event.get("layers") or {})
        return {
            name: [
                (event["step"], value)
                for event in self.snapshots
                if (value := number((event.get("layers") or {}).get(name))) is not None
            ]
            for name in names
        }

    @cached_property
    def logged(self) -> dict[str, list[Point]]:
        """Every logged number, by its name."""
        found: dict[str, dict[float, float]] = {}
        for event in self.history.of("metrics"):
            for name, value in event.get("values", {}).items():
                if (y := number(value)) is not None:
                    found.setdefault(name, {})[event["step"]] = y
        order = {metric.name: place for place, metric in enumerate(METRICS)}
        return {name: sorted(found[name].items()) for name in sorted(found, key=lambda n: order.get(n, -1))}

    @property
    def functional(self) -> dict[str, list[Point]]:
        """The other kinds of diversity that are logged, by the names of their numbers."""
        known = (DIVERSITY_RMS, DIVERSITY_CHANGE)
        return {
            name: points
            for name, points in self.logged.items()
            if name.startswith(DIVERSITY) and name not in known
        }

    @property
    def phases(self) -> list[tuple[str, float, float]]:
        """The phases of the learning rate, with the steps at which they begin and end."""
        found: list[tuple[str, float]] = []
        for event in self.history.of("phase"):
            found = [past for past in found if past[1] < event["since"]]  # it is known only later
            if not found or found[-1][0] != event["phase"]:
                found.append((event["phase"], event["since"]))
        ends = [*(since for _, since in found), self.step][1:]  # of no phase, if none is recognised yet
        return [(phase, since, end) for (phase, since), end in zip(found, ends, strict=True) if end > since]

    # --- what went wrong, and what it cost

    @property
    def restores(self) -> list[Event]:
        """The spikes after which the weights were restored."""
        return [e for e in self.history.of("spike") if e["record"].get("event") == "restore"]

    @property
    def stall(self) -> float:
        """Seconds that training waited for snapshots."""
        return _total(self.snapshots, "stall")

    @property
    def evaluation(self) -> float:
        """Seconds that merged validations took."""
        return _total(self.validations, "seconds")

    @property
    def restoring(self) -> float:
        """Seconds that restores took."""
        return _total((event["record"] for event in self.restores), "seconds")

    @property
    def background(self) -> float:
        """Seconds of work beside the run."""
        return _total(self.snapshots, "background") + _total(self.emissions, "seconds")

    @property
    def written(self) -> float:
        """Bytes of all snapshots and emissions."""
        return _total(self.snapshots, "bytes") + _total(self.emissions, "bytes")


def _points(events: Iterable[Event], entry: str) -> list[Point]:
    return [(e["step"], y) for e in events if (y := number(e.get(entry))) is not None]


def _total(events: Iterable[Event], entry: str) -> float:
    return sum(number(event.get(entry)) or 0.0 for event in events)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Short names for runs: what their paths differ in; of a single run its folder's last two parts."""
    parts = [folder.absolute().parts for folder in folders]
    if len({*parts}) < 2:
        path = folders[0].absolute()
        path = path.parent if path.name == "merges" else path
        return ["/".join(path.parts[-2:]).lstrip("/")] * len(folders)
    first = next(i for i, column in enumerate(zip(*parts, strict=False)) if len({*column}) > 1)
    ends = [reversed(path[first:]) for path in parts]
    common = 0
    for column in zip(*ends, strict=False):
        if len({*column}) > 1:
            break
        common += 1
    return ["/".join(path[first : len(path) - common]) or path[-1] for path in parts]
