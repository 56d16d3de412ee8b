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
