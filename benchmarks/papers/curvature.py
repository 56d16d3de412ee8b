"""The loss and its second derivatives at any weights of a model, on fixed crops of a held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.papers.runs import State, built, load
from benchmarks.papers.spec import Spec
from benchmarks.papers.text import held_out
from merge_callback.demo.crops import Batch


@dataclass(frozen=True)
class Curvature:
    """The derivatives at one point of the weights along some directions.

    Args:
        slopes: gᵀδ_i, ``(k,)`` float64; g is the gradient there.
        products: δ_iᵀ H δ_j, ``(k, k)`` float64; H is the Hessian there.
    """

    slopes: Tensor
    products: Tensor

    @property
    def mean_gain(self) -> float:
        """½ [Σ_i w_i δ_iᵀHδ_i − Σ_ij w_i w_j δ_iᵀHδ_j], w = 1/k: nats per byte."""
        k = len(self.products)
        return float(self.products.trace() / k - self.products.sum() / k**2) / 2

    @property
    def rises(self) -> Tensor:
        """gᵀδ_i + ½ δ_iᵀHδ_i: by how much the loss is larger at θ_i than here, to second order; ``(k,)``."""
        return self.slopes + self.products.diagonal() / 2

    @property
    def sides(self) -> tuple[float, float]:
        """Σ_{i≠j} δ_iᵀHδ_j and (k−1) Σ_i δ_iᵀHδ_i, the two sides of [PMA] eq. 15."""
        diagonal = float(self.products.trace())
        return float(self.products.sum()) - diagonal, (len(self.products) - 1) * diagonal

    @property
    def positive_pairs(self) -> float:
        """The share of the pairs i < j with (δ_i − δ_j)ᵀH(δ_i − δ_j) > 0."""
        diagonal = self.products.diagonal()
        pairs = diagonal[:, None] + diagonal - 2 * self.products
        rows, columns = torch.triu_indices(*pairs.shape, offset=1)
        return float((pairs[rows, columns] > 0).double().mean())


class Landscape:
    """The mean loss over fixed crops of the text ``score`` as a function of the weights.

    A model with experts has jumps, because another expert may be chosen; its second derivatives are those
    of the piece around the point, with each token's experts fixed.

    Args:
        spec: a run of the model.
        crops: how many.
    """

    def __init__(self, spec: Spec, crops: int) -> None:
        self.model = built(spec).eval()
        self.batches = held_out(spec.mix, "score", spec.context, crops)
        self.names = [name for name, _ in self.model.named_parameters()]

    @torch.no_grad()
    def loss(self, state: State) -> float:
        """Nats per byte."""
        load(self.model, state)
        return sum(float(self._loss(batch)) for batch in self.batches) / len(self.batches)

    def around(self, point: State, states: Sequence[State]) -> Curvature:
        """The derivatives at ``point`` along the ways to ``states``: a Hessian-vector product for each."""
        directions = [self._vector(state) - self._vector(point) for state in states]
        load(self.model, point)
        parameters = list(self.model.parameters())
        gradient = torch.zeros_like(directions[0])
        applied = torch.zeros(len(directions), len(gradient))
        for batch in self.batches:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
                slope = _flat(torch.autograd.grad(self._loss(batch), parameters, create_graph=True))
                gradient += slope.detach() / len(self.batches)
                for row, direction in zip(applied, directions, strict=True):
                    found = torch.autograd.grad(
                        slope, parameters, direction, retain_graph=True, materialize_grads=True
                    )
                    row += _flat(found) / len(self.batches)
        stacked = torch.stack(directions).double()
        products = stacked @ applied.double().T
        return Curvature(stacked @ gradient.double(), (products + products.T) / 2)

    def plane(self, centre: State, states: Sequence[State], points: int, margin: float) -> dict[str, Any]:
        """The loss on the plane through three states whose mean is ``centre``.

        Args:
            centre: their merge, which is at (0, 0).
            states: three.
            points: of the grid, along each axis.
            margin: how far the grid reaches to each side, in the distance of the first state from the last.

        Returns:
            ``places``, the states' coordinates; ``axis``, those of the grid on both axes; ``grid``, losses,
            one row for each value of the second coordinate. Coordinates are Euclidean lengths.
        """
        middle = self._vector(centre)
        corners = torch.stack([self._vector(state) - middle for state in states])
        basis = torch.linalg.qr((corners[1:] - corners[0]).T).Q.T
        places = corners @ basis.T
        side = (places[0] - places[-1]).norm()
        axis = margin * side * torch.linspace(-1, 1, points, dtype=middle.dtype)

        def loss(x: Tensor, y: Tensor) -> float:
            parts = (middle + torch.stack((x, y)) @ basis).split(
                [centre[name].numel() for name in self.names]
            )
            shaped = {n: part.view_as(centre[n]) for n, part in zip(self.names, parts, strict=True)}
            return self.loss({**centre, **shaped})

        grid = [[loss(x, y) for x in axis] for y in axis]
        return {"places": places.tolist(), "axis": axis.tolist(), "grid": grid}

    def _vector(self, state: State) -> Tensor:
        """The parameters as one vector, float32; biases of routers are none."""
        return torch.cat([state[name].flatten() for name in self.names])

    def _loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch["input_ids"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
