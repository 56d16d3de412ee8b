"""TIES: the thresholds' counts and the election, bit for bit those of PyTorch's operations on the CPU."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.checks import Section
from benchmarks.gpu_check.kernels import BF16, FP16, FP32, eager, randn
from benchmarks.gpu_check.machines import Machine
from merge_callback import merge_state_dicts
from merge_callback.merging import Inputs, Ties, Trajectory
from merge_callback.reduce import blocks, dispatch

SECTION = Section("ties", 50)

SIZES = (1, 2, 777, 4096, 100_003, (1 << 20) + 3, 5_000_011)
DRY_SIZES = (1, 77, 700)


def eighths(size: int, dtype: torch.dtype, machine: Machine, rng: random.Random) -> Tensor:
    """Multiples of 1/8: many are equal, so that the threshold's own magnitude is kept in part."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    return (torch.randint(-32, 33, (size,), generator=generator) / 8).to(dtype).to(machine.device)


def assert_as_on_the_cpu(models: list[dict[str, Tensor]], told: str, **options: Any) -> None:
    """Merges on the device, and on the CPU with PyTorch's operations."""
    found = merge_state_dicts(models, "ties", **options)
    with eager():
        expected = merge_state_dicts([{n: t.cpu() for n, t in m.items()} for m in models], "ties", **options)
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), f"{told}: {name}"


@SECTION.check("N = 2 … 16, all dtypes and densities", "the same bits", 12)
def every_count(machine: Machine) -> str:
    rng, runs = random.Random(1), 0
    for count in (2, 5, 10) if machine.is_dry else range(2, 17):
        for dtypes in ((FP32,), (BF16,), (FP16,), (FP32, BF16, FP16)):
            size = rng.choice(DRY_SIZES if machine.is_dry else SIZES[:-2])
            make, density = rng.choice([eighths, randn]), rng.choice([0.1, 0.5, 0.8, 1.0])
            models = [{"w": make(size, dtypes[i % len(dtypes)], machine, rng)} for i in range(count)]
            told = f"N={count}, {size} elements of {dtypes}, density {density}, {make.__name__}"
            if len(dtypes) > 1:
                models = [{"w": model["w"].to(FP32)} for model in models]
            assert_as_on_the_cpu(models, told, density=density, scale=0.7)
            runs += 1
    return f"{runs} merges"


@SECTION.check("tensors of many sizes at once, one threshold each and one for all", "the same bits", 12)
def whole_models(machine: Machine) -> str:
    rng = random.Random(2)
    sizes = DRY_SIZES if machine.is_dry else SIZES
    for make in (eighths, randn):
        models = [{str(size): make(size, FP32, machine, rng) for size in sizes} for _ in range(4)]
        for scope in ("tensor", "global"):
            assert_as_on_the_cpu(models, f"{make.__name__}, {scope}", density=0.3, scope=scope)
    return f"{sum(sizes):,} elements, 4 merges"


@SECTION.check("infinite entries, NaN, and sums of 0, which count as +", "end as they do on the CPU")
def special(machine: Machine) -> str:
    inf, nan = torch.inf, torch.nan
    thetas = [[0.0] * 7, [inf, inf, nan, 1, -inf, 0, 3], [-inf, 1, 2, nan, -inf, nan, -2], [1.0] * 6 + [-1]]
    method, even = Ties(density=1.0), Trajectory.even(len(thetas))
    tensors = [torch.tensor(theta) for theta in thetas]
    found, expected = torch.empty(7, device=machine.device), torch.empty(7)
    method.merge(Inputs("w", [tensor.to(machine.device) for tensor in tensors]), found, even)
    with eager():
        method.merge(Inputs("w", tensors), expected, even)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    return str(expected.tolist())


@SECTION.check("a block and its rest, against the blocks on the same device", "the same bits", on_gpu=True)
def blocked(machine: Machine) -> str:
    rng = random.Random(3)
    size = 2 * blocks.BLOCK + 77
    models = [{"w": randn(size, FP32, machine, rng)} for _ in range(10)]
    assert dispatch.election(models[0]["w"], [model["w"] for model in models[1:]], models[0]["w"]) is not None
    found = merge_state_dicts(models, "ties")["w"]
    with eager():
        expected = merge_state_dicts(models, "ties")["w"]
    assert torch.equal(found, expected)
    return f"{size:,} elements"
