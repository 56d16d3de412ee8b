"""How far apart two snapshots are, in their weights and in what they compute."""

from __future__ import annotations

import torch

from benchmarks.papers.runs import built, load
from benchmarks.papers.spec import Snapshot
from benchmarks.papers.study import Study
from benchmarks.papers.text import held_out
from merge_callback.diversity import rms_diversity
from merge_callback.diversity.features import Call, features_of, layers_of
from merge_callback.diversity.functional import Features, functional_distances

PROBE = 64
"""Held-out sequences that both snapshots read."""


def distances(study: Study, older: Snapshot, newer: Snapshot) -> dict[str, float]:
    """The RMS distance of the weights (``rms``), and those of ``functional_distances`` ([PG] App. C.2)."""
    functional = functional_distances(_features(study, older), _features(study, newer))
    return {"rms": rms_diversity(study.weights(older), study.weights(newer)), **functional}


def _features(study: Study, snapshot: Snapshot) -> Features:
    """Logits and activations at the final token of each sequence."""
    spec = snapshot.spec
    model = built(spec).eval()
    load(model, study.weights(snapshot))
    probe = torch.cat([b["input_ids"] for b in held_out(spec.mix, "choose", spec.context, PROBE)])
    return features_of(model, Call((probe,)), layers_of(dict(model.named_modules())))
