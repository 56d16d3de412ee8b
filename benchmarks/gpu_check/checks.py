"""Checks of one section: each says what it found, and whether that is what it should be."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.gpu_check.machines import Machine

Row = dict[str, Any]
"""A result as JSON has it: section, name, status, value, expected, seconds, and figures or a traceback."""

STATUSES = ("ok", "FAIL", "info", "skip")
"""Does what it should; does not; a figure without a target; not run."""


class Skipped(Exception):  # noqa: N818
    """Ends a check that can't be made here; its text says why."""


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Args:
        value: in one line.
        holds: whether it is as it should be; ``None`` for a figure without a target.
        figures: for the JSON file.
    """

    value: str
    holds: bool | None = True
    figures: Mapping[str, Any] = field(default_factory=dict)


class Check(NamedTuple):
    """A check: ``run`` raises if something is wrong, and needs ``seconds`` at least."""

    name: str
    expected: str
    run: Callable[[Machine], Outcome | str]
    seconds: float
    on_gpu: bool


class Section:
    """Checks that share a process.

    Args:
        name: of its module.
        seconds: that it may take on a GPU.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.checks: list[Check] = []

    def check(
        self, name: str, expected: str, seconds: float = 3.0, on_gpu: bool = False
    ) -> Callable[[Callable[[Machine], Outcome | str]], Callable[[Machine], Outcome | str]]:
        """Adds the decorated function to the checks.

        Args:
            name: of the check.
            expected: what it should find, for the table.
            seconds: that have to be left for it to begin.
            on_gpu: it shows nothing without a GPU.
        """

        def added(run: Callable[[Machine], Outcome | str]) -> Callable[[Machine], Outcome | str]:
            self.checks.append(Check(name, expected, run, seconds, on_gpu))
            return run

        return added

    def run(self, machine: Machine, seconds: float) -> Iterator[Row]:
        """Runs the checks one after another, for about so many seconds."""
        end = time.monotonic() + seconds
        for check in self.checks:
            start = time.perf_counter()
            row = {"section": self.name, "name": check.name, "expected": check.expected}
            row |= self._result(check, machine, end - time.monotonic())
            machine.tidy()
            yield row | {"seconds": round(time.perf_counter() - start, 3)}

    def _result(self, check: Check, machine: Machine, left: float) -> Row:
        if machine.is_dry and check.on_gpu:
            return {"status": "skip", "value": "needs a GPU"}
        if left < check.seconds:
            return {"status": "skip", "value": "no time left"}
        try:
            found = check.run(machine)
        except Skipped as reason:
            return {"status": "skip", "value": str(reason)}
        except Exception as error:
            value = " ".join(f"{type(error).__name__}: {error}".split())
            return {"status": "FAIL", "value": value[:600], "traceback": traceback.format_exc()[-4000:]}
        outcome = Outcome(found) if isinstance(found, str) else found
        status = "info" if outcome.holds is None else "ok" if outcome.holds else "FAIL"
        return {"status": status, "value": outcome.value, "figures": dict(outcome.figures)}


def share(machine: Machine, value: float, least: float) -> bool:
    """Whether a share reaches its target; without a GPU any does."""
    return machine.is_dry or value >= least


def at_most(machine: Machine, value: float, most: float) -> bool:
    """Whether a ratio stays within its target, which NaN does not; without a GPU any does."""
    return machine.is_dry or (not math.isnan(value) and value <= most)


def table(rows: list[Row]) -> str:
    """The results, one line each, and how many there are of each status."""
    lines = [
        f"{row['status']:4}  {row['section']:11} {row['name'][:52]:52} {row['value'][:230]}" for row in rows
    ]
    counts = ", ".join(f"{sum(row['status'] == s for row in rows)} {s}" for s in STATUSES)
    return "\n".join([*lines, counts])
