"""Sums of low-rank matrices, as LoRA adapters hold them: exact, or cut to a rank, never as dense products.

A LoRA adapter of rank r adds ``ΔW = s B A`` to a weight, with B of shape (out, r), A of shape (r, in) and a
scale s ("Less Is More", section 2.3; LoRA, arXiv 2106.09685). The factors mean something only together: the
mean of K products is no product of means, but it is exactly an adapter of rank K·r.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<rest>(?:\..+)?)")
"""What peft calls a factor: in a model the adapter's name follows, in a file ``.weight`` or nothing."""


_NO_DIRECTION = 1e-3
"""A direction whose share is smaller than this, of the largest one's, counts as none."""


@dataclass(frozen=True)
class LowRank:
    """The matrix ``scale · B A``.

    Args:
        b: (rows, rank), floating point.
        a: (rank, columns), of the same dtype.
        scale: of the product.

    Raises:
        ValueError: if the factors don't fit together.
    """

    b: Tensor
    a: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ValueError(
                f"B {tuple(self.b.shape)} and A {tuple(self.a.shape)} are no factors of a matrix"
            )

    @property
    def rank(self) -> int:
        """The number of columns of B; the matrix may be of less."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Tensor:
        """The matrix, in fp32 (fp64 for fp64 factors)."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return torch.mul(self.b.to(wide) @ self.a.to(wide), self.scale)

    def singular_values(self) -> Tensor:
        """All ``rank`` singular values, the largest first, in fp64; from cores of rank × rank."""
        if not self.rank:
            return torch.zeros(0, dtype=torch.float64)
        values: Tensor = torch.linalg.svdvals(_core(self.b) @ _core(self.a.mT).mT)
        return values * abs(self.scale)

    def norm(self) -> float:
        """The Frobenius norm; a difference of equal matrices comes out as about 1e-16 of their norms."""
        return float(torch.linalg.vector_norm(self.singular_values()))

    def distance(self, other: LowRank) -> float:
        """The Frobenius norm of the difference to another matrix of the same shape."""
        return total([self, other], [1.0, -1.0], torch.float64).norm()

    def cut(self, rank: int) -> LowRank:
        """The nearest matrix of a rank (Eckart and Young), in balanced factors: BᵀB = AAᵀ, in fp32 or fp64.

        Args:
            rank: at least 1. If it is not below the matrix's own, the matrix stays as it is.
        """
        if rank >= self.rank:
            return self
        wide = torch.promote_types(self.b.dtype, torch.float32)
        left, inner = torch.linalg.qr(self.b.double())
        right, outer = torch.linalg.qr(self.a.double().mT)
        u, values, v = torch.linalg.svd(inner @ outer.mT * self.scale, full_matrices=False)
        kept = min(rank, len(values))  # the sides may be smaller
        root = values[:kept].sqrt()
        b, a = left @ (u[:, :kept] * root), (right @ (v[:kept].mT * root)).mT
        return LowRank(b.to(wide), a.to(wide).contiguous())

    def near(self, a: Tensor) -> LowRank:
        """The same matrix, in factors whose A is near another one; it comes from ``cut`` or ``nearest``.

        ``B R⁻¹`` and ``R A`` have the same product for every invertible R. An optimizer's moments and the
        pace of the training belong to one R, which balanced factors would change; and a direction that is 0
        in both factors never trains again.

        Args:
            a: (rank, columns), of at least this matrix's rank. If it lacks one of the matrix's directions,
                the factors stay balanced, with rows and columns of zeros.

        Returns:
            Factors of that rank, in fp64.
        """
        norms = torch.linalg.vector_norm(self.a.double(), dim=1)  # the roots of the singular values
        used = norms > _NO_DIRECTION * norms.max() if len(norms) else norms > 0
        right = (self.a.double()[used] / norms[used, None]).mT
        left, like = self.b.double()[:, used] * norms[used], a.double()
        turned = like @ right
        u, values, v = torch.linalg.svd(turned, full_matrices=False)
        if len(values) and values[-1] <= _NO_DIRECTION * values[0]:
            padded = like.new_zeros(len(a) - self.rank, self.shape[1])
            columns = like.new_zeros(self.shape[0], len(a) - self.rank)
            return LowRank(torch.cat([self.b.double(), columns], 1), torch.cat([self.a.double(), padded]))
        return LowRank((left @ v.mT / values) @ u.mT, like - u @ (u.mT @ (like - turned @ right.mT)))

    def to(self, dtype: torch.dtype) -> LowRank:
        """With factors of another dtype."""
        return replace(self, b=self.b.to(dtype), a=self.a.to(dtype))


def total(parts: Sequence[LowRank], weights: Sequence[float], dtype: torch.dtype | None = None) -> LowRank:
    """``Σ w_i s_i B_i A_i`` as one product, whose rank is the sum of theirs.

    If all ``w_i s_i`` are the same, nothing is rounded: B's columns are taken as they are, with that scale.

    Args:
        parts: of one shape.
        weights: of each; not normalised.
        dtype: of the factors; default: the widest of the parts'; at least fp32 if columns have to be scaled.
    """
    shape = parts[0].shape
    if any(part.shape != shape for part in parts):
        raise ValueError(f"low-rank matrices of shapes {sorted({part.shape for part in parts})} have no sum")
    factors = [weight * part.scale for part, weight in zip(parts, weights, strict=True)]
    widest = parts[0].b.dtype
    for part in parts:
        widest = torch.promote_types(widest, torch.promote_types(part.b.dtype, part.a.dtype))
    if len(set(factors)) == 1:
        kind = dtype or widest
        return LowRank(
            torch.cat([p.b.to(kind) for p in parts], 1), torch.cat([p.a.to(kind) for p in parts]), factors[0]
        )
    kind = dtype or torch.promote_types(widest, torch.float32)
    columns = [part.b.to(kind) * factor for part, factor in zip(parts, factors, strict=True)]
    return LowRank(torch.cat(columns, 1), torch.cat([part.a.to(kind) for part in parts]))


def nearest(matrix: Tensor, rank: int, around: Tensor | None = None) -> LowRank:
    """The nearest matrix of a rank to a dense one, in balanced factors (fp32, fp64 for fp64).

    Args:
        matrix: (rows, columns).
        rank: at least 1; more than the smaller side has no effect.
        around: (directions, columns): its rows span most of the matrix. The result is then found by subspace
            iteration from there, which is up to 1e-3 farther away, and takes a tenth of the time or less.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    if around is None or 2 * len(around) > min(matrix.shape):
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        exact, basis = matrix.to(wide), torch.linalg.qr(around.to(wide).mT).Q
        for _ in range(2):
            basis = torch.linalg.qr(exact.mT @ torch.linalg.qr(exact @ basis).Q).Q
        u, values, v = torch.linalg.svd((exact @ basis).double(), full_matrices=False)
        v = v @ basis.double().mT
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    return LowRank((u[:, :kept] * root).to(wide), (v[:kept] * root[:, None]).to(wide))


def relative_error(stored: LowRank, exact: LowRank | Tensor) -> float:
    """``‖stored − exact‖_F / ‖exact‖_F``; 0 if both are 0."""
    if isinstance(exact, Tensor):
        off = float(torch.linalg.vector_norm(stored.dense() - exact, dtype=torch.float64))
        size = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    else:
        off, size = stored.distance(exact), exact.norm()
    return off / size if size else (math.inf if off else 0.0)


def _core(tall: Tensor) -> Tensor:
    """R of a tall matrix's QR decomposition, in fp64."""
    core: Tensor = torch.linalg.qr(tall.double(), mode="r").R
    return core
