"""Spectral norm's singular vectors: a function of the weight, so they are found again for a merged one.

A layer divides its weight ``W`` by ``σ = uᵀ W v``, an estimate of its largest singular value that each step
refines by one power iteration. The mean of several ``u`` is no unit vector, and σ comes out too small.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

_NAMES = (
    (re.compile(r"(.+\.)?parametrizations\.([^.]+)\.0\._([uv])"), "{0}parametrizations.{1}.original"),
    (re.compile(r"(.+\.)?([^.]+)_([uv])"), "{0}{1}_orig"),
)
"""Those of ``torch.nn.utils.parametrizations.spectral_norm`` and of ``torch.nn.utils.spectral_norm``."""

_ITERATIONS = 100  # at most; each reads the weight twice

_PRECISION = 1e-6  # relative growth of σ in one iteration, below which it is the last


def vectors_of(names: Collection[str]) -> dict[str, tuple[str, str, str]]:
    """The singular vectors among a model's tensors: for each its weight, and that one's ``u`` and ``v``.

    If spectral norm is not the first parametrization of a weight, its vectors are not those of a tensor here.
    """
    found = {}
    for name in names:
        for pattern, weight_pattern in _NAMES:
            if match := pattern.fullmatch(name):
                weight = weight_pattern.format(match[1] or "", match[2])
                u, v = f"{name[:-1]}u", f"{name[:-1]}v"
                if weight in names and u in names and v in names:
                    found[name] = weight, u, v
    return found


@torch.no_grad()
def singular_vectors(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """The left and right singular vectors of a weight, by power iteration from those of a similar one.

    Args:
        weight: of any shape; its matrix has one dimension as rows, and all others as columns.
        u: unit vector of as many elements as that dimension has.
        v: unit vector for the columns.

    Returns:
        Both in fp32, in fp64 for an fp64 weight; ``None`` if they are not finite or fit no dimension,
        or if the weight is complex.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, u, v = weight.to(dtype), u.to(dtype), v.to(dtype)
    if weight.is_complex():
        return None
    matrices = [weight.movedim(d, 0).flatten(1) for d, size in enumerate(weight.shape) if size == u.numel()]
    matrices = [matrix for matrix in matrices if matrix.shape[1] == v.numel()]
    if not matrices:
        return None
    # Several dimensions may have that size: with the right one as rows, u and v are nearly singular vectors.
    matrix = max(matrices, key=lambda m: float((u @ (m @ v)).abs()))
    sigma = 0.0
    for _ in range(_ITERATIONS):
        v = normalize(matrix.mT @ u, dim=0, eps=1e-12)
        image = matrix @ v
        u, before, sigma = normalize(image, dim=0, eps=1e-12), sigma, float(image.norm())
        if not sigma > before * (1 + _PRECISION):
            break
    return (u, v) if bool(u.isfinite().all() and v.isfinite().all()) else None


def recompute(vectors: Iterable[tuple[str, str, str]], tensor: Callable[[str], Tensor]) -> list[str]:
    """Overwrites singular vectors, which are those of the newest weight, by those of the merged one.

    Args:
        vectors: weight, ``u`` and ``v`` of each; some values of ``vectors_of``.
        tensor: gives a merge's tensor by name.

    Returns:
        The names of those that were.
    """
    names = []
    for weight, u, v in dict.fromkeys(vectors):
        if found := singular_vectors(tensor(weight), tensor(u), tensor(v)):
            for name, values in zip((u, v), found, strict=True):
                tensor(name).copy_(values)
            names += [u, v]
    return sorted(names)
