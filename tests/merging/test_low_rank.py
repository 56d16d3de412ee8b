"""Sums of low-rank matrices are those of dense ones, and their cuts those of the SVD."""

import math

import pytest
import torch

from merge_callback.merging.low_rank import LowRank, nearest, relative_error, total

SHAPES = [(24, 40, 3), (40, 24, 8), (7, 5, 5), (2, 16, 2), (64, 64, 16), (5, 3, 9)]  # the last of full rank


def drawn(rows, columns, rank, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return [
        LowRank(
            torch.randn(rows, rank, generator=generator).to(dtype),
            torch.randn(rank, columns, generator=generator).to(dtype),
            scale=0.5 + index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.2, -0.5, 1.3]])
def test_a_sum_is_the_sum_of_the_dense_matrices(shape, weights):
    parts = drawn(*shape)
    expected = sum(w * p.scale * (p.b.double() @ p.a.double()) for p, w in zip(parts, weights, strict=True))
    found = total(parts, weights)
    assert found.rank == 3 * shape[2]
    off = torch.linalg.vector_norm(found.dense() - expected) / torch.linalg.vector_norm(expected)
    assert off < 1e-6


def test_equal_factors_leave_the_columns_as_they_are_in_any_dtype():
    parts = [LowRank(p.b, p.a, 2.0) for p in drawn(8, 6, 2, dtype=torch.bfloat16)]
    found = total(parts, [0.25] * 3)
    assert (found.b.dtype, found.scale) == (torch.bfloat16, 0.5)
    assert torch.equal(found.b, torch.cat([part.b for part in parts], 1))
    scaled = total(parts, [0.25, 0.5, 0.25])
    assert (scaled.b.dtype, scaled.scale) == (torch.float32, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_is_the_nearest_matrix_of_its_rank_in_balanced_factors(shape):
    (exact,) = drawn(*shape, count=1, dtype=torch.float64)
    rank = max(1, min(shape) // 2)
    u, values, v = torch.linalg.svd(exact.dense(), full_matrices=False)
    expected = (u[:, :rank] * values[:rank]) @ v[:rank]
    tail = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
    found = exact.cut(rank)
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(found.b.mT @ found.b, found.a @ found.a.mT)
    assert relative_error(found, exact) == pytest.approx(tail, abs=1e-7)
    assert relative_error(nearest(exact.dense(), rank), exact.dense()) == pytest.approx(tail, abs=1e-7)
    torch.testing.assert_close(exact.singular_values()[: min(shape)], values[: shape[2]])
    assert exact.norm() == pytest.approx(float(torch.linalg.vector_norm(exact.dense())))


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_near_others_have_the_same_product_and_their_basis(shape):
    rows, columns, rank = shape
    parts = drawn(*shape)
    parts = [LowRank(parts[0].b + 0.1 * p.b, parts[0].a + 0.1 * p.a) for p in parts]
    mean_a, mean_b = (sum(getattr(p, f).double() for p in parts) / 3 for f in ("a", "b"))
    cut = total(parts, [1 / 3] * 3, torch.float64).cut(rank)
    found = cut.near(mean_a)
    assert (found.rank, found.a.dtype) == (rank, torch.float64)
    torch.testing.assert_close(found.dense(), cut.dense(), rtol=1e-12, atol=1e-12)
    assert torch.dist(found.a, mean_a) < 0.05 * torch.linalg.vector_norm(mean_a)
    if rank <= min(rows, columns):
        assert torch.dist(found.b, mean_b) < 0.05 * torch.linalg.vector_norm(mean_b)


def test_near_others_no_direction_is_lost_for_the_training():
    (part,) = drawn(6, 8, 3, count=1)
    b = part.b.clone()
    b[:, 1] = 0  # it has not moved since the initialisation
    whole = total([LowRank(b, part.a)] * 2, [0.5] * 2, torch.float64)
    cut = whole.cut(3)
    assert torch.linalg.svdvals(cut.a)[-1] < 1e-6  # and its column of B is 0, too: neither has a gradient
    found = cut.near(part.a)
    torch.testing.assert_close(found.dense(), whole.dense(), rtol=1e-9, atol=1e-9)
    assert torch.linalg.svdvals(found.a)[-1] > 0.5 * torch.linalg.svdvals(part.a)[-1]
    nothing = total([LowRank(0 * b, part.a)] * 2, [0.5] * 2, torch.float64).cut(3).near(part.a)
    assert torch.equal(nothing.a, part.a.double())
    assert not nothing.b.any()
    elsewhere = whole.cut(3).near(torch.zeros(4, 8))
    assert elsewhere.rank == 4
    torch.testing.assert_close(elsewhere.dense(), whole.dense(), rtol=1e-6, atol=1e-6)


def test_the_nearest_is_found_around_the_directions_that_it_mostly_lies_in():
    parts = drawn(60, 80, 3)
    generator = torch.Generator().manual_seed(0)
    matrix = sum(p.dense() for p in parts)
    matrix += 0.05 * matrix.std() * torch.randn(60, 80, generator=generator)
    around = torch.cat([p.a for p in parts])
    exact = relative_error(nearest(matrix, 3), matrix)
    assert relative_error(nearest(matrix, 3, around), matrix) == pytest.approx(exact, rel=1e-5)
    assert torch.equal(nearest(matrix, 3, around[:1].expand(50, -1)).a, nearest(matrix, 3).a)  # too many


def test_distances_of_equal_matrices_and_of_nothing_are_zero():
    (matrix,) = drawn(9, 7, 3, count=1)
    assert matrix.distance(matrix) < 1e-14 * matrix.norm()
    nothing = LowRank(torch.zeros(9, 0), torch.zeros(0, 7))
    assert nothing.norm() == 0
    assert relative_error(nothing, nothing) == 0
    assert relative_error(matrix, nothing) == math.inf
    assert total([nothing, matrix], [0.5, 0.5]).distance(matrix) == pytest.approx(matrix.norm() / 2)
    assert matrix.cut(3) is matrix
    (wide,) = drawn(5, 4, 9, count=1)
    torch.testing.assert_close(wide.cut(8).dense(), wide.dense())
    assert wide.cut(8).rank == 4


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"B \(3, 2\) and A \(3, 4\)"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="have no sum"):
        total([*drawn(3, 4, 2, count=1), *drawn(4, 3, 2, count=1)], [1, 1])
