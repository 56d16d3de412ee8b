"""Runs of several sizes and learning rates, dense and with experts, and the gains of their merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.papers.runs import built
from benchmarks.papers.spec import Merge, Spec
from benchmarks.papers.study import Study

RATES = {
    16: (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    32: (4e-3, 8e-3),
    64: (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    128: (4e-3,),
}
"""The peak learning rates of each width of a dense model; constant after the warm-up."""

RATE = 4e-3
"""The one that all widths have."""

MOMENTS = (800, 900, 1000)
"""Steps that are merged at."""

LATE = (2200, 2300, 2400)
"""The same, of the longer pair."""

PAIRS = {32: 8e-3, 64: 4e-3}
"""Widths that a model with experts has, too, and the learning rate of both models."""

SAME = (10, 20)
"""Snapshots, and steps between them, of the window that is the same for all runs."""

WINDOWS = ((5, 10), (10, 10), SAME, (10, 40))
"""Those that one is chosen from."""


def specs(study: Study, seed: int) -> list[Spec]:
    """All of a seed."""
    sizes = [dense(study, seed, width, rate) for width, rates in RATES.items() for rate in rates]
    return [*sizes, *(experts(study, seed, width) for width in PAIRS)]


def dense(study: Study, seed: int, width: int, rate: float) -> Spec:
    """A dense model."""
    if (width, rate) == (64, 8e-3):
        return study.trunk("dense", seed)
    steps = study.steps(LATE[-1] if (width, rate) == (32, 8e-3) else MOMENTS[-1])
    return study.trunk("dense", seed, width=_width(study, width), learning_rate=rate, steps=steps)


def experts(study: Study, seed: int, width: int) -> Spec:
    """A model with four experts, of which two see each token: its active parameters are the dense model's."""
    if width == 32:
        return study.trunk("moe", seed)
    steps = study.steps(MOMENTS[-1])
    return study.trunk("moe", seed, width=_width(study, width), steps=steps, learning_rate=PAIRS[width])


def _width(study: Study, width: int) -> int:
    """Of this size."""
    return width * study.size.width // 64


def gain(study: Study, spec: Spec, moments: Sequence[int]) -> dict[str, Any]:
    """Gains of one run, means over moments, of the window ``SAME`` and the one chosen at the last moment."""

    def window(step: int, shape: tuple[int, int]) -> Merge:
        return spec.window(study.steps(step), shape[0], study.steps(shape[1]))

    newest = moments[-1]
    chosen = min(WINDOWS, key=lambda shape: study.score(window(newest, shape), "choose").loss)
    live = [study.score(spec.at(study.steps(step))) for step in moments]
    merged = {
        name: [study.score(window(step, shape)) for step in moments]
        for name, shape in (("same", SAME), ("chosen", chosen))
    }
    loss = float(np.mean([score.loss for score in live]))
    accuracy = float(np.mean([score.accuracy for score in live]))
    found = {
        "loss": loss,
        "chosen window": list(chosen),
        "loss to choose by": study.score(spec.at(study.steps(newest)), "choose").loss,
        "merged loss to choose by": study.score(window(newest, chosen), "choose").loss,
        **_parameters(spec),
    }
    for name, scores in merged.items():
        nats = loss - float(np.mean([score.loss for score in scores]))
        points = float(np.mean([score.accuracy for score in scores])) - accuracy
        found |= {name: nats, f"{name}, percent": 100 * nats / loss}
        found |= {f"{name}, points": points, f"{name}, percent of accuracy": 100 * points / accuracy}
    return found


def _parameters(spec: Spec) -> dict[str, int]:
    """All of them, and how many act on a token."""
    sizes = {name: tensor.numel() for name, tensor in built(spec).named_parameters()}
    idle = sum(size for name, size in sizes.items() if ".experts." in name) // 2  # two of four are chosen
    return {"parameters": sum(sizes.values()), "active": sum(sizes.values()) - idle}
