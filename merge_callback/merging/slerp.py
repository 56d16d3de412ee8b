"""Spherical interpolation along the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from merge_callback.merging.method import Inputs, MergeMethod, Need, Trajectory, register_method
from merge_callback.reduce import accumulator_dtype, one_pass

_PARALLEL = 0.9995  # a cosine beyond which the arc counts as straight

_BLOCK = 1 << 16  # elements of each snapshot whose inner products are formed at once


@register_method("slerp", reference="Practical Guidelines (ACL 2026), section 3.3")
@dataclass(frozen=True)
class Slerp(MergeMethod):
    """Iterated SLERP: ``m = θ_1``, then ``m ← SLERP(m, θ_i; t)`` for the others, oldest first.

    ``SLERP(a, b; t) = sin((1−t)Ω)/sinΩ · a + sin(tΩ)/sinΩ · b``, with Ω the angle between the vectors; linear
    interpolation if they are nearly parallel (a cosine beyond ±.9995) or one is zero. Snapshots close
    to each other, as in a decay, are nearly parallel.

    Every stage is a weighted sum of the snapshots, and so is the chain. Its weights follow from the inner
    products of the snapshots alone. One pass computes these in fp64; a second one forms the sum.

    Args:
        t: how far each stage goes towards the next snapshot.
        scope: ``"tensor"``: each flattened tensor is a vector; ``"global"``: the whole model is one.

    Raises:
        ValueError: for a ``t`` outside [0, 1] or an unknown ``scope``.
    """

    needs: ClassVar[tuple[Need, ...]] = ("pairs", "global sums")

    t: float = 0.4
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ValueError(f"slerp: t={self.t} must lie in [0, 1]; the paper uses 0.4")
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"slerp: scope={self.scope!r} must be 'tensor' or 'global'")

    def survey(self, model: Iterable[Inputs], trajectory: Trajectory) -> Any:
        """With ``scope="global"`` the inner products of the whole model."""
        if self.scope == "tensor":
            return None
        count = len(trajectory.positions)
        products = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        total: Callable[[Tensor], Tensor] = lambda products: products  # noqa: E731
        for inputs in model:
            products += inner_products(inputs.tensors)
            total = inputs.total
        return total(products)

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """The chain as one weighted sum."""
        products = inputs.total(inner_products(inputs.tensors)) if survey is None else survey
        one_pass(inputs.tensors, self.weights(products.tolist()), out)

    def weights(self, products: Sequence[Sequence[float]]) -> list[float]:
        """The final weight of each snapshot, computed from the inner products of all of them."""
        weights = [1.0] + [0.0] * (len(products) - 1)
        for i in range(1, len(products)):
            inner = math.fsum(w * row[i] for w, row in zip(weights, products, strict=True))
            square = math.fsum(
                a * b * products[j][k] for j, a in enumerate(weights) for k, b in enumerate(weights)
            )
            kept, added = _arc(inner, max(square, 0.0), products[i][i], self.t)
            weights = [kept * w for w in weights]
            weights[i] = added
        return weights


def inner_products(tensors: Sequence[Tensor]) -> Tensor:
    """The inner products of all pairs of flat tensors, ``(N, N)``, fp64 on the CPU."""
    count, size = len(tensors), tensors[0].numel()
    wide = accumulator_dtype(tensors[0])
    products = torch.zeros(count, count, dtype=torch.float64, device=tensors[0].device)
    block = torch.empty(count, min(size, _BLOCK), dtype=wide, device=tensors[0].device)
    for start in range(0, size, _BLOCK):
        piece = block[:, : min(_BLOCK, size - start)]
        for row, tensor in zip(piece, tensors, strict=True):
            row.copy_(tensor[start : start + _BLOCK])
        double = piece.double()
        products += double @ double.T
    return products.cpu()


def _arc(inner: float, square_a: float, square_b: float, t: float) -> tuple[float, float]:
    """The factors of ``SLERP(a, b; t)``."""
    norms = math.sqrt(square_a) * math.sqrt(square_b)
    cosine = max(-1.0, min(1.0, inner / norms)) if norms else 1.0
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
