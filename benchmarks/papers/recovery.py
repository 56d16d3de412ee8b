"""A run that diverges at an excessive learning rate, resumed from a merge of the snapshots before."""

from __future__ import annotations

from typing import Any

from benchmarks.papers.spec import Spec
from benchmarks.papers.study import MODELS, Model, Study

TITLE = "Recovery from a divergence"

CONCLUSION = ""

ONSET, EXCESS, SURGE = 1600, 0.2, 40
"""Steps before the learning rate is 25 times too high, what it is then, and for how many steps."""
AFTER = 200
"""Steps after a restart."""
COUNT, SPACING = 3, 20
"""Snapshots of a merge, and steps between them."""

AGAIN: dict[str, Any] = {"learning_rate": EXCESS, "steps": SURGE}
ARMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "last checkpoint": (False, {}),
    "merge of three": (True, {}),
    "last checkpoint, new optimizer": (False, {"fresh": True, "warmup": 30}),
    "merge of three, new optimizer": (True, {"fresh": True, "warmup": 30}),
    "merge of three, rate still too high": (True, AGAIN),
    "last checkpoint, rate still too high": (False, AGAIN),
}
"""Whether a restart begins with the merge, and what else it changes; all skip the data of the surge."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [
        spec
        for model in MODELS
        for spec in (no_action(study, model, seed), *(arm(study, model, seed, name) for name in ARMS))
    ]


def surge(study: Study, model: Model, seed: int) -> Spec:
    """The steps at the excessive rate."""
    return study.trunk(model, seed).fork(study.steps(ONSET), study.steps(SURGE), learning_rate=EXCESS)


def no_action(study: Study, model: Model, seed: int) -> Spec:
    """The run goes on as it is, at the right rate."""
    before, rate = surge(study, model, seed), study.trunk(model, seed).learning_rate
    return before.fork(before.end, study.steps(AFTER), learning_rate=rate)


def arm(study: Study, model: Model, seed: int, name: str) -> Spec:
    """A restart from before the surge."""
    merged, changes = ARMS[name]
    trunk, onset = study.trunk(model, seed), study.steps(ONSET)
    weights = trunk.window(onset, COUNT, study.steps(SPACING)) if merged else None
    scaled = {n: study.steps(v) if n in ("steps", "warmup") else v for n, v in changes.items()}
    return trunk.fork(onset, **{"steps": study.steps(AFTER), "order": 1, "weights": weights, **scaled})
