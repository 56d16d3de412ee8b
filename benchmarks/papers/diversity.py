"""Diversity over training, in the weights and in what the model computes, and how the gain goes with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.papers import rates
from benchmarks.papers.runs import built, load
from benchmarks.papers.spec import Snapshot, Spec
from benchmarks.papers.study import DECAY, LENGTHS, MODELS, Model, Study
from benchmarks.papers.text import held_out
from benchmarks.papers.verdict import Interval, Verdict, interval, says
from merge_callback.diversity import rms_diversity
from merge_callback.diversity.features import Call, features_of, layers_of
from merge_callback.diversity.functional import Features, functional_distances

TITLE = "Diversity, and what it says about the gain"

CONCLUSION = ""

N, SPACING, LAG = 10, 10, 2
"""Snapshots of a merge, steps between them, and intervals between the two that diversity compares."""

STABLE = range(200, LENGTHS[-1] + 1, 200)
"""Steps of the trunk."""

MEASURES = {
    "rms": "RMS of the weights",
    "activations": "cosine distance of activations",
    "logits": "cosine distance of logits",
    "probabilities": "KL of probabilities",
}

BEST = 0.8
"""The correlation that is expected."""

Points = list[dict[str, Any]]


def runs(study: Study, seed: int) -> list[Spec]:
    return [*study.standard(seed), *(rates.trunk(study, seed, rate) for rate in rates.RATES)]


def measure(study: Study) -> dict[str, Any]:
    return {
        "points": {model: _points(study, model) for model in MODELS},
        "rates": [
            {"rate": rate, **_at(study, lambda seed, r=rate: rates.trunk(study, seed, r), step)}
            for rate in rates.RATES
            for step in (600, 800, 1000)
        ],
    }


def _points(study: Study, model: Model) -> Points:
    """Of the trunk and of its decays, in which a merge has snapshots of the decay alone."""
    found = [{"decay": 0, **_at(study, lambda seed: study.trunk(model, seed), step)} for step in STABLE]
    for length in LENGTHS:
        for own in range(N * SPACING, round(length * DECAY) + 1, 50):
            point = _at(study, lambda seed, n=length: study.decay(model, seed, n), length + own)
            found.append({"decay": length, **point})
    return found


def _at(study: Study, line: Callable[[int], Spec], step: int) -> dict[str, Any]:
    """The diversities and the gain of the merge at a step, for each seed."""
    at, spacing = study.steps(step), study.steps(SPACING)
    windows = [line(seed).window(at, N, spacing) for seed in study.seeds]
    pairs = [(window.parts[-1 - LAG], window.parts[-1]) for window in windows]
    distances = [_distances(study, *pair) for pair in pairs]
    return {
        "step": step,
        "gain": [study.gain(window).loss for window in windows],
        **{name: [each[name] for each in distances] for name in MEASURES},
    }


def _distances(study: Study, older: Snapshot, newer: Snapshot) -> dict[str, float]:
    found = functional_distances(_features(study, older), _features(study, newer))
    return {"rms": rms_diversity(study.weights(older), study.weights(newer)), **found}


def _features(study: Study, snapshot: Snapshot) -> Features:
    """Logits and activations of 64 held-out sequences, at their final token."""
    spec = snapshot.spec
    model = _model(spec)
    load(model, study.weights(snapshot))
    probe = torch.cat([b["input_ids"] for b in held_out(spec.mix, "choose", spec.context, 64)])
    return features_of(model, Call((probe,)), layers_of(dict(model.named_modules())))


@cache
def _model(spec: Spec) -> torch.nn.Module:
    return built(spec).eval()
