"""The k-th largest magnitude against sorting everything."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from merge_callback.merging import census, threshold
from merge_callback.merging.census import Part
from merge_callback.merging.method import Inputs
from merge_callback.merging.sparse import kept_of_all
from merge_callback.merging.task_vectors import TaskVectors
from merge_callback.merging.threshold import Threshold, alone, search_kth_largest, search_tie_ends
from merge_callback.reduce import ranges

FP32, BF16 = torch.float32, torch.bfloat16


def kth_largest(parts, k):
    return alone(search_kth_largest(parts, k))


def tie_ends(parts, threshold):
    return alone(search_tie_ends(parts, threshold))


def part(vector, block=1000):
    """A part whose blocks are copies that the reader may spoil."""

    def blocks(start, stop):
        return (vector[i : min(i + block, stop)].clone() for i in range(start, stop, block))

    return Part(len(vector), vector.dtype, vector.device, blocks)


def by_sorting(vector, k):
    """The definition: order by magnitude, equal ones by index; take the first k."""
    magnitudes = vector.abs()
    order = torch.sort(magnitudes, descending=True, stable=True).indices
    kth = magnitudes[order[k - 1]].item()
    return Threshold(kth, int((magnitudes[order[:k]] == kth).sum()), int((magnitudes == kth).sum()))


def random(n, seed, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


VECTORS = {
    "normal": lambda n, seed: random(n, seed),
    "fp64": lambda n, seed: random(n, seed, torch.float64),
    "32 magnitudes": lambda n, seed: (random(n, seed) * 8).round(),
    "mostly zeros": lambda n, seed: random(n, seed).clamp(min=1.5) - 1.5,
    "all equal": lambda n, seed: torch.full((n,), -3.5),
    "all zero": lambda n, seed: torch.zeros(n, dtype=torch.float64),
    "differences of bf16": lambda n, seed: (
        (a := random(n, seed).bfloat16()).float() - (a + random(n, seed + 1) / 64).bfloat16().float()
    ),
    "all orders of magnitude": lambda n, seed: (
        random(n, seed) * 10 ** (30 * random(n, seed + 1)).clamp(-44, 38)
    ),
    "subnormal": lambda n, seed: random(n, seed) * 1e-41,
    "ascending": lambda n, seed: torch.arange(n, dtype=torch.float32),
}


@pytest.mark.parametrize("sample", [1 << 16, 64], ids=["wholly sampled", "barely sampled"])
@pytest.mark.parametrize("build", VECTORS.values(), ids=VECTORS)
def test_the_threshold_and_its_ties_are_those_of_a_stable_sort(build, sample, monkeypatch):
    monkeypatch.setattr(threshold, "_SAMPLE", sample)
    monkeypatch.setattr(threshold, "_RUN", 4)
    for n in (1, 2, 3, 10, 9876):
        vector = build(n, n)
        for k in {1, 2, n // 5, n // 2, int(0.8 * n), n - 1, n}:
            if 1 <= k <= n:
                assert kth_largest([part(vector)], k) == by_sorting(vector, k)


@pytest.mark.parametrize("picked", [50, 200, 1 << 20])
@pytest.mark.parametrize("build", VECTORS.values(), ids=VECTORS)
def test_however_few_elements_a_pass_may_hold_the_result_is_exact(build, picked, monkeypatch):
    monkeypatch.setattr(census, "_PICKED", picked)
    monkeypatch.setattr(threshold, "_SAMPLE", 128)
    monkeypatch.setattr(threshold, "_RUN", 4)
    vector = build(3000, 3)
    for k in (1, 600, 2400, 3000):
        assert kth_largest([part(vector, 100)], k) == by_sorting(vector, k)


def test_a_sample_that_misleads_costs_a_pass_but_not_the_result(monkeypatch):
    """The sampled runs hold nothing but zeros, all the rest nothing but large numbers."""
    monkeypatch.setattr(threshold, "_SAMPLE", 1000)
    monkeypatch.setattr(threshold, "_RUN", 10)
    vector = random(20_000, 0) + 10
    vector.view(-1, 200)[:, :10] = 0
    passes = []
    count_pass = census.count_pass
    monkeypatch.setattr(census, "count_pass", lambda *a: passes.append(a) or count_pass(*a))
    assert kth_largest([part(vector)], 10_000) == by_sorting(vector, 10_000)
    ((first,),) = passes[0]
    assert first.high == 0  # the highest bits it believed in: those of zero
    assert len(passes) == 2


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (torch.float64, BF16)], ids=str)
@pytest.mark.parametrize("size", [1, 511, 512, 513, 20_000, 20_480, 20_481])
@pytest.mark.parametrize("first", [0, 300])
def test_a_sample_that_is_read_at_once_is_that_of_single_runs(first, size, dtypes):
    theta, initial = (random(size, seed).to(dtype) for seed, dtype in enumerate(dtypes))
    own = TaskVectors(Inputs("w", [theta], initial))
    if starts := range(first, size, 2048):
        runs = [block.clone() for at in starts for block in own.blocks(0, at, min(at + 512, size))]
        found = torch.cat(list(own.sample(0, starts, 512)))
        assert found.dtype == own.dtype
        assert torch.equal(found, torch.cat(runs))


@pytest.mark.parametrize("kind", ["normal", "fp64", "all orders of magnitude", "ascending"])
def test_of_many_elements_between_the_brackets_only_some_are_ordered(kind, monkeypatch):
    """With a small sample there are 46,000 of 2^18 between the brackets; what is ordered are two samples."""
    monkeypatch.setattr(threshold, "_SAMPLE", 64)
    monkeypatch.setattr(threshold, "_RUN", 4)
    guesses, guess = [], threshold._guess
    monkeypatch.setattr(threshold, "_guess", lambda *a: guesses.append(a[2]) or guess(*a))
    vector = VECTORS[kind](1 << 18, 1)
    assert kth_largest([part(vector, 1 << 15)], 200_000) == by_sorting(vector, 200_000)
    assert guesses[0] == 1 << 18
    assert 1 << 15 <= guesses[-1] < 1 << 17


@pytest.mark.parametrize("rank", [1, 100, 50_000, 1 << 16])
@pytest.mark.parametrize("spoilt", [0, 1 << 20], ids=["too small", "too large"])
def test_a_sample_of_them_that_misleads_does_not_change_the_result(spoilt, rank):
    values = np.arange(1 << 16, dtype=np.int32)
    values[::16] = spoilt  # each one of the sample
    ordered = np.sort(values)[::-1]
    larger = int(np.count_nonzero(values > ordered[rank - 1]))
    assert threshold._ranked(values.copy(), rank) == (ordered[rank - 1], rank - larger)


def test_vectors_with_one_beginning_are_counted_in_one_pass(monkeypatch):
    passes = []
    count_pass = census.count_pass
    monkeypatch.setattr(census, "count_pass", lambda all: passes.append(len(all)) or count_pass(all))
    tensors = [random(20_000, seed) for seed in range(5)]
    found = kept_of_all({"w": TaskVectors(Inputs("w", tensors))}, 0.8)["w"]
    assert passes == [4]
    exact = [by_sorting(tensor - tensors[0], 16_000).magnitude for tensor in tensors[1:]]
    assert [kept.magnitude for kept in found] == exact


def test_ties_that_the_search_counted_are_not_counted_again():
    """All elements are equal, and counted block by block: only the block with the last one is read again."""
    reads = []

    def blocks(start, stop):
        reads.append((start, stop))
        return (torch.full((min(i + 100, stop) - i,), 2.0) for i in range(start, stop, 100))

    whole = Part(10_000, torch.float32, torch.device("cpu"), blocks)
    found = kth_largest([whole], 6543)
    reads.clear()
    assert list(tie_ends([whole], found)) == [6543]
    assert reads == [(6500, 6600)]


def test_one_pass_is_enough_for_a_normal_vector(monkeypatch):
    passes = []
    count_pass = census.count_pass
    monkeypatch.setattr(census, "count_pass", lambda *a: passes.append(a) or count_pass(*a))
    vector = random(1 << 22, 0)
    found = kth_largest([part(vector, 1 << 15)], 3 << 20)
    assert found.magnitude == vector.abs().kthvalue((1 << 20) + 1).values.item()
    assert len(passes) == 1


@pytest.mark.parametrize("build", VECTORS.values(), ids=VECTORS)
def test_several_parts_have_the_threshold_of_all_their_elements(build, monkeypatch):
    monkeypatch.setattr(threshold, "_SAMPLE", 500)
    whole = build(9000, 5)
    pieces = whole.split([1, 0, 4000, 37, 4962])
    for k in (1, 1800, 7200, 9000):
        assert kth_largest(map_parts(pieces), k) == by_sorting(whole, k)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 150, 300, 377])
def test_of_equal_magnitudes_the_lower_indices_are_kept(k, block):
    whole = (random(400, 2) * 2).round()
    pieces = whole.split([100, 0, 50, 250])
    found = kth_largest(map_parts(pieces, block), k)
    kept = torch.cat(
        [
            (piece.abs() > found.magnitude)
            | ((piece.abs() == found.magnitude) & (torch.arange(len(piece)) < end))
            for piece, end in zip(pieces, tie_ends(map_parts(pieces, block), found), strict=True)
        ]
    )
    order = torch.sort(whole.abs(), descending=True, stable=True).indices
    assert kept.nonzero().flatten().tolist() == sorted(order[:k].tolist())


def test_nothing_is_read_for_ties_that_are_all_kept():
    def unread(start, stop):
        raise AssertionError("read")

    parts = [Part(5, torch.float32, torch.device("cpu"), unread)]
    assert list(tie_ends(parts, Threshold(1.0, kept=3, equal=3))) == [5]


def test_no_elements_have_the_threshold_zero():
    assert kth_largest([], 1) == Threshold(0.0, 0, 0)
    assert kth_largest([part(torch.empty(0))], 1) == Threshold(0.0, 0, 0)


def test_threads_do_not_change_the_counts(monkeypatch):
    monkeypatch.setattr(ranges, "_SHARE", 1000)
    vector = (random(200_000, 7) * 64).round()
    alone = kth_largest([part(vector)], 160_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert kth_largest([part(vector)], 160_000) == alone == by_sorting(vector, 160_000)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


# What is read is made up block by block, so that the memory is the search's own.
MEASURE = """
import sys, threading, time, torch
from merge_callback.merging.threshold import Part, alone, search_kth_largest
torch.set_num_threads(2)
kind, n = sys.argv[1], 1 << 24
whole = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))
whole = {"normal": whole, "few": (whole * 4).round(), "zeros": whole.clamp(min=2) - 2}[kind]
def blocks(start, stop):
    return (whole[: min(i + (1 << 15), stop) - i].clone() for i in range(start, stop, 1 << 15))
def own():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
find = lambda n: alone(search_kth_largest([Part(n, torch.float32, torch.device("cpu"), blocks)], n * 4 // 5))
find(1 << 12)
before, peak, done = own(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], own())
watcher = threading.Thread(target=watch)
watcher.start()
find(n)
done.set()
watcher.join()
print(max(peak[0], own()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's memory accounts")
@pytest.mark.parametrize("kind", ["normal", "few", "zeros"])
def test_the_memory_of_a_search_is_bounded(kind):
    """64 MiB of elements are searched; a histogram of 8 MiB, its sums and the sample may be held."""
    found = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 32 * 1024  # KiB: the histogram and its sums, twice over


def map_parts(pieces, block=1000):
    return [part(piece, block) for piece in pieces]
