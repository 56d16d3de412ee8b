"""The power-function average of any width, from stored ones of other widths (EDM2, arXiv 2312.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merge_callback.merging.method import LinearMethod
from merge_callback.merging.running import gamma_of

MOST_RESIDUAL = 0.01
"""The largest residual of a sum that is made; docs/running-averages.md says how it was chosen."""

_SINGULAR = 1e-12  # of the stored profiles' largest common direction: what is less is rounding


@dataclass(frozen=True)
class Profile:
    """A power-function average as it was after a step: p(τ) = (γ+1) τ^γ / t^(γ+1) on 0 ≤ τ ≤ t.

    Args:
        step: t.
        sigma: the relative width.
    """

    step: int
    sigma: float

    @property
    def gamma(self) -> float:
        """The exponent γ."""
        return gamma_of(self.sigma)


@dataclass(frozen=True)
class Solution:
    """How to make one profile out of others.

    Args:
        weights: of each, which sum to 1; some are negative.
        residual: how far their sum is from the profile that was asked for, in relation to that one (L2 norm).
    """

    weights: list[float]
    residual: float


@dataclass(frozen=True)
class PosthocEma(LinearMethod):
    """A weighted sum of stored running averages that is the average of another width.

    Args:
        sigma: the relative width.
        step: the end of its profile.
        weights: of the stored ones; see ``solve``.
        residual: of this solution.
    """

    sigma: float = 0.1
    step: int = 0
    weights: Sequence[float] = field(default=(), repr=False)
    residual: float = 0.0

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """Those given."""
        return list(self.weights)

    def normalised_weights(self, positions: Sequence[float]) -> list[float]:
        """Those given, which sum to 1; that some are negative is as it should be."""
        return self.raw_weights(positions)


PosthocEma.name, PosthocEma.reference = "posthoc-ema", "arXiv 2312.02696, eq. 14 to 17"


def inner_product(one: Profile, other: Profile) -> float:
    """⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1) / (γ_a+γ_b+1) · (t_a/t_b)^γ_b / t_b for t_a ≤ t_b (EDM2, eq. 17)."""
    early, late = sorted((one, other), key=lambda profile: profile.step)
    a, b = early.gamma, late.gamma
    share: float = (early.step / late.step) ** b
    return (a + 1) * (b + 1) / (a + b + 1) * share / late.step


def solve(stored: Sequence[Profile], wanted: Profile) -> Solution:
    """The weights with which stored averages come closest to another one (EDM2, eq. 14 to 16).

    With A_ij = ⟨p_i, p_j⟩ and b_i = ⟨p_i, p_r⟩ it is x = A⁻¹ b in fp64, divided by its sum. Profiles that
    almost repeat others get small weights instead of large ones that cancel.

    Args:
        stored: at least one.
        wanted: the profile to make.
    """
    products, aims = _table(stored, stored), _table(stored, [wanted])[:, 0]
    lengths = products.diagonal().sqrt()
    scaled = torch.linalg.pinv(products / lengths[:, None] / lengths, rtol=_SINGULAR, hermitian=True)
    weights = scaled @ (aims / lengths) / lengths
    weights = weights / weights.sum()
    own = inner_product(wanted, wanted)
    square = own - 2 * weights @ aims + weights @ products @ weights
    return Solution(weights.tolist(), float((square.clamp_min(0) / own).sqrt()))


def _table(rows: Sequence[Profile], columns: Sequence[Profile]) -> Tensor:
    return torch.tensor([[inner_product(a, b) for b in columns] for a in rows], dtype=torch.float64)
