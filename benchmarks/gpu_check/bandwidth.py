"""How fast the kernels are: as shares of the bandwidth of a copy, measured in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check import clock
from benchmarks.gpu_check.checks import Outcome, Section, share
from benchmarks.gpu_check.clock import GIGA, TERA
from benchmarks.gpu_check.machines import Machine
from merge_callback.merging import Inputs, Slerp, Ties, Trajectory
from merge_callback.reduce import blocks, one_pass
from merge_callback.reduce.dispatch import election
from merge_callback.reduce.passes import Cut
from merge_callback.snapshots.staging import ToHost

SECTION = Section("bandwidth", 70)

MOST = 16
"""Snapshots at once."""

SUMS = 8
"""Weighted sums that are made of one read."""

LEAST = {"sum": 0.90, "sum and diversity": 0.85, "election": 0.60}
"""Shares of the copy's bandwidth that N = 10 has to reach."""

GPT = [4_194_304, 2048, 12_582_912, 6144, 4_194_304, 2048, 2048, 2048, 16_777_216, 8192, 16_777_216, 2048]
"""Elements of the tensors of a block of a GPT of 1.3e9 parameters; their ends are the segments."""

copies: list[float] = []
"""The bandwidth of a copy, in bytes a second, once it is measured."""


class Snapshots:
    """N flat snapshots in the device's memory, of 2.1 GB each if there is room for all, and an output."""

    def __init__(self, machine: Machine, dtype: torch.dtype) -> None:
        free = 1 << 19 if machine.is_dry else torch.cuda.mem_get_info()[0]
        self.nbytes = min(1 << 31, free // (MOST + SUMS + 4)) // 4096 * 4096
        size = self.nbytes // dtype.itemsize
        self.flat = [torch.randn(size, device=machine.device).to(dtype) for _ in range(MOST - 1)]
        self.outs = [torch.zeros(size, dtype=dtype, device=machine.device) for _ in range(SUMS)]
        self.ends = self._segments(size)

    @staticmethod
    def _segments(size: int) -> list[int]:
        ends, end = [], 0
        while end < size:
            for numel in GPT:
                end = min(end + numel, size)
                ends.append(end)
                if end == size:
                    break
        return ends


@SECTION.check("copy", "its bandwidth, read and written: what the others are shares of", 4)
def copy(machine: Machine) -> Outcome:
    size = 1 << (16 if machine.is_dry else 31)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copied = 2 * size / clock.seconds(machine, lambda: target.copy_(source), 9)
    read = size / clock.seconds(machine, lambda: source.view(torch.float32).sum(), 9)
    copies.append(copied)
    figures = {"copy": copied, "read by sum()": read}
    return Outcome(f"{copied / TERA:.2f} TB/s; read by sum(): {read / TERA:.2f}", None, figures)


class Pass(NamedTuple):
    """Something to time: the bytes that count for it, and how often it is repeated."""

    run: Callable[[], object]
    nbytes: int
    repeats: int = 5


def passes(s: Snapshots, count: int) -> dict[str, Pass]:
    """What is made of so many snapshots; counted are N reads, and one write for each output."""
    flat, weights, out = s.flat[:count], [1 / count] * count, s.outs[0]
    contrast = [-1.0, *[0.0] * (count - 2), 1.0]
    rows = [[(1 + (i + k) % 3) / (2 * count) for i in range(count)] for k in range(SUMS)]
    cuts, elect = [Cut(0.2, 0.3, s.ends[-1] // 2)] * (count - 1), election(flat[0], flat[1:], out)
    moved = s.nbytes * (count + 1)
    found = {
        "sum": Pass(lambda: one_pass(flat, weights, out), moved),
        "sum and diversity": Pass(lambda: one_pass(flat, weights, out, contrast, s.ends), moved),
        f"{SUMS} sums and diversity": Pass(
            lambda: one_pass(flat, rows, s.outs, contrast, s.ends), s.nbytes * (count + SUMS)
        ),
        "eager blocks": Pass(lambda: blocks.one_pass(flat, weights, out, None, ()), moved),
        "running add_": Pass(lambda: running_add(flat, weights, out), moved),
    }
    if elect is not None:
        found["election"] = Pass(lambda: elect(flat[0], flat[1:], out, 1.0, cuts), moved)
    return found


def methods(s: Snapshots) -> dict[str, Pass]:
    """Whole methods, of a quarter of ten snapshots as one tensor."""
    size = s.ends[-1] // 4
    part, out, even = Inputs("flat", [f[:size] for f in s.flat[:10]]), s.outs[0][:size], Trajectory.even(10)
    moved = s.nbytes // 4 * 11
    return {
        "TIES with thresholds": Pass(lambda: Ties().merge(part, out, even), moved, 1),
        "SLERP": Pass(lambda: Slerp().merge(part, out, even), moved, 2),
    }


def measured(machine: Machine, dtype: torch.dtype) -> Outcome:
    """The passes over snapshots of a dtype, as shares of the copy's bandwidth."""
    if not copies:
        copy(machine)
    s, figures = Snapshots(machine, dtype), dict[str, float]()
    for count in (3, 10, 15):
        for name, (run, nbytes, repeats) in {
            **passes(s, count),
            **(methods(s) if count == 10 else {}),
        }.items():
            rate = nbytes / clock.seconds(machine, run, repeats, min(2, repeats))
            figures[f"{name}, N={count}"] = rate / copies[-1]
    holds = all(share(machine, figures.get(f"{name}, N=10", 0.0), least) for name, least in LEAST.items())
    return Outcome(", ".join(f"{k} {100 * v:.0f} %" for k, v in figures.items()), holds, figures)


def running_add(flat: list[Tensor], weights: list[float], out: Tensor) -> None:
    torch.mul(flat[0], weights[0], out=out)
    for source, weight in zip(flat[1:], weights[1:], strict=True):
        out.add_(source, alpha=weight)


TARGETS = "of copy, at N=10: " + ", ".join(f"{name} >= {100 * least:.0f} %" for name, least in LEAST.items())


@SECTION.check("fp32", TARGETS, 15)
def of_fp32(machine: Machine) -> Outcome:
    return measured(machine, torch.float32)


@SECTION.check("bf16", TARGETS, 15)
def of_bf16(machine: Machine) -> Outcome:
    return measured(machine, torch.bfloat16)


@SECTION.check("to the host and back", "the package's way is near that of pinned memory", 6)
def to_the_host(machine: Machine) -> Outcome:
    size = 1 << (16 if machine.is_dry else 30)
    there = torch.randint(0, 255, (size,), dtype=torch.uint8, device=machine.device)
    here, way = torch.zeros(size, dtype=torch.uint8), ToHost()
    runs: dict[str, Callable[[], object]] = {
        "to pageable memory": lambda: here.copy_(there),
        "from pageable memory": lambda: there.copy_(here),
        "ToHost.copy": lambda: way.copy(there, here),
        "ToHost.chunks": lambda: [chunk[0].item() for chunk in way.chunks(there)],
    }
    if not machine.is_dry:
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        runs["to pinned memory"] = lambda: pinned.copy_(there, non_blocking=True)
        runs["from pinned memory"] = lambda: there.copy_(pinned, non_blocking=True)
    rates = {}
    for name, run in runs.items():
        run()
        rates[name] = size / clock.on_the_wall(machine, run)
    assert torch.equal(here, there.cpu())
    return Outcome(", ".join(f"{k} {v / GIGA:.1f} GB/s" for k, v in rates.items()), None, rates)
