"""TIES' two passes in C: bit by bit what PyTorch's operations give, and where those are left to do it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from merge_callback.merging import Ties, Trajectory, census, sparse
from merge_callback.merging.method import Inputs
from merge_callback.merging.task_vectors import TaskVectors
from merge_callback.reduce import compiled, dispatch
from merge_callback.reduce.passes import Cut

BEST = compiled.instructions()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MIXTURE = [FP32, BF16, FP16]
CHUNK = 1 << 16
_OTHERS = [pytest.param(size, marks=pytest.mark.slow) for size in (63, 1000, CHUNK - 1, CHUNK)]
SIZES = [1, 64, 65, 2 * CHUNK + 77, *_OTHERS]
"""Below, at and above a vector's length, and more than a chunk; slow ones on the other side of each bound."""


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda i: f"library {i}")
def instructions(request, monkeypatch):
    """1 is AVX2, or what else an architecture has; 2 is AVX-512."""
    if request.param > BEST:
        pytest.skip("no compiler built the library" if not BEST else "the processor has no AVX-512")
    monkeypatch.setattr(dispatch, "EAGER", False)
    monkeypatch.setattr(compiled, "instructions", lambda: request.param)


def eighths(size, seed, dtype=FP32):
    """Multiples of 1/8 up to 2, of either sign, zeros of either sign among them: many are equal."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(-16, 17, (size,), generator=draw) / 8).mul(-1).to(dtype)


def randn(size, seed, dtype=FP32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def several(count, size, dtypes, make):
    return [make(size, seed, dtypes[seed % len(dtypes)]) for seed in range(count)]


def merged(inputs, method, eager, dtype=FP32):
    out = torch.empty(inputs.tensors[0].numel(), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "EAGER", eager)
        vectors = TaskVectors(inputs)
        assert (dispatch.election(vectors.initial, vectors.others, out) is None) == eager
        method.merge(inputs, out, Trajectory.even(len(inputs.tensors)))
    return out


def tally(theta, initial, low, high):
    return compiled.tally(initial, [theta], [(low, high)], compiled.tally_room(1, len(theta)))[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [eighths, randn], ids=["many ties", "no ties"])
@pytest.mark.parametrize("dtypes", [[FP32], [BF16], MIXTURE], ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("density", [0.2, pytest.param(0.8, marks=pytest.mark.slow), 1.0])
def test_a_merge_has_the_bits_of_pytorchs_operations(size, make, dtypes, density):
    inputs, method = Inputs("w", several(5, size, dtypes, make)), Ties(density=density, scale=0.7)
    assert torch.equal(merged(inputs, method, eager=False), merged(inputs, method, eager=True))


@pytest.mark.parametrize("dtype", MIXTURE, ids=str)
@pytest.mark.parametrize("count", [1, 2, 65])
def test_any_number_of_snapshots_is_cast_once(count, dtype):
    inputs = Inputs("w", several(count, 1000, MIXTURE, randn), base=randn(1000, 99, dtype))
    found, expected = (merged(inputs, Ties(density=0.5), eager, dtype) for eager in (False, True))
    assert torch.equal(found, expected)


def test_infinite_entries_and_nan_end_as_they_do_in_pytorch():
    inf, nan = torch.inf, torch.nan
    thetas = [[inf, inf, nan, 1, -inf, 0, -0.0], [-inf, 1, 2, nan, -inf, nan, -0.0], [1, 1, 1, 1, 1, 1, 0]]
    inputs = Inputs("w", [torch.tensor(t, dtype=FP32) for t in thetas], torch.zeros(7))
    found, expected = (merged(inputs, Ties(density=1.0), eager) for eager in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert 0 < expected.isfinite().sum() < 7


def test_nothing_is_trimmed_if_the_threshold_is_nan():
    spoilt = torch.where(torch.arange(100) % 2 == 0, torch.nan, randn(100, 0))
    inputs = Inputs("w", [torch.zeros(100), randn(100, 1), spoilt])
    found, expected = (merged(inputs, Ties(density=0.2), eager) for eager in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == 50


@pytest.mark.parametrize("end", [0, 1, 63, 64, 65, 150, 200])
def test_equal_magnitudes_are_kept_up_to_an_index(end):
    theta, out = torch.tensor([1.0, -1] * 100), torch.full((200,), 7.0)
    compiled.elect(torch.zeros(200), [theta], out, 1.0, [Cut(0.5, 1.0, end)])
    assert torch.equal(out, torch.where(torch.arange(200) < end, theta, 0))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit_and_a_view_that_begins_anywhere_is_read(threads, monkeypatch):
    size = 3 * (1 << 20) + 5  # 75 MB in all: several threads' worth
    whole = [randn(size + 3, seed) for seed in range(6)]
    tensors, out = [w[3:] for w in whole], torch.empty(size + 3)[3:]
    cuts = [Cut(0.3, 0.5, size // 2)] * 5
    compiled.elect(tensors[0], tensors[1:], expected := torch.empty(size), 1.0, cuts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    compiled.elect(tensors[0], tensors[1:], out, 1.0, cuts)
    assert torch.equal(out, expected)


def test_nothing_beside_the_output_is_written():
    for size in (1, 63, 65, 1000):
        room = torch.full((size + 64,), 7.0)
        compiled.elect(randn(size, 0), [randn(size, 1)], room[:size], 1.0, [Cut(0, 0, 0)])
        assert room[size:].eq(7).all()


def test_autograd_finds_that_the_output_was_written():
    out = torch.zeros(10)
    before = out._version
    compiled.elect(torch.ones(10), [torch.ones(10)], out, 1.0, [Cut(0, 0, 0)])
    assert out._version > before


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("make", [eighths, randn], ids=["many ties", "no ties"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP16, BF16)], ids=str)
def test_magnitudes_are_split_as_by_numpy(size, make, dtypes):
    theta, initial = (make(size, seed, dtype) for seed, dtype in enumerate(dtypes))
    magnitudes = (theta.float() - initial.float()).abs()
    bits = magnitudes.view(torch.int32)
    places = bits.sort().values.tolist() or [0]
    some = [places[len(places) * i // 7] for i in range(7)]
    for low, high in [(0, 2**31 - 1), *pairwise(some), (some[3], some[3]), (some[3], some[5])]:
        found, expected = tally(theta, initial, low, high), census.split(bits, low, high)
        assert found[:3] == expected[:3]
        assert found.between.dtype == np.int32
        assert np.array_equal(found.between, expected.between)
        parts = [census.split(part, low, high).marks for part in bits.split(compiled.MARKED) if len(part)]
        assert np.array_equal(found.marks, np.concatenate([np.empty((0, 3)), *parts]))


def test_nothing_is_written_beyond_the_room():
    room = np.full(200, 7, dtype=np.int32)
    (found,) = compiled.tally(torch.zeros(65), [torch.ones(65)], [(0, 2**31 - 1)], room.reshape(1, -1))
    assert len(found.between) == 65
    assert (room[65 + 64 :] == 7).all()


@pytest.mark.parametrize("dtypes", [[FP32], [BF16], MIXTURE], ids=["fp32", "bf16", "mixed"])
def test_of_several_task_vectors_each_is_counted_by_its_own_bracket(dtypes):
    size = 2 * 2048 + 77  # two portions, a whole group, and a rest
    initial, *others = several(5, size, dtypes, randn)
    brackets = [(low << 20, high << 20) for low, high in [(1000, 1008), (0, 1020), (1010, 1010), (990, 2000)]]
    found = compiled.tally(initial, others, brackets, compiled.tally_room(4, size))
    for theta, bracket, counts in zip(others, brackets, found, strict=True):
        alone = tally(theta, initial, *bracket)
        assert counts[:3] == alone[:3]
        assert np.array_equal(counts.between, alone.between)
        assert np.array_equal(counts.marks, alone.marks)


def test_nan_is_above_all_magnitudes():
    theta = torch.tensor([torch.nan, -torch.nan, torch.inf, 1.0])
    infinity = int(torch.tensor(torch.inf).view(torch.int32))
    assert tally(theta, torch.zeros(4), 0, infinity)[:3] == (2, 1, 0)


def test_tensors_of_several_sizes_are_refused_before_memory_is_read():
    inputs = Inputs("w", [torch.ones(100), torch.ones(90), torch.ones(100)])
    with pytest.raises(RuntimeError, match="size"):
        Ties().merge(inputs, torch.empty(100), Trajectory.even(3))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_what_the_library_does_not_take_is_left_to_pytorch(scope):
    tensors = [randn(1000, seed).double() for seed in range(3)]
    inputs, out = Inputs("w", tensors), torch.empty(1000, dtype=torch.float64)
    assert dispatch.election(tensors[0], tensors[1:], out) is None
    method = Ties(scope=scope)
    method.merge(inputs, out, Trajectory.even(3), method.survey([inputs], Trajectory.even(3)))
    narrow = merged(Inputs("w", [t.float() for t in tensors]), method, eager=False)
    torch.testing.assert_close(out.float(), narrow, rtol=0, atol=4 * 2**-24 * 10)  # four roundings below 10


def test_the_widest_dtype_of_all_tensors_is_searched():
    """One threshold for an fp32 and an fp64 tensor: in fp64, which the library does not count."""
    mixed = {"narrow": TaskVectors(Inputs("narrow", [randn(500, s) for s in range(2)]))}
    mixed["wide"] = TaskVectors(Inputs("wide", [randn(500, s).double() for s in range(2, 4)]))
    found = sparse.kept_of_all(mixed, 0.5)
    steps = [(v.others[0].double() - v.initial.double()).abs() for v in mixed.values()]
    # The narrow one's are differences in fp32.
    steps[0] = (mixed["narrow"].others[0] - mixed["narrow"].initial).abs().double()
    assert found["wide"][0].magnitude == float(torch.cat(steps).sort(descending=True).values[499])
