"""The derivatives and planes of the papers' claims, against finite differences and exact quadratics."""

import math

import pytest
import torch

from benchmarks.papers.curvature import Curvature, Landscape
from benchmarks.papers.runs import built, weights
from benchmarks.papers.spec import Spec

TINY = Spec(width=8, context=8, batch=2)


@pytest.fixture(params=[0, 2], ids=["dense", "experts"])
def spec(request):
    return Spec(width=8, context=8, batch=2, experts=request.param)


def states(spec, count, scale):
    """Weights in float64, and others that are normally distributed around them."""
    centre = {name: tensor.double() for name, tensor in weights(built(spec)).items()}
    draw = torch.Generator().manual_seed(1)

    def moved(tensor):
        return tensor + scale * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)

    others = [
        {name: tensor if "bias" in name else moved(tensor) for name, tensor in centre.items()}
        for _ in range(count)
    ]
    return centre, others


def test_the_derivatives_are_those_of_the_loss(spec):
    landscape = Landscape(spec, 4)
    landscape.model.double()
    centre, (a, b) = states(spec, 2, 3e-5)
    found = landscape.around(centre, [a, b])

    def loss(x, y):
        return landscape.loss({n: c + x * (a[n] - c) + y * (b[n] - c) for n, c in centre.items()})

    second = loss(1, 0) - 2 * loss(0, 0) + loss(-1, 0)
    mixed = (loss(1, 1) - loss(1, -1) - loss(-1, 1) + loss(-1, -1)) / 4
    assert found.slopes[0] == pytest.approx((loss(1, 0) - loss(-1, 0)) / 2, rel=1e-3)
    assert found.products[0, 0] == pytest.approx(second, rel=1e-3)
    assert found.products[0, 1] == pytest.approx(mixed, rel=1e-2)


def test_the_formula_is_exact_for_a_quadratic():
    draw = torch.Generator().manual_seed(0)
    root, slope, deltas = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (5, 1, 4))
    hessian = root @ root.T

    def loss(delta):
        return float(slope[0] @ delta + delta @ hessian @ delta / 2)

    found = Curvature(deltas @ slope[0], deltas @ hessian @ deltas.T)
    gain = sum(loss(delta) for delta in deltas) / 4 - loss(deltas.mean(0))
    left, right = found.sides
    assert found.mean_gain == pytest.approx(gain)
    assert (right - left) / (2 * 4**2) == pytest.approx(gain)
    assert found.rises.tolist() == pytest.approx([loss(delta) for delta in deltas])
    assert found.positive_pairs == 1


def test_a_pair_with_negative_curvature_is_counted():
    deltas = torch.tensor([[1.0, 0], [0, 1], [0, 2]], dtype=torch.float64)
    hessian = torch.diag(torch.tensor([1.0, -3], dtype=torch.float64))
    assert Curvature(torch.zeros(3), deltas @ hessian @ deltas.T).positive_pairs == 0
    assert Curvature(torch.zeros(3), deltas @ hessian.abs() @ deltas.T).positive_pairs == 1


def test_a_plane_has_the_merge_in_its_middle_and_the_states_at_their_places():
    landscape = Landscape(TINY, 4)
    landscape.model.double()
    _, corners = states(TINY, 3, 0.1)
    merged = {name: sum(state[name] for state in corners) / 3 for name in corners[0]}
    found = landscape.plane(merged, corners, 3, 1.0)
    assert found["grid"][1][1] == pytest.approx(landscape.loss(merged))
    for one in range(3):
        for other in range(one):
            apart = math.dist(found["places"][one], found["places"][other])
            pairs = [(corners[one][n] - corners[other][n]).norm() for n in merged]
            assert apart == pytest.approx(float(torch.stack(pairs).norm()), rel=1e-4)
    assert found["axis"][2] == pytest.approx(math.dist(found["places"][0], found["places"][2]), rel=1e-5)
