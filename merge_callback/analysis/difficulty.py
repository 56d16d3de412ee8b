"""Which examples are hard, which a merge forgets, what an expert memorises (Less Is More, §2.4, App. H)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """The mean score of each example that was seen, in the order of their ids."""

    ids: Tensor
    """``(examples,)`` int64."""
    scores: Tensor
    """``(examples,)`` fp32."""


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """``‖p − onehot(y)‖₂`` of each example, p the softmax: EL2N of one seed.

    The paper takes the mean over ten seeds, after 32 steps of fine-tuning.

    Args:
        logits: ``(examples, classes)``, floating point.
        labels: ``(examples,)`` int64.

    Returns:
        ``(examples,)`` fp32, from 0 (sure and right) to √2 (sure and wrong); average it over seeds.
    """
    p = logits.float().softmax(-1)
    distances: Tensor = torch.linalg.vector_norm(p - F.one_hot(labels, p.shape[-1]), dim=-1)
    return distances


def difficulty_bins(scores: Tensor, bins: int = 10) -> Tensor:
    """The bin of each example, from 1 (the easiest) to ``bins``, all of one size or one more.

    Equal scores are put in the order of the examples.

    Args:
        scores: ``(examples,)``, higher is harder.
        bins: at most the number of examples.

    Raises:
        ValueError: if there are fewer examples than bins, or a score is no number.
    """
    if len(scores) < bins or bool(scores.isnan().any()):
        raise ValueError(f"{bins} bins need at least as many scores, all of them numbers; got {len(scores)}")
    order = scores.argsort(stable=True)
    found = torch.empty(len(scores), dtype=torch.int64)
    found[order] = torch.arange(len(scores)) * bins // len(scores) + 1
    return found


def by_bin(values: Tensor, bins: Tensor) -> Tensor:
    """The mean of a measure over each bin; ``(bins,)`` fp64.

    Args:
        values: ``(examples,)``, e.g. whether each was forgotten.
        bins: of `difficulty_bins`.
    """
    count = torch.bincount(bins - 1)
    return torch.bincount(bins - 1, weights=values.double(), minlength=len(count)) / count


def forgotten(expert: Tensor, merged: Tensor, labels: Tensor) -> Tensor:
    """Whether the expert has each example right and the merge has it wrong; ``(examples,)`` bool.

    Args:
        expert: the expert's logits, ``(examples, classes)``.
        merged: the merge's.
        labels: ``(examples,)`` int64.
    """
    return (expert.argmax(-1) == labels) & (merged.argmax(-1) != labels)


class Memorisation(NamedTuple):
    """What longer training did to each example, ``(examples,)`` fp32 each (App. H)."""

    margin: Tensor
    """``m_late - m_early``, with ``m = p_y - max_{c≠y} p_c``."""
    loss: Tensor
    """The cross entropy in nats, ``early - late``."""
    shift: Tensor
    """``‖p_late - p_early‖₁``."""


def memorisation(early: Tensor, late: Tensor, labels: Tensor) -> Memorisation:
    """The three measures of what an expert memorised between two checkpoints.

    Args:
        early: logits of the earlier one, ``(examples, classes)``, of at least two classes.
        late: of the later one.
        labels: ``(examples,)`` int64.
    """
    p_early, p_late = early.float().softmax(-1), late.float().softmax(-1)
    losses = [F.cross_entropy(logits.float(), labels, reduction="none") for logits in (early, late)]
    margin = _margin(p_late, labels) - _margin(p_early, labels)
    return Memorisation(margin, losses[0] - losses[1], (p_late - p_early).abs().sum(-1))


def _margin(p: Tensor, labels: Tensor) -> Tensor:
    others = p.masked_fill(F.one_hot(labels, p.shape[-1]).bool(), -1.0)
    return p.gather(-1, labels[:, None])[:, 0] - others.amax(-1)
