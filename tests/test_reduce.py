"""The one pass under all merges: against fp64 references, over block and segment boundaries."""

import pytest
import torch

from merge_callback.reduce import one_pass
from merge_callback.reduce.blocks import BLOCK

SIZES = [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 12345]


def randn(size, seed, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_sum_matches_fp64(size, dtype):
    sources, weights = [randn(size, i, dtype) for i in range(4)], [0.1, 0.2, 0.3, 0.4]
    out = torch.empty(size)
    one_pass(sources, weights, out)
    exact = sum(w * s.double() for w, s in zip(weights, sources, strict=True))
    # Four fp32 products and sums of values below 8: at most 8 roundings of 2^-24 relative to 8.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * 8 * 2**-24)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_squares_by_segment_match_fp64(size, dtype):
    a, b = randn(size, 1).to(dtype), randn(size, 2).to(dtype)
    bounds = sorted({1, size // 3, size // 2, min(size, BLOCK), size} - {0})
    squares = one_pass([a, b], contrast=[-1, 1], bounds=bounds)
    difference = (a.double() - b.double()).square()
    exact = torch.stack([s.sum() for s in difference.tensor_split(bounds[:-1])])
    # fp32 differences (half an ulp each) summed: relative error of a sum of positives stays below 1e-6.
    torch.testing.assert_close(squares, exact, rtol=1e-6, atol=0)


def test_merge_and_distance_together_are_bitwise_the_two_alone():
    size, weights = 2 * BLOCK + 7, [0.2, 0.3, 0.5]
    sources, bounds = [randn(size, i) for i in range(3)], [5, BLOCK, BLOCK + 1, size]
    alone, together = torch.empty(size), torch.empty(size)
    one_pass(sources, weights, alone)
    squares = one_pass(sources, weights, together, [-1, 0, 1], bounds)
    assert torch.equal(alone, together)
    assert torch.equal(squares, one_pass([sources[2], sources[0]], contrast=[-1, 1], bounds=bounds))


def test_the_merge_does_not_depend_on_the_block(monkeypatch):
    sources, weights, outs = [randn(5000, i) for i in range(3)], [0.5, 0.25, 0.25], []
    for block in (64, 1000, 1 << 19):
        monkeypatch.setattr("merge_callback.reduce.blocks.BLOCK", block)
        outs.append(torch.empty(5000))
        one_pass(sources, weights, outs[-1])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_empty_segments_count_nothing():
    a, b = torch.ones(4), torch.zeros(4)
    assert one_pass([a, b], contrast=[-1, 1], bounds=[0, 2, 2, 4]).tolist() == [0, 2, 0, 2]


def test_nothing_to_sum_is_no_error():
    out = torch.empty(0)
    squares = one_pass([out, out], [0.5, 0.5], out, [-1, 1], [0])
    assert squares.tolist() == [0]


def test_the_output_is_cast_once():
    sources = [torch.full((3,), 1.0), torch.full((3,), 2**-9)]
    out = torch.empty(3, dtype=torch.bfloat16)
    one_pass(sources, [1.0, 1.0], out)
    assert torch.equal(out, torch.full((3,), 1 + 2**-9).bfloat16())


def test_sources_of_several_dtypes_are_summed_in_the_widest():
    size = BLOCK + 5
    sources = [randn(size, 0), randn(size, 1, torch.bfloat16), randn(size, 2, torch.float16)]
    out, exact = torch.empty(size), sources[0].double() + 2 * sources[1].double() - sources[2].double()
    squares = one_pass(sources, [1, 2, -1], out, [1, 2, -1], [size])
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=6 * 16 * 2**-24)  # as above, values below 16
    torch.testing.assert_close(squares, exact.square().sum(0, keepdim=True), rtol=1e-6, atol=0)
    wide = torch.empty(size, dtype=torch.float64)
    one_pass([*sources, randn(size, 3, torch.float64)], [1, 2, -1, 0], wide)
    assert torch.equal(wide, exact)


def test_what_has_no_part_in_the_contrast_may_be_nan():
    sources = [torch.ones(3), torch.full((3,), torch.nan), torch.zeros(3)]
    assert one_pass(sources, contrast=[-1, 0, 1], bounds=[3]).tolist() == [3]
