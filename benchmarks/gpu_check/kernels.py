"""Weighted sums and squares: every variant of the kernels, on random tensors, against fp64 and against C."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.checks import Outcome, Section, Skipped
from benchmarks.gpu_check.machines import Machine
from merge_callback import merge_state_dicts, reduce
from merge_callback.merging import METHODS
from merge_callback.reduce import dispatch, triton_kernels, triton_ties
from merge_callback.reduce.passes import Cut
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.deltas import decode, encode
from merge_callback.snapshots.layout import Layout

SECTION = Section("kernels", 85)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WAYS = (((FP32,), FP32), ((BF16,), BF16), ((FP16,), FP16), ((FP32, BF16, FP16), FP32), ((BF16,), FP32))
"""Dtypes of the sources and of the output: few, since each way is compiled."""

COUNTS = (*range(2, 17), 1, 33, 64)

ROUNDING = {FP32: 0.0, BF16: 2.0**-8, FP16: 2.0**-11}
"""Of the one final cast, relative; an fp32 output needs none."""


def blocks_of(machine: Machine) -> int:
    """Elements per program; few in the interpreter, which takes a while for each."""
    return 64 if machine.is_dry else triton_kernels.BLOCK


def randn(size: int, dtype: torch.dtype, machine: Machine, rng: random.Random, begin: int = 0) -> Tensor:
    """Random numbers of a random magnitude, ``begin`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    values = torch.randn(size + begin, generator=generator) * 10 ** rng.uniform(-3, 1)
    return values.to(dtype).to(machine.device)[begin:]


@dataclass
class Case:
    """Arguments of one pass, and its results in fp64 with the errors that rounding may cause."""

    sources: list[Tensor]
    weights: list[float]
    contrast: list[float]
    bounds: list[int]
    begin: int
    out_dtype: torch.dtype

    @classmethod
    def drawn(cls, index: int, machine: Machine, rng: random.Random) -> Case:
        """A case of any size, alignment and division into segments, some of which are empty."""
        dtypes, out_dtype = WAYS[index % len(WAYS)]
        block, count = blocks_of(machine), COUNTS[(index // len(WAYS)) % len(COUNTS)]
        largest = int(10 ** rng.uniform(1, 3 if machine.is_dry else 5.6))
        size = rng.choice([1, 2, block - 1, block, block + 1, 3 * block + 5, largest, largest])
        begin = 0 if index % 2 else rng.choice([1, 3, 8])
        sources = [randn(size, dtypes[i % len(dtypes)], machine, rng, begin) for i in range(count)]
        weights = [rng.choice([0.0, rng.uniform(-1, 1), 1 / count]) for _ in sources]
        contrast = [rng.choice([0.0, -1.0, 1.0, rng.uniform(-1, 1)]) for _ in sources]
        for source, *factors in zip(sources, weights, contrast, strict=True):
            if not any(factors):
                source.fill_(torch.nan)  # what has no part in either sum may be anything
        inner = sorted(rng.randrange(size + 1) for _ in range(rng.choice([0, 1, 3, 40])))
        return cls(sources, weights, contrast, [*sorted(inner * 2), size], begin, out_dtype)

    @property
    def size(self) -> int:
        return len(self.sources[0])

    def room(self, machine: Machine) -> tuple[Tensor, Tensor]:
        """An output, and the memory around it, which nobody may write to."""
        room = torch.full(
            (self.size + 2 * self.begin + 64,), 7.0, dtype=self.out_dtype, device=machine.device
        )
        return room[2 * self.begin :][: self.size], room

    def exact(self, factors: Sequence[float]) -> tuple[Tensor, Tensor, int]:
        """A weighted sum in fp64, the sum of the magnitudes of its terms, and their number."""
        total, magnitudes = torch.zeros(2, self.size, dtype=torch.float64)
        terms = [(f, s) for f, s in zip(factors, self.sources, strict=True) if f]
        for factor, source in terms:
            term = float(torch.tensor(factor)) * source.cpu().double()
            total += term
            magnitudes += term.abs()
        return total, magnitudes, len(terms)

    def error_of_sum(self, out: Tensor) -> float:
        """The largest error, in units of what is allowed."""
        exact, magnitudes, terms = self.exact(self.weights)
        least = 2.0**-25 if self.out_dtype == FP16 else 1e-40  # of a number that is subnormal
        allowed = (terms + 2) * 2.0**-24 * magnitudes + ROUNDING[self.out_dtype] * exact.abs() * 1.01 + least
        return float(((out.cpu().double() - exact).abs() / allowed).nan_to_num(1e9).max())

    def error_of_squares(self, squares: Tensor) -> float:
        """The largest error of a segment, in units of what is allowed."""
        exact, magnitudes, terms = self.exact(self.contrast)
        error = (terms + 2) * 2.0**-24 * magnitudes
        allowed = 2 * exact.abs() * error + error.square() + 17 * 2.0**-24 * exact.square()
        worst = 0.0
        for found, left, right in zip(squares.tolist(), [0, *self.bounds], self.bounds, strict=False):
            off = abs(found - float(exact[left:right].square().sum()))
            worst = max(worst, off / (float(allowed[left:right].sum()) + 1e-37))
        return worst if squares.isfinite().all() else 1e9


@SECTION.check("dispatch", "takes fp32, bf16 and fp16 that are contiguous on one GPU", on_gpu=True)
def dispatches(machine: Machine) -> str:
    one, start = torch.ones(8, device=machine.device), time.perf_counter()
    assert dispatch.triton_serves(one, one.half(), one.bfloat16()), "Triton does not run"
    first = time.perf_counter() - start
    assert not any(dispatch.triton_serves(one, other) for other in (one.double(), one[::2], one.cpu()))
    return f"the first kernel is compiled in {first:.1f} s"


@SECTION.check("weighted sums with squares, random cases", "each element within its roundings", 20)
def sums(machine: Machine) -> Outcome:
    seed = random.SystemRandom().randrange(1 << 30)
    rng, worst, cases = random.Random(seed), 0.0, 20 if machine.is_dry else 180
    for index in range(cases):
        case = Case.drawn(index, machine, rng)
        out, room = case.room(machine)
        arguments = case.sources, case.weights, out, case.contrast, case.bounds
        squares = triton_kernels.one_pass(*arguments, block=blocks_of(machine))
        assert squares is not None
        errors = case.error_of_sum(out), case.error_of_squares(squares)
        told = f"seed {seed}, case {index}: N={len(case.sources)}, {case.size} elements, {WAYS[index % 5]}"
        assert max(errors) <= 1, f"{told}: sum {errors[0]:.1f}, squares {errors[1]:.1f} of what is allowed"
        edge = 2 * case.begin
        beyond = torch.cat([room[:edge], room[edge + case.size :]])
        assert beyond.eq(7).all(), f"{told}: wrote beyond the output"
        once_more = triton_kernels.one_pass(*arguments, block=blocks_of(machine))
        assert once_more is not None
        assert torch.equal(once_more, squares), f"{told}: other squares when repeated"
        worst = max(worst, *errors)
    return Outcome(f"{cases} cases; the largest error is {worst:.2f} of what is allowed")


@SECTION.check("sums alone and squares alone", "the bits of both together", 8)
def alone(machine: Machine) -> str:
    rng = random.Random(1)
    for index in range(5):
        case = Case.drawn(index, machine, rng)
        both, _ = case.room(machine)
        sum_only, _ = case.room(machine)
        block = blocks_of(machine)
        squares = triton_kernels.one_pass(
            case.sources, case.weights, both, case.contrast, case.bounds, block=block
        )
        triton_kernels.one_pass(case.sources, case.weights, sum_only, block=block)
        measured = triton_kernels.one_pass(
            case.sources, contrast=case.contrast, bounds=case.bounds, block=block
        )
        assert torch.equal(both, sum_only), f"case {index}: the sum"
        assert squares is not None
        assert measured is not None
        torch.testing.assert_close(measured, squares, rtol=1e-6, atol=1e-30, equal_nan=True)
    return "yes"


@SECTION.check("K sums from one read, K = 2 … 11", "each has the bits that it has alone", 12)
def several(machine: Machine) -> str:
    rng, block = random.Random(2), blocks_of(machine)
    for count in (2, 5, 11) if machine.is_dry else (2, 3, 5, 8, 9, 11):
        for dtypes, out_dtype in WAYS[:: 2 if machine.is_dry else 1]:
            size, begin = 5 * block + 17, rng.choice([0, 0, 1])
            sources = [randn(size, dtypes[i % len(dtypes)], machine, rng, begin) for i in range(10)]
            sources[4].fill_(torch.nan)
            rows = [[0.0 if i in (4, k) else rng.uniform(-1, 1) for i in range(10)] for k in range(count)]
            contrast, bounds = [-1.0, *[0.0] * 8, 1.0], [7, 3 * block, size]
            outs = [
                torch.empty(size + k % 2, dtype=out_dtype, device=machine.device)[k % 2 :]
                for k in range(count)
            ]
            squares = triton_kernels.one_pass(sources, rows, outs, contrast, bounds, block=block)
            for k, (row, out) in enumerate(zip(rows, outs, strict=True)):
                triton_kernels.one_pass(sources, row, single := torch.empty_like(out), block=block)
                assert torch.equal(out, single), f"K={count}, {dtypes}: sum {k}"
            exact = (sources[-1].double() - sources[0].double()).square().cpu().tensor_split(bounds[:-1])
            assert squares is not None
            torch.testing.assert_close(squares, torch.stack([e.sum() for e in exact]), rtol=2e-5, atol=0)
    return "yes"


@SECTION.check("every method, on the device against the CPU", "TIES the same bits, others an ulp", 10)
def methods(machine: Machine) -> Outcome:
    worst, size = {}, 97 * (3 if machine.is_dry else 301)
    for dtype in (FP32, BF16):
        rng = random.Random(3)
        models = [{"a": randn(size, dtype, machine, rng).view(-1, 97)} for _ in range(5)]
        on_cpu = [{name: tensor.cpu() for name, tensor in model.items()} for model in models]
        for name in METHODS:
            given: dict[str, Any] = {"weights": [0.1, 0.2, 0.3, 0.3, 0.1]} if name == "weighted" else {}
            found = merge_state_dicts(models, name, **given)["a"].cpu()
            with eager():
                expected = merge_state_dicts(on_cpu, name, **given)["a"]
            if name == "ties":
                assert torch.equal(found, expected), f"ties, {dtype}"
            # A fused product may round a sum otherwise, which the one cast can bring to light.
            tolerance = (2**-7 if dtype == BF16 else 4e-6) * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023
            worst[f"{name} {dtype}"] = float((found.double() - expected.double()).abs().max())
    return Outcome(f"{len(worst)} merges; largest difference {max(worst.values()):.1e}", figures=worst)


@SECTION.check("fp64", "is summed by PyTorch's operations in fp64", 2)
def doubles(machine: Machine) -> str:
    sources = [torch.randn(5000, dtype=torch.float64).to(machine.device) for _ in range(3)]
    out = torch.empty(5000, dtype=torch.float64, device=machine.device)
    squares = reduce.one_pass(sources, [0.2, 0.3, 0.5], out, [-1, 0, 1], [1000, 5000])
    first, second, third = (source.cpu() for source in sources)
    torch.testing.assert_close(out.cpu(), 0.2 * first + 0.3 * second + 0.5 * third, rtol=0, atol=1e-14)
    moved = (third - first).square()
    assert squares is not None
    torch.testing.assert_close(squares, torch.stack([moved[:1000].sum(), moved[1000:].sum()]))
    return "yes"


@SECTION.check("fp16 differences, coded and decoded on the device", "within 2^-11 of each move", 3)
def differences(machine: Machine) -> Outcome:
    rng = random.Random(4)
    size = 1003 if machine.is_dry else 100_003
    tensors = {"w": randn(size, FP32, machine, rng)}
    layout = Layout.of(tensors)
    arenas: list[Arena] = []
    worst, before = 0.0, tensors["w"].clone()
    for step in range(4):
        if step:
            tensors["w"] += 1e-3 * randn(size, FP32, machine, rng)
        whole = Arena.empty(layout, machine.device)
        whole.copy_from(tensors)
        if step:
            coded = Arena.empty(layout.delta(FP16), machine.device)
            encode(whole, arenas, coded)
            arenas.append(coded)
            decode(arenas, back := Arena.empty(layout, machine.device))
            move = (tensors["w"] - before).abs() * 1.01 + 1e-7
            allowed = move * 2.0**-11 + tensors["w"].abs() * 2.0**-23 + 6e-11
            worst = max(worst, float(((back.tensor("w") - tensors["w"]).abs() / allowed).max()))
        else:
            arenas.append(whole)
        before = tensors["w"].clone()
    return Outcome(f"{worst:.2f} of what is allowed", worst <= 1)


@SECTION.check("more than 2^31 elements", "exact: sums, squares, K sums and election", 15, on_gpu=True)
def far(machine: Machine) -> str:
    edge, step = 1 << 31, 1 << 27
    size = edge + 1001
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        raise Skipped("less than 40 GiB are free")
    sources = [_counting(size, 31, 0, machine), _counting(size, 29, 3, machine)]
    out, other = torch.empty_like(sources[0]), torch.empty_like(sources[0])
    bounds = [5, edge - 2001, edge + 3, size]
    squares = triton_kernels.one_pass(sources, [0.5, 0.5], out, [-1.0, 1.0], bounds)
    moved = (sources[1] - sources[0]).float()  # multiples of 1/8 below 4: exact in bf16
    expected = [
        float(sum(float(part.double().square().sum()) for part in torch.split(moved[left:right], step)))
        for left, right in zip([0, *bounds], bounds, strict=False)
    ]
    assert squares is not None
    assert squares.tolist() == expected, f"{squares} is not {expected}"
    for begin in (0, edge - step, edge - 64):
        a, b = (source[begin : begin + step].float() for source in sources)
        assert torch.equal(out[begin : begin + step], ((a + b) / 2).to(BF16)), f"the sum after {begin}"
    triton_kernels.one_pass(sources, [[0.5, 0.5], [1.0, -1.0]], [out.zero_(), other])
    triton_kernels.one_pass(sources, [1.0, -1.0], single := torch.empty_like(other))
    assert torch.equal(other, single), "the second of two sums"
    triton_ties.elect(sources[0], sources[1:], out, 1.0, [Cut(0.5, 1.0, size - 9)])
    for begin in (0, edge - step, edge - 64):
        entry, index = (
            moved[begin : begin + step],
            torch.arange(begin, min(begin + step, size), device=machine.device),
        )
        entry = torch.where(entry.abs() <= torch.where(index < size - 9, 0.5, 1.0), 0.0, entry)
        elected = (sources[0][begin : begin + step].float() + entry).to(BF16)
        assert torch.equal(out[begin : begin + step], elected), f"the election after {begin}"
    return f"{size:,} elements"


def _counting(size: int, prime: int, shift: int, machine: Machine) -> Tensor:
    """Multiples of 1/8 that repeat with a prime period."""
    period = (torch.arange(prime, device=machine.device) * 7 + shift) % prime - prime // 2
    return (period.to(BF16) / 8).repeat(-(-size // prime))[:size].contiguous()


class eager:  # noqa: N801
    """Within, only PyTorch's own operations are used."""

    def __enter__(self) -> None:
        self._before, dispatch.EAGER = dispatch.EAGER, True

    def __exit__(self, *error: object) -> None:
        dispatch.EAGER = self._before
