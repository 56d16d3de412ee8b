"""Which examples are hard, what merging forgets of them, and what comes of leaving them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.upcycling.experts import Trajectory
from benchmarks.upcycling.model import Task, Weights, logits, new_expert, steps, with_weights
from benchmarks.upcycling.setup import Study
from benchmarks.upcycling.tasks import Examples
from merge_callback.analysis.difficulty import by_bin, difficulty_bins, forgotten, memorisation
from merge_callback.analysis.el2n import El2n

EARLY = 32
"""Steps of fine-tuning after which EL2N is taken."""


def el2n_scores(study: Study, base: Weights, task: Task, seed: int) -> Tensor:
    """The mean EL2N of each training example over fine-tunings with other seeds than the experts'."""
    hardness, examples = El2n(), task.parts["train"]
    for number in range(study.el2n_seeds):
        model = new_expert("full", base)
        other = 1000 * (seed + 1) + number
        for _ in steps(model, task, examples, EARLY, study.batch, study.rates[0], other):
            pass
        hardness.update(logits(model, task, "train"), examples.labels, torch.arange(len(examples)), number)
    return hardness.compute().scores


def without_hardest(task: Task, scores: Tensor, share: float) -> Examples:
    """The training examples except a share, those with the highest scores."""
    kept = scores.argsort(stable=True)[: round(len(scores) * (1 - share))]
    return task.parts["train"][kept]


def forgotten_by_bin(
    trajectories: Sequence[Trajectory],
    tasks: Sequence[Task],
    scores: Sequence[Tensor],
    step: int,
    merge: Weights,
) -> list[float]:
    """Of what a merge has forgotten, the share in each bin in percent, over all tasks."""
    model, counts = with_weights(merge), torch.zeros(10, dtype=torch.float64)
    for trajectory, task, hard in zip(trajectories, tasks, scores, strict=True):
        labels = task.parts["train"].labels
        lost = forgotten(trajectory.train_logits[step], logits(model, task, "train"), labels)
        counts += by_bin(lost, difficulty_bins(hard)) * (len(hard) / 10)
    shares: list[float] = (100 * counts / counts.sum()).tolist()
    return shares


def loss_by_bin(
    trajectories: Sequence[Trajectory], tasks: Sequence[Task], scores: Sequence[Tensor], step: int
) -> list[float]:
    """The share of each bin in the training loss in percent, the mean over tasks."""
    shares = []
    for trajectory, task, hard in zip(trajectories, tasks, scores, strict=True):
        losses = F.cross_entropy(trajectory.train_logits[step], task.parts["train"].labels, reduction="none")
        share = by_bin(losses, difficulty_bins(hard))
        shares.append(100 * share / share.sum())
    found: list[float] = torch.stack(shares).mean(0).tolist()
    return found


def memorised_by_bin(
    trajectories: Sequence[Trajectory],
    tasks: Sequence[Task],
    scores: Sequence[Tensor],
    early: int,
    late: int,
) -> dict[str, list[float]]:
    """The three measures of App. H in each bin, the mean over tasks."""
    found: dict[str, list[Tensor]] = {}
    for trajectory, task, hard in zip(trajectories, tasks, scores, strict=True):
        both = (trajectory.train_logits[step] for step in (early, late))
        measures = memorisation(*both, task.parts["train"].labels)
        for name, values in measures._asdict().items():
            found.setdefault(name, []).append(by_bin(values, difficulty_bins(hard)))
    return {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}
