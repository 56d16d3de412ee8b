"""What a run is, and what is merged from runs: plain values that name files in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal

Schedule = Literal["constant", "1-sqrt", "linear", "cosine"]


@dataclass(frozen=True)
class Spec:
    """A training run, or a fork of one.

    Args:
        seed: of weights and data.
        width: of the residual stream.
        layers: blocks.
        heads: of the attention.
        experts: per block; 0 is a dense model.
        qk_norm: without it, high learning rates can diverge.
        context: tokens per sequence.
        batch: sequences per step.
        mix: the text, a key of ``text.MIXES``.
        learning_rate: peak.
        schedule: after the warm-up, over the run's own steps.
        floor: share of the peak at which a decay ends.
        warmup: steps of linear rise.
        steps: the run's own.
        clip: largest gradient norm.
        order: another order of the data for the same seed.
        every: steps between snapshots.
        stored: steps between the states that forks can leave from.
        parent: where a fork leaves: it goes on with that run's weights, optimizer, averages, step and data.
        weights: what a fork begins with instead of the parent's weights.
        fresh: whether a fork gets a new optimizer.
    """

    seed: int = 0
    width: int = 64
    layers: int = 2
    heads: int = 2
    experts: int = 0
    qk_norm: bool = True
    context: int = 64
    batch: int = 16
    mix: str = "both"
    learning_rate: float = 8e-3
    schedule: Schedule = "constant"
    floor: float = 0.0
    warmup: int = 100
    steps: int = 2400
    clip: float = 1.0
    order: int = 0
    every: int = 10
    stored: int = 200
    parent: Snapshot | None = None
    weights: Merge | None = None
    fresh: bool = False

    def fork(self, step: int, steps: int, **changes: Any) -> Spec:
        """A run that leaves this one after ``step`` steps (of its whole line) and takes ``steps`` more."""
        changes = {"warmup": 0, "weights": None, "fresh": False, **changes}
        return replace(self, parent=self.at(step), steps=steps, **changes)

    def at(self, step: int, kind: Kind = "live") -> Snapshot:
        """The snapshot after ``step`` steps of the whole line; before the fork it is the parent's."""
        if (
            self.parent is not None
            and step <= self.parent.step
            and (step < self.parent.step or not self.weights)
        ):
            return self.parent.spec.at(step, kind)
        return Snapshot(self, step, kind)

    def window(self, step: int, last: int, spacing: int, method: str = "sma", **options: Any) -> Merge:
        """The merge of the ``last`` snapshots up to ``step``, ``spacing`` steps apart."""
        steps = [step - spacing * i for i in reversed(range(last))]
        return merge([self.at(s) for s in steps], method, **options)

    @property
    def begin(self) -> int:
        """Steps of the line before this run."""
        return 0 if self.parent is None else self.parent.step

    @property
    def end(self) -> int:
        """Steps of the line after it."""
        return self.begin + self.steps

    @cached_property
    def key(self) -> str:
        """A name in the cache."""
        kind = f"experts{self.experts}" if self.experts else "dense"
        return f"{kind}-{self.width}-{self.mix}-{self.schedule}-{self.end}-s{self.seed}-{digest(self)}"


Kind = Literal["live", "power.05", "power.10"]
"""The live weights, or a running average with a power-function profile of that relative width."""


@dataclass(frozen=True)
class Snapshot:
    """The weights of a run after a step (counted from the beginning of its line)."""

    spec: Spec
    step: int
    kind: Kind = "live"


@dataclass(frozen=True)
class Merge:
    """A merge of snapshots, oldest first; ``options`` are the method's, sorted by name."""

    parts: tuple[Snapshot, ...]
    method: str = "sma"
    options: tuple[tuple[str, Any], ...] = ()


Weights = Snapshot | Merge
"""What is evaluated or begun with."""


def merge(parts: Sequence[Snapshot], method: str = "sma", **options: Any) -> Merge:
    """A merge; lists among the options become tuples."""
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return Merge(tuple(parts), method, tuple(sorted(plain.items())))


def plain(value: Any) -> Any:
    """A dataclass as a dictionary without what has its default, so that a new field changes no name."""
    if is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return {name: plain(each) for name, each in given.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def digest(value: Any) -> str:
    """A short hash of a dataclass or of plain values."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:12]
