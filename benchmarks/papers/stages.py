"""The stages that follow a run: a decay, continued training on another text, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.papers.spec import Merge, Spec
from benchmarks.papers.study import Model, Study

SPACING = 20
"""Steps between the snapshots that are merged."""


@dataclass(frozen=True)
class Stage:
    """A stage after another one.

    Args:
        title: for the table and the picture.
        steps: its length.
        rates: its peak learning rates.
        begin: steps before it; a quarter more of them if ``decayed``.
        decayed: whether it follows a decay.
        changes: further fields of its ``Spec``.
        counts: snapshots merged, of each start but the last checkpoint.
        model: that takes it.
    """

    title: str
    steps: int
    rates: tuple[float, ...]
    begin: int = 2400
    decayed: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (10,)
    model: Model = "dense"


_NEW = {"fresh": True, "schedule": "cosine", "floor": 0.1}
_CONTINUED: dict[str, Any] = {"steps": 200, "changes": {"mix": "torch", **_NEW}, "counts": (3, 10)}
_TUNING: dict[str, Any] = {"steps": 100, "rates": (1e-3, 2e-3, 4e-3), "changes": {"mix": "headers", **_NEW}}
STAGES = {
    "decay": Stage("decay", 200, (2e-3, 4e-3, 8e-3), begin=1600, changes={"schedule": "1-sqrt"}),
    "continued": Stage("continued training on another text", rates=(2e-3, 4e-3, 8e-3), **_CONTINUED),
    "continued, experts": Stage("the same with experts", rates=(4e-3,), model="moe", **_CONTINUED),
    "tuning": Stage("fine-tuning after the decay", decayed=True, **_TUNING),
    "tuning, no decay": Stage("fine-tuning without a decay before", **_TUNING),
}


def before(study: Study, name: str, seed: int) -> tuple[Spec, int]:
    """The run before a stage, and the step at which it is left."""
    stage = STAGES[name]
    spec = study.decay(stage.model, seed, stage.begin) if stage.decayed else study.trunk(stage.model, seed)
    return spec, spec.end if stage.decayed else study.steps(stage.begin)


def start(study: Study, name: str, seed: int, count: int) -> Merge | None:
    """What a stage begins with: the merge of the last ``count`` snapshots; ``None``: the last checkpoint."""
    spec, step = before(study, name, seed)
    return spec.window(step, count, study.steps(SPACING)) if count > 1 else None


def run(study: Study, name: str, seed: int, rate: float, count: int) -> Spec:
    """A stage from one start."""
    stage = STAGES[name]
    spec, step = before(study, name, seed)
    changes = {"learning_rate": rate, "weights": start(study, name, seed, count), **stage.changes}
    warmup = study.steps(stage.steps / 10) if stage.changes.get("fresh") else 0
    return spec.fork(step, study.steps(stage.steps), warmup=warmup, **changes)
