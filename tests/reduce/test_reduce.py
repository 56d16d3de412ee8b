"""The one pass under all merges: against fp64 references, over block and segment boundaries.

Every test runs with PyTorch's own operations and with the compiled library, in each instruction set that the
processor has; those of what is the library's alone follow at the end.
"""

import platform
import threading
from types import SimpleNamespace

import pytest
import torch

from merge_callback.reduce import blocks, compiled, dispatch, one_pass
from merge_callback.reduce.blocks import BLOCK

_OTHERS = [pytest.param(size, marks=pytest.mark.slow) for size in (3, BLOCK - 1, BLOCK + 1)]
SIZES = [1, BLOCK, 2 * BLOCK + 12345, *_OTHERS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BEST = compiled.instructions()

# 1 is AVX2, or what else an architecture has; 2 is AVX-512.
library = [pytest.param(1, id="library 1"), pytest.param(2, id="library 2")]
on_library = pytest.mark.parametrize("backend", library, indirect=True)


@pytest.fixture(autouse=True, params=[pytest.param(0, id="eager"), *library])
def backend(request, monkeypatch):
    """What one_pass is made with: PyTorch's operations, or the library with some instructions."""
    if request.param > BEST:
        pytest.skip("no compiler built the library" if not BEST else "the processor has no AVX-512")
    monkeypatch.setattr(dispatch, "EAGER", not request.param)
    monkeypatch.setattr(compiled, "instructions", lambda: request.param)


def randn(size, seed, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("measured", [False, True])
def test_several_sums_have_each_the_bits_that_it_has_alone(count, measured):
    size = 70_001 if BEST else 12_345
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    sources = [randn(size, i, kinds[i % 3]) for i in range(7)]
    sources[5][::7] = torch.nan
    rows = [randn(7, 100 + k).tolist() for k in range(count)]
    for k, row in enumerate(rows):
        row[5] = 0.0  # its NaN is to reach no sum
        row[k % 5] = 0.0
    rows[-1] = [0.0] * 7
    contrast, bounds = ([-1.0, 0, 0, 1, 0, 0, 0], [5, 5, 4097, size]) if measured else (None, ())
    outs = [torch.full((size,), torch.nan, dtype=kinds[k % 3]) for k in range(count)]
    squares = one_pass(sources, rows, outs, contrast, bounds)
    for row, out in zip(rows, outs, strict=True):
        one_pass(sources, row, alone := torch.empty_like(out))
        assert torch.equal(out.view(torch.int8), alone.view(torch.int8))
    if measured:
        assert torch.equal(squares, one_pass(sources, contrast=contrast, bounds=bounds))
    else:
        assert squares is None


def test_several_sums_of_fp64_and_of_nothing():
    sources = [randn(99, i, torch.float64) for i in range(3)]
    one_pass(
        sources, [[1, 2, 3], [0, 0, 1]], outs := [torch.empty(99, dtype=torch.float64) for _ in range(2)]
    )
    torch.testing.assert_close(outs[0], sources[0] + 2 * sources[1] + 3 * sources[2])
    assert torch.equal(outs[1], sources[2])
    one_pass([torch.empty(0)], [[1.0], [2.0]], [torch.empty(0), torch.empty(0)])


def test_rows_that_do_not_fit_are_refused():
    sources, out = [torch.ones(4), torch.ones(4)], torch.empty(4)
    with pytest.raises(ValueError, match="weights: 2 rows for 1 outputs; give one for each"):
        one_pass(sources, [[1, 2], [3, 4]], [out])
    with pytest.raises(ValueError, match="weights: 1 factors for 2 sources"):
        one_pass(sources, [[1, 2], [3]], [out, out.clone()])
    with pytest.raises(ValueError, match="equal numbers of elements, got 3 and 4"):
        one_pass(sources, [[1, 2], [3, 4]], [out, torch.empty(3)])


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


@pytest.mark.parametrize("backend", [0], indirect=True)
def test_the_merge_does_not_depend_on_the_block(monkeypatch):
    sources, weights, outs = [randn(5000, i) for i in range(3)], [0.5, 0.3, 0.2], []
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


def test_nothing_has_a_part_in_the_sum():
    out = torch.full((70,), 5.0)
    squares = one_pass([torch.full((70,), torch.nan)], [0.0], out, [0.0], [70])
    assert torch.equal(out, torch.zeros(70))
    assert squares.tolist() == [0]
    assert not out.signbit().any()


@pytest.mark.parametrize("size", [64, 70])
def test_a_product_of_minus_zero_keeps_its_sign(size):
    out = torch.empty(size)
    one_pass([torch.full((size,), -0.0)], [1.0], out)
    assert out.signbit().all()


def test_neighbours_of_the_output_are_not_touched():
    for dtype in DTYPES:
        for first, size in ((0, 5), (1, 64), (3, 200), (13, 4096 + 63)):
            room = torch.full((size + 32,), 7.0, dtype=dtype)
            one_pass([torch.ones(size)] * 2, [1.0, 1.0], room[first : first + size])
            assert room[first : first + size].eq(2).all()
            assert room[:first].eq(7).all()
            assert room[first + size :].eq(7).all()


def test_sources_that_are_no_plain_memory_are_summed_all_the_same():
    every_other, transposed = torch.arange(10.0)[::2], torch.arange(6.0).view(2, 3).T.reshape(-1)[:5]
    out = torch.empty(5)
    one_pass([every_other, transposed], [1.0, 1.0], out)
    assert torch.equal(out, every_other + transposed)
    one_pass([torch.ones(5), torch.ones(5)], [1.0, 1.0], strided := torch.zeros(10)[::2])
    assert strided.eq(2).all()


def test_inference_tensors_and_parameters_are_read_and_written():
    with torch.inference_mode():
        source = torch.ones(5)
    out = torch.nn.Parameter(torch.zeros(5))
    one_pass([source, torch.ones(5, requires_grad=True)], [1.0, 1.0], out.data)
    assert out.eq(2).all()
    with torch.inference_mode():
        one_pass([source, source], [1.0, 1.0], inside := torch.empty(5), [1, 0], [5])
    assert inside.eq(2).all()


def test_autograd_sees_that_the_output_was_overwritten():
    out = torch.ones(3)
    loss = (out * torch.ones(3, requires_grad=True)).sum()
    one_pass([torch.zeros(3)], [1.0], out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"sources": [torch.ones(4), torch.ones(3)]}, "got 3 and 4"),
        ({"out": torch.ones(3)}, "got 3 and 4"),
        ({"weights": [1.0]}, "weights: 1 factors for 2 sources"),
        ({"contrast": [1.0] * 3}, "contrast: 3 factors for 2 sources"),
        ({"bounds": [2, 3]}, r"bounds=\[2, 3\] must ascend"),
        ({"bounds": [3, 2, 4]}, "must ascend from 0 to the 4 elements"),
        ({"bounds": [-1, 4]}, "must ascend"),
        ({"bounds": []}, "must ascend"),
    ],
)
def test_what_does_not_fit_is_refused(others, message):
    given = {"sources": [torch.ones(4)] * 2, "weights": [1, 1], "out": torch.ones(4), "contrast": [1, -1]}
    with pytest.raises(ValueError, match=message):
        one_pass(**{**given, "bounds": [4], **others})


# What is the library's alone.


def bits(tensor):
    """The bits of a tensor, all NaNs being one: which one a cast makes is the instruction's choice."""
    kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    return torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor).view(kind)


def assert_bits_of_eager(sources, weights, out_dtype=torch.float32):
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch adds without fused multiply-adds here")
    own, eager = (torch.empty(sources[0].numel(), dtype=out_dtype) for _ in range(2))
    one_pass(sources, weights, own)
    blocks.one_pass(sources, weights, eager, None, ())
    assert torch.equal(bits(own), bits(eager))


@on_library
@pytest.mark.parametrize(
    "size",
    [
        *(0, 1, 16, 63, 65, 3 * 65536 + 100),
        *(pytest.param(size, marks=pytest.mark.slow) for size in (15, 64, 4095, 4097, 65535)),
    ],
)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_the_sum_has_the_bits_of_pytorch(size, out_dtype):
    for dtype in DTYPES:
        sources = [randn(size, i, dtype) for i in range(3)]
        assert_bits_of_eager(sources, [0.1, 0.7, -0.3], out_dtype)


@on_library
@pytest.mark.parametrize("count", [1, 2, 5, 64, 100])
def test_the_sum_has_the_bits_of_pytorch_for_any_number_and_mixture_of_sources(count):
    sources = [randn(1000 + 7, i, DTYPES[i % 3]) for i in range(count)]
    assert_bits_of_eager(sources, [(i % 7 - 3) / count for i in range(count)])


@on_library
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_the_sum_has_the_bits_of_pytorch_wherever_its_memory_lies(out_dtype):
    room = [randn(700, i, dtype) for i, dtype in enumerate(DTYPES)]
    for first in range(9):
        assert_bits_of_eager(
            [t[first + i : first + i + 600] for i, t in enumerate(room)], [1, 2, 3], out_dtype
        )


@on_library
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_ties_overflow_denormals_and_nan_are_cast_as_in_pytorch(out_dtype):
    """Every upper half of an fp32 number, with lower ones at, near and half way between those of bf16."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    patterns = (upper[:, None] | lower).view(-1).view(torch.float32)
    halfway = torch.tensor([65519.99, 65520.0, -65520.0, 2**-25, 1.5 * 2**-24, 2**-24 + 2**-26, 1e-45])
    assert_bits_of_eager([torch.cat([patterns, halfway])], [1.0], out_dtype)


@on_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_widened_exactly(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    one_pass([every], [1.0], out := torch.empty(1 << 16))
    assert torch.equal(bits(out), bits(every.float()))


@on_library
def test_infinities_and_nan_go_where_they_are():
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 3e38, 1e-45])
    first, second = specials.repeat_interleave(6), specials.repeat(6)
    assert_bits_of_eager([first, second], [2.0, 1.0])
    assert_bits_of_eager([first, second], [2.0, -2.0], torch.float16)
    squares = one_pass([first, second], contrast=[1, -1], bounds=[21, 22, 36])
    assert squares.isnan().tolist() == [True, False, True]  # element 21 is 1 − 1
    assert squares[1] == 0


@on_library
def test_more_than_a_cache_of_output_is_written_as_well():
    """Beyond 8 MiB by stores past the caches, where the address allows it."""
    size = (9 << 20) // 2
    sources, weights = [randn(size + 1, i, torch.bfloat16) for i in range(2)], [0.3, 0.7]
    for dtype in DTYPES:
        for first in (0, 1):
            out, small = torch.empty(size + 1, dtype=dtype)[first:], torch.empty(1000, dtype=dtype)
            one_pass([s[first:] for s in sources], weights, out)
            blocks.one_pass(sources, weights, eager := torch.empty(size + 1, dtype=dtype), None, ())
            assert torch.equal(out, eager[first:])
            one_pass([s[-1000:] for s in sources], weights, small)
            assert torch.equal(out[-1000:], small)


@on_library
def test_squares_are_exact_but_for_the_fp32_contrast():
    size = 3 * 65536 + 11
    sources, bounds = [randn(size, i) for i in range(3)], [1, 1, 70000, 131072, 131073, 150000, size]
    squares = one_pass(sources, contrast=[1.0, -1.0, 0.5], bounds=bounds)
    one_pass(sources, [1.0, -1.0, 0.5], contrast := torch.empty(size))
    exact = torch.stack([s.sum() for s in contrast.double().square().tensor_split(bounds[:-1])])
    # Sums of up to 2^17 positive fp64 numbers in 32 lanes: 2^12 roundings of 2^-53 in a row, at most.
    torch.testing.assert_close(squares, exact, rtol=2**-40, atol=0)


@on_library
def test_segments_may_end_anywhere():
    difference = torch.arange(1.0, 9001.0)
    zeros = torch.zeros_like(difference)
    exact = difference.double().square().cumsum(0)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 10, 8000):
        cuts = torch.randint(0, 9001, (count,), generator=generator).sort().values
        bounds = [*cuts.tolist(), 9000, 9000]
        squares = one_pass([difference, zeros], contrast=[1, -1], bounds=bounds)
        ends = torch.cat([torch.zeros(1, dtype=torch.float64), exact])[bounds]
        assert torch.equal(squares, ends.diff(prepend=torch.zeros(1)))  # whole numbers below 2^53: exact


@on_library
def test_a_segment_of_its_own_tensor_counts_the_same_from_wherever_it_is_read():
    source = randn(40000, 0)
    moved = torch.cat([torch.zeros(3), source])[3:]
    alone, again = (one_pass([s], contrast=[1.0], bounds=[40000]) for s in (source, moved))
    assert torch.equal(alone, again)


@on_library
def test_the_output_may_be_one_of_the_sources():
    sources = [randn(10007, i) for i in range(3)]
    one_pass(sources, [0.2, 0.3, 0.5], apart := torch.empty(10007), [1, -1, 0], [10007])
    one_pass(sources, [0.2, 0.3, 0.5], sources[1])
    assert torch.equal(sources[1], apart)


@on_library
def test_bytes_need_not_be_aligned():
    memory = bytearray(4 * 1000 + 1)
    source = torch.frombuffer(memory, dtype=torch.float32, offset=1)
    source.copy_(randn(1000, 0))
    one_pass([source], [1.0], out := torch.empty(1000), [1.0], [1000])
    assert torch.equal(out, source)


@on_library
def test_the_number_of_threads_changes_no_bit():
    size = 5 * (1 << 20) + 77
    sources, bounds = [randn(size, i) for i in range(3)], [9, size // 3, size // 3, size - 1, size]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.empty(size)
            results.append((out, one_pass(sources, [0.3, 0.3, 0.4], out, [1.0, 0.5, -1.5], bounds)))
    finally:
        torch.set_num_threads(before)
    for out, squares in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(squares, results[0][1])


@on_library
def test_many_threads_may_call_at_once():
    sources = [randn(1 << 20, i) for i in range(3)]
    outs, squares = [torch.empty(1 << 20) for _ in range(6)], [None] * 6

    def call(i):
        squares[i] = one_pass(sources, [0.2, 0.3, 0.5], outs[i], [1, 0, -1], [5, 1 << 20])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(square, squares[0]) for square in squares)


@on_library
def test_all_instructions_give_the_same_bits(monkeypatch):
    sources, results = [randn(200_001, i) for i in range(4)], []
    for instructions in range(1, BEST + 1):
        monkeypatch.setattr(compiled, "instructions", lambda chosen=instructions: chosen)
        out = torch.empty(200_001, dtype=torch.bfloat16)
        squares = one_pass(sources, [0.1, 0.2, 0.3, 0.4], out, [1, -1, 1, -1], [77, 200_001])
        results.append((out, squares))
    for out, squares in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(squares, results[0][1])


@pytest.mark.parametrize("origin", ["own", "libm.so.6"])
def test_a_library_of_another_version_is_named_and_left_alone(monkeypatch, origin):
    """As an editable installation has it after an update of the sources; one without the functions, too."""
    if origin == "own" and not BEST:
        pytest.skip("no compiler built the library")
    monkeypatch.setattr(compiled, "_VERSION", -1)
    if origin != "own":
        found = SimpleNamespace(origin=origin)
        monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: found)
    with pytest.warns(UserWarning, match=r"\.so.* was built from another version .* install it again"):
        assert compiled._library.__wrapped__() is None


def test_without_the_library_pytorch_does_it(monkeypatch):
    monkeypatch.setattr(compiled, "instructions", lambda: 0)
    monkeypatch.setattr(dispatch, "EAGER", False)
    one_pass([torch.ones(5)], [2.0], out := torch.empty(5))
    assert out.eq(2).all()
