"""Functional diversity: how far what a model computes has moved ("Practical Guidelines", App. C.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a model computes on a probe batch, in fp32: S sequences (or images, or rows).

    Args:
        logits: ``(S, positions, classes)``; of a language model and of a classifier there is one position.
        activations: ``(S, elements)`` by layer; S may differ where a layer's leading dimension does.
    """

    logits: Tensor
    activations: Mapping[str, Tensor]

    def cpu(self) -> Features:
        """A copy in host memory; the features themselves if they are there."""
        return Features(self.logits.cpu(), {name: tensor.cpu() for name, tensor in self.activations.items()})


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 − ⟨a, b⟩ / (‖a‖ ‖b‖) of each row, averaged over the rows: from 0, the same direction, to 2.

    Args:
        a: ``(rows, …)``. What is -inf in both, as the logits of classes that are masked, does not count.
        b: of the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    a, b = _pair(a, b)
    masked = a.isneginf() & b.isneginf()
    a, b = a.masked_fill(masked, 0.0).flatten(1), b.masked_fill(masked, 0.0).flatten(1)
    norms = torch.stack([a.norm(dim=1), b.norm(dim=1)])
    cosine = (a * b).sum(1) / norms.prod(0)
    both_zero = (norms == 0).all(0)
    one_zero = (norms == 0).any(0) & ~both_zero
    distances = (1 - cosine).clamp(min=0).masked_fill(both_zero, 0.0).masked_fill(one_zero, 1.0)
    return float(distances.mean())


def kl_divergence(newer: Tensor, older: Tensor) -> float:
    """KL(p_newer ‖ p_older) = Σ p_newer (ln p_newer − ln p_older) in nats, averaged over all but the classes.

    Args:
        newer: logits, ``(…, classes)``, of which p is the softmax.
        older: of the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    newer, older = _pair(newer, older)
    p, q = newer.log_softmax(-1), older.log_softmax(-1)
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return float(terms.sum(-1).clamp(min=0).mean())


def functional_distances(older: Features, newer: Features) -> dict[str, float]:
    """The cosine distances of ``logits`` and ``activations``, the KL divergence of ``probabilities`` in nats.

    That of the activations is the mean over the layers. Without layers, or with a single class, which has no
    probabilities to speak of, there is no such entry.

    Raises:
        ValueError: if shapes or layers differ.

    Example::

        >>> old = Features(torch.tensor([[[1.0, 0.0]]]), {})
        >>> new = Features(torch.tensor([[[0.0, 1.0]]]), {})
        >>> {name: round(value, 6) for name, value in functional_distances(old, new).items()}
        {'logits': 1.0, 'probabilities': 0.462117}
    """
    if older.activations.keys() != newer.activations.keys():
        raise ValueError(
            f"the layers differ: {sorted(older.activations.keys() ^ newer.activations.keys())[:5]}"
        )
    found = {"logits": cosine_distance(newer.logits, older.logits)}
    if newer.logits.shape[-1] > 1:
        found["probabilities"] = kl_divergence(newer.logits, older.logits)
    layers = [cosine_distance(newer.activations[n], older.activations[n]) for n in newer.activations]
    if layers:
        found["activations"] = sum(layers) / len(layers)
    return found


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64, since distances of neighbours may be far smaller than the rounding of fp32."""
    if a.shape != b.shape:
        raise ValueError(f"the shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    return a.double(), b.double()
