"""A linear layer with LoRA experts and a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merge_callback.merging.low_rank import LowRank


def arrow(expert: LowRank) -> Tensor:
    """The direction of inputs that an expert changes most: the first right singular vector of BA.

    It comes from a core of rank × rank, never from the dense product. Its sign, which is arbitrary, is chosen
    so that the entry of largest magnitude is positive. Of an expert that is all zeros the vector is zero.

    Args:
        expert: one expert of one layer.

    Returns:
        ``(in,)`` fp64, of norm 1. (Arrow: Ostapenko et al., arXiv 2405.11157.)
    """
    inner = torch.linalg.qr(expert.b.double(), mode="r").R
    right, outer = torch.linalg.qr(expert.a.double().mT)
    _, values, v = torch.linalg.svd(inner @ outer.mT, full_matrices=False)
    vector: Tensor = right @ v[0]
    vector *= vector[vector.abs().argmax()].sign() * (values[0] > 0)
    return vector


class MoergedLinear(nn.Module):
    """A frozen linear layer whose inputs are routed to k of T LoRA experts.

    ``y = W x + b + Σ_{t∈top-k} π_t s_t B_t A_t x / Σ_{t∈top-k} π_t`` with ``π = softmax(|R x|)``, or
    ``softmax(R x)`` if ``score="signed"``, for each token.

    The experts lie in one matrix A and one B, so that all of them are two products, however many there are.
    Only what lies between, one number per token and rank, is weighted (and set to 0 for experts that were
    not chosen). Experts may differ in rank and scale.

    Args:
        base: the layer, of ``in`` inputs and ``out`` outputs.
        ranks: of the experts.
        scales: their factors ``s_t``, α/r (rank-stabilised: α/√r).
        in_features: of the layer.
        out_features: of the layer.
        k: experts per token.
        score: ``"abs"`` or ``"signed"``.
    """

    expert_of: Tensor

    def __init__(
        self,
        base: nn.Module,
        ranks: Sequence[int],
        scales: Sequence[float],
        in_features: int,
        out_features: int,
        k: int,
        score: str,
    ) -> None:
        super().__init__()
        self.base, self.k, self.score = base, k, score
        self.in_features, self.out_features = in_features, out_features
        self.ranks, self.scales = tuple(ranks), tuple(scales)
        weight = next(base.parameters())
        device = torch.device("cpu") if weight.is_meta else weight.device  # of a base that is only described
        with device:
            self.lora_A = nn.Parameter(torch.empty(sum(ranks), in_features, dtype=torch.float32))
            self.lora_B = nn.Parameter(torch.empty(out_features, sum(ranks), dtype=torch.float32))
            self.router = nn.Parameter(torch.empty(len(ranks), in_features, dtype=torch.float32))
        experts = torch.arange(len(ranks), device=device)
        rows = torch.tensor(self.ranks, device=device)
        self.register_buffer("expert_of", experts.repeat_interleave(rows), persistent=False)
        # No buffer: .to(torch.bfloat16) would round it.
        self._scale = torch.tensor(self.scales, device=device).repeat_interleave(rows)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(…, in)`` to ``(…, out)``, in the base layer's dtype."""
        y: Tensor = self.base(x)
        chosen, weights = self.route(x)
        shares = weights.new_zeros(*x.shape[:-1], len(self.ranks)).scatter(-1, chosen, weights)
        if self._scale.device != x.device:
            self._scale = self._scale.to(x.device)
        h = F.linear(x.to(self.lora_A.dtype), self.lora_A)
        h = h * (shares.index_select(-1, self.expert_of) * self._scale).to(h.dtype)
        return y + F.linear(h, self.lora_B).to(y.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token.

        Args:
            x: ``(…, in)``.

        Returns:
            The chosen experts ``(…, k)`` int64, the best first, and their weights ``(…, k)`` fp32, of sum 1.
        """
        with torch.autocast(x.device.type, enabled=False):  # bf16 scores of two experts are often equal
            scores = F.linear(x.float(), self.router.float())
        best, chosen = (scores.abs() if self.score == "abs" else scores).topk(self.k)
        return chosen, best.softmax(-1)  # the softmax over all, divided by its sum over these

    def experts(self) -> list[LowRank]:
        """Each expert's factors, as views."""
        ranks = list(self.ranks)
        a, b = torch.split(self.lora_A, ranks), torch.split(self.lora_B, ranks, 1)
        return [LowRank(*parts) for parts in zip(b, a, self.scales, strict=True)]

    @property
    def weight(self) -> Any:
        """The base layer's, since some models look at its dtype."""
        return self.base.weight

    def extra_repr(self) -> str:
        """What the parameters' shapes do not tell."""
        return f"experts={len(self.ranks)}, k={self.k}, score={self.score!r}"
