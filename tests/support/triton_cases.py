"""Triton's kernels against fp64; ``test_triton_kernels`` runs these cases in a process of their own.

They run on a GPU, or under TRITON_INTERPRET=1 on the CPU.

Most sources are multiples of 1/8 between −4 and 4. Their products and sums are multiples of a power of 2 that
fp32 holds without rounding: what is computed has to be equal to fp64, not close.
"""

import os

import pytest
import torch
import triton
import triton.language as tl
from interpreted_triton import round_to_bf16

from merge_callback import merge_state_dicts, reduce
from merge_callback.merging import Ties, Trajectory, census, sparse
from merge_callback.merging.method import Inputs
from merge_callback.merging.task_vectors import TaskVectors
from merge_callback.reduce import blocks, dispatch, triton_kernels, triton_ties
from merge_callback.reduce.passes import Cut
from merge_callback.reduce.triton_sources import elements

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@triton.jit
def store_places(out, shift, block: tl.constexpr):
    tl.store(out + tl.arange(0, block), elements(tl.program_id(0) + shift, block))


MIXTURE = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _the_interpreter_rounds(monkeypatch):
    if INTERPRETED:
        round_to_bf16(monkeypatch)


def eighths(size, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-32, 33, (size,), generator=generator) / 8).to(dtype).to(DEVICE)


def randn(size, seed, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def several(count, size, dtypes, make=eighths):
    return [make(size, i, dtypes[i % len(dtypes)]) for i in range(count)]


def exact_sum(factors, sources):
    """In fp64; what has the factor 0 has no part."""
    terms = [f * s.double() for f, s in zip(factors, sources, strict=True) if f]
    return sum(terms, torch.zeros(len(sources[0]), dtype=torch.float64, device=DEVICE))


def exact_squares(contrast, sources, bounds):
    squares = exact_sum(contrast, sources).square().cpu()
    return torch.stack([part.sum() for part in squares.tensor_split(bounds[:-1])])


# Some of these segments are empty, some share a block of 64, one covers several blocks.
BOUNDS = [0, 1, 1, 5, 64, 64, 70, 128, 400]


@pytest.mark.parametrize(
    ("count", "dtypes"),
    [(1, MIXTURE[:1]), (2, MIXTURE[1:2]), (3, MIXTURE[2:]), (10, MIXTURE), (64, MIXTURE)],
    ids=["1 fp32", "2 bf16", "3 fp16", "10 mixed", "64 mixed"],
)
@pytest.mark.parametrize("out_dtype", MIXTURE, ids=str)
def test_the_merge_and_the_squares_are_those_of_fp64(count, dtypes, out_dtype):
    size, sources = 405, several(count, 405, dtypes)
    weights = [(i % 5 - 2) / 4 for i in range(count - 1)] + [0.25]
    contrast, bounds = [-1.0] + [0.0] * (count - 2) + [1.0] * (count > 1), [*BOUNDS, size]
    out = torch.full((size,), torch.nan, dtype=out_dtype, device=DEVICE)
    squares = triton_kernels.one_pass(sources, weights, out, contrast, bounds, block=64)
    # 64 terms of 0 … 2 in steps of 1/32 take 12 bits, so that the only rounding is the final cast.
    assert torch.equal(out, exact_sum(weights, sources).to(out_dtype))
    assert torch.equal(squares, exact_squares(contrast, sources, bounds))


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 128, 129])
def test_every_tail_is_summed_and_nothing_behind_it_is_written(size):
    sources, room = several(2, size, MIXTURE[:2]), torch.full((size + 64,), 9.0, device=DEVICE)
    squares = triton_kernels.one_pass(sources, [0.5, 2], room[:size], [1, 1], [size], block=64)
    assert torch.equal(room[:size].double(), exact_sum([0.5, 2], sources))
    assert room[size:].eq(9).all()
    assert torch.equal(squares, exact_squares([1, 1], sources, [size]))


@pytest.mark.parametrize("begin", [1, 2, 3, 4, 8])
def test_sources_and_output_may_begin_anywhere(begin):
    whole = [eighths(300, i, dtype) for i, dtype in enumerate(MIXTURE)]
    sources, out = [s[begin:] for s in whole], torch.zeros(300 + begin, device=DEVICE)[2 * begin :]
    squares = triton_kernels.one_pass(sources, [1, 2, 3], out, [1, 1, 1], [9, 300 - begin], block=32)
    assert torch.equal(out.double(), exact_sum([1, 2, 3], sources))
    assert torch.equal(squares, exact_squares([1, 1, 1], sources, [9, 300 - begin]))


def test_random_numbers_are_summed_as_closely_as_by_the_blocked_pass():
    sources, bounds = several(5, 3000, MIXTURE, randn), [1, 1000, 1001, 3000]
    weights, contrast, out = [0.1, 0.2, 0.3, 0.3, 0.1], [-1, 0, 0, 0, 1], torch.empty(3000, device=DEVICE)
    squares = triton_kernels.one_pass(sources, weights, out, contrast, bounds, block=256)
    # Five fp32 products and sums of values below 8: 10 roundings of 2^-24 relative to 8, as in test_reduce.
    torch.testing.assert_close(out.double(), exact_sum(weights, sources), rtol=0, atol=10 * 8 * 2**-24)
    torch.testing.assert_close(squares, exact_squares(contrast, sources, bounds), rtol=1e-6, atol=0)


def test_neither_the_block_nor_a_repetition_changes_a_bit_of_the_merge():
    sources, outs = several(7, 1000, MIXTURE, randn), []
    for block in (32, 256, 1024, 1024):
        outs.append(torch.empty(1000, device=DEVICE))
        triton_kernels.one_pass(sources, [0.1] * 7, outs[-1], block=block)
    assert all(torch.equal(out, outs[0]) for out in outs)
    squares = [
        triton_kernels.one_pass(sources, contrast=[0.3] * 7, bounds=[333, 1000], block=64) for _ in range(3)
    ]
    assert all(torch.equal(found, squares[0]) for found in squares)


def test_what_has_no_part_in_a_sum_may_be_nan():
    ones, nan, inf = (torch.full((100,), value, device=DEVICE) for value in (1.0, torch.nan, torch.inf))
    out = torch.empty(100, device=DEVICE)
    found = triton_kernels.one_pass([ones, nan, inf], [3, 0, 0], out, [1, 0, 0], [100], block=32)
    assert out.eq(3).all()
    assert found.tolist() == [100]
    # One that has a part in the other sum is read; it must not reach this one.
    found = triton_kernels.one_pass([ones, nan], [3, 0], out, [0, 1], [100], block=32)
    assert out.eq(3).all()
    assert found.isnan().all()
    found = triton_kernels.one_pass([ones, nan], [0, 3], out, [1, 0], [100], block=32)
    assert out.isnan().all()
    assert found.tolist() == [100]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("measured", [False, True], ids=["sums", "sums and squares"])
def test_several_sums_have_each_the_bits_that_it_has_alone(count, measured):
    size, sources = 405, several(5, 405, MIXTURE, randn)
    sources[3][:] = torch.nan
    rows = [[0.1 * k, 0.3 - k, 0.0 if k else 2.0, 0.0, 0.7] for k in range(count)]
    contrast, bounds = ([-1.0, 0, 0, 0, 1], [*BOUNDS, size]) if measured else (None, ())
    outs = [torch.full((size + 1,), 9.0, dtype=MIXTURE[k // 9], device=DEVICE)[k % 2 :] for k in range(count)]
    outs = [out[:size] for out in outs]
    squares = triton_kernels.one_pass(sources, rows, outs, contrast, bounds, block=64)
    for row, out in zip(rows, outs, strict=True):
        triton_kernels.one_pass(sources, row, alone := torch.empty_like(out), block=64)
        assert torch.equal(out, alone)
    if measured:
        expected = triton_kernels.one_pass(sources, contrast=contrast, bounds=bounds, block=64)
        assert torch.equal(squares, expected)


def test_nothing_to_sum_is_no_error():
    empty, out = torch.empty(0, device=DEVICE), torch.full((5,), torch.nan, device=DEVICE)
    assert triton_kernels.one_pass([empty], [1.0], empty, [1.0], [0, 0]).tolist() == [0, 0]
    nan = torch.full_like(out, torch.nan)
    assert triton_kernels.one_pass([nan, nan], [0, 0], out, [0, 0], [2, 5]).tolist() == [0, 0]
    assert out.eq(0).all()
    assert triton_kernels.one_pass([out], contrast=[1.0], bounds=[5]).tolist() == [0]


def test_the_sum_of_squares_of_one_tensor_is_a_contrast_of_one():
    source, bounds = eighths(500, 3, torch.bfloat16), [100, 100, 500]
    squares = triton_kernels.one_pass([source], contrast=[1.0], bounds=bounds, block=128)
    assert torch.equal(squares, exact_squares([1.0], [source], bounds))


def test_autograd_learns_that_the_output_was_written():
    live = torch.zeros(5, device=DEVICE)
    before = live._version
    triton_kernels.one_pass([torch.ones_like(live)], [1.0], live)
    assert live._version > before


def test_places_beyond_32_bits_are_computed_in_64():
    """The indices of one far tile, as every kernel computes them; no tensor of 8 GB is needed."""
    out, tile, block = torch.empty(1024, dtype=torch.int64, device=DEVICE), 2**31 - 1, 1024
    store_places[(1,)](out, tile, block)
    assert out.tolist() == list(range(tile * block, tile * block + block))


@compiled_only
def test_more_than_2_to_the_31_elements_are_reached():
    size, begin = 2**31 + 1001, 2**31 - 2001
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB on the device")
    sources = [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    out = torch.empty_like(sources[0])
    sources[0][begin:], sources[1][begin:] = 1, 3
    squares = triton_kernels.one_pass(sources, [0.5, 0.5], out, [-1, 1], [begin, size])
    assert squares.tolist() == [0, 4 * (size - begin)]
    assert (out[begin:] == 2).all()
    assert not out[:begin].any()
    triton_ties.elect(sources[0], sources[1:], out, 1.0, [Cut(1.0, 3.0, size - 1)])
    assert (out[begin : size - 1] == 3).all()
    assert out[-1] == 1


# TIES.


def ties_by_blocks(method, inputs):
    """What PyTorch's operations give on the CPU, and what each task vector keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "EAGER", True)
        return _ties_by_blocks(method, inputs)


def _ties_by_blocks(method, inputs):
    own = Inputs("w", [t.cpu() for t in inputs.tensors], None if inputs.base is None else inputs.base.cpu())
    kept = sparse.kept_of_all({"w": TaskVectors(own)}, method.density)
    out = torch.empty(len(own.tensors[0]))
    method.merge(own, out, Trajectory.even(len(own.tensors)), kept)
    return out, kept["w"]


def ties_in_one_launch(method, inputs, kept, dtype=torch.float32):
    vectors = TaskVectors(inputs)
    out = torch.empty(vectors.size, dtype=dtype, device=DEVICE)
    cuts = [Cut(*sparse._largest(k.magnitude, torch.float32), k.end) for k in kept]
    triton_ties.elect(vectors.initial, vectors.others, out, method.scale, cuts, block=64)
    return out


@pytest.mark.parametrize("make", [eighths, randn], ids=["many ties", "no ties"])
@pytest.mark.parametrize("density", [0.2, 0.8, 1.0])
@pytest.mark.parametrize(
    ("count", "dtypes"), [(2, MIXTURE[:1]), (4, MIXTURE[1:2]), (10, MIXTURE)], ids=["fp32", "bf16", "mixed"]
)
def test_the_election_is_bitwise_that_of_the_blocks(count, dtypes, density, make):
    method = Ties(density=density, scale=0.7)
    tensors = several(count, 333, dtypes, make)
    base = make(333, 99) if count == 4 else None
    expected, kept = ties_by_blocks(method, Inputs("w", tensors, base))
    assert torch.equal(ties_in_one_launch(method, Inputs("w", tensors, base), kept).cpu(), expected)


def test_equal_magnitudes_are_kept_up_to_an_index():
    """Every entry is ±1 of them; the first 7 of 10 are kept, across blocks and with either sign."""
    theta = torch.tensor([1.0, -1] * 50, device=DEVICE)
    inputs = Inputs("w", [torch.zeros_like(theta), theta])
    expected, kept = ties_by_blocks(Ties(density=0.7), inputs)
    out = ties_in_one_launch(Ties(density=0.7), inputs, kept).cpu()
    assert torch.equal(out, expected)
    assert torch.equal(out, torch.where(torch.arange(100) < 70, theta.cpu(), 0))


def test_infinite_entries_and_nan_end_as_they_do_in_blocks():
    inf, nan = torch.inf, torch.nan
    thetas = [[inf, inf, nan, 1, -inf, 0], [-inf, 1, 2, nan, -inf, nan], [1, 1, 1, 1, 1, 1]]
    tensors = [torch.tensor(t, dtype=torch.float32, device=DEVICE) for t in thetas]
    inputs = Inputs("w", tensors, torch.zeros(6, device=DEVICE))
    expected, kept = ties_by_blocks(Ties(density=1.0), inputs)
    out = ties_in_one_launch(Ties(density=1.0), inputs, kept).cpu()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isfinite().sum() < 6


def test_sixty_four_task_vectors_are_elected_and_cast_once():
    method, inputs = Ties(density=0.5), Inputs("w", several(65, 100, MIXTURE))
    expected, kept = ties_by_blocks(method, inputs)
    out = ties_in_one_launch(method, inputs, kept, torch.bfloat16)
    assert torch.equal(out.cpu(), expected.bfloat16())


def test_without_a_task_vector_the_merge_is_the_initial_model():
    initial, out = eighths(100, 0), torch.empty(100, dtype=torch.float16, device=DEVICE)
    triton_ties.elect(initial, [], out, 1.0, [], block=64)
    assert torch.equal(out.float(), initial)


# All of it behind the methods.


@pytest.fixture
def _kernels_serve_the_cpu(monkeypatch):
    """Under the interpreter; on a GPU they serve it anyway."""
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "triton_serves", lambda *t: all(x.dtype in dispatch.NARROW for x in t))
        monkeypatch.setattr(census, "compiled_serves", lambda *t: False)


def model(seed, dtype):
    return {
        "a": eighths(2000, seed, dtype).view(40, 50),
        "b": eighths(33, seed + 100, dtype),
        "c": eighths(0, 0),
    }


@pytest.mark.usefixtures("_kernels_serve_the_cpu")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sma", {}),
        ("slerp", {}),
        ("slerp", {"scope": "global"}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "scope": "global"}),
        ("task_arithmetic", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_methods_give_what_they_give_without_the_kernels(method, options, dtype, monkeypatch):
    models = [model(seed, dtype) for seed in range(4)]
    merged = merge_state_dicts(models, method, **options)
    monkeypatch.setattr(dispatch, "triton_serves", lambda *t: False)
    expected = merge_state_dicts([{k: t.cpu() for k, t in m.items()} for m in models], method, **options)
    # An ulp of the merge: fused products may round a sum of four otherwise, which a cast can bring to light.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    for name, tensor in expected.items():
        if method == "ties":
            assert torch.equal(merged[name].cpu(), tensor)
        torch.testing.assert_close(merged[name].cpu(), tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("_kernels_serve_the_cpu")
def test_the_kernels_are_what_the_methods_call(monkeypatch):
    called = []
    for module, name in ((triton_kernels, "one_pass"), (triton_ties, "elect")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    for method in ("sma", "ties"):
        merge_state_dicts([{"w": eighths(500, seed)} for seed in range(3)], method)
    assert set(called) == {"one_pass", "elect"}


@compiled_only
@pytest.mark.parametrize("dtypes", [MIXTURE[:1], MIXTURE[1:2], MIXTURE], ids=["fp32", "bf16", "mixed"])
def test_large_tensors_merge_as_they_do_in_blocks_on_the_same_device(dtypes):
    size, bounds = 3 * blocks.BLOCK + 77, [1, 12345, blocks.BLOCK, 3 * blocks.BLOCK + 77]
    sources, weights, contrast = several(10, size, dtypes, randn), [0.1] * 10, [-1, *[0] * 8, 1]
    ours, theirs = torch.empty(size, device=DEVICE), torch.empty(size, device=DEVICE)
    squares = reduce.one_pass(sources, weights, ours, contrast, bounds)
    expected = blocks.one_pass(sources, weights, theirs, contrast, bounds)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # ten roundings of values below 1
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)
