"""A run that has no room for a copy of its weights goes on with the callback as without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.gpu_check import clock
from benchmarks.gpu_check.checks import Outcome, Section, share
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import fit, folder
from merge_callback import CheckpointMergeCallback

SECTION = Section("memory", 60)

WIDTH, DRY_WIDTH = 16384, 32
"""Of one square matrix: 1.07 GB in fp32."""

EVERY = 3


class Wide(LightningModule):
    """One large matrix; its activations grow with the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(width, width, bias=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x: Tensor = self.line(batch[0])
        for _ in range(4):
            x = x.tanh()
        return torch.mean(x.square())

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=1e-4)


class Times(Callback):
    """Seconds of each step, the device waited for at both ends."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.seconds = machine, dict[int, float]()
        self._run = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._run = -clock.now(self.machine)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seconds[trainer.global_step] = self._run + clock.now(self.machine)


def train(machine: Machine, batch: int, **options: Any) -> tuple[list[int], Times]:
    """Trains, with the callback if it gets options; returns the steps of the snapshots in the window."""
    width = DRY_WIDTH if machine.is_dry else WIDTH
    times = Times(machine)
    with folder() as path:
        given = {"every_n_steps": EVERY, "dirpath": path, "window": 2, "evaluate": False, "emit_every": 0}
        others = [CheckpointMergeCallback(**{**given, **options})] if options else []
        fit(machine, *others, times, module=lambda: Wide(width), steps=4 * EVERY, width=width, batch=batch)
        if not options:
            return [], times
        return [
            s["step"] for s in json.loads((path / "window/manifest.json").read_text())["snapshots"]
        ], times


@contextmanager
def limited(machine: Machine, nbytes: int) -> Iterator[None]:
    """Within, PyTorch may take so many bytes of the GPU."""
    total = torch.cuda.get_device_properties(machine.device).total_memory
    machine.tidy()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), machine.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, machine.device)


def reserved_at_most(machine: Machine, batch: int) -> int:
    """What a run without the callback reserves at its peak, in bytes."""
    machine.tidy()
    torch.cuda.reset_peak_memory_stats()
    train(machine, batch)
    return torch.cuda.max_memory_reserved()


@SECTION.check(
    "a run with room for half a copy, large activations",
    "goes on, and all snapshots are kept",
    12,
    on_gpu=True,
)
def at_the_peak(machine: Machine) -> Outcome:
    batch, weights = 2048, 4 * WIDTH**2
    reserved = reserved_at_most(machine, batch)
    with limited(machine, reserved + weights // 2):
        train(machine, batch)  # it fits alone
        machine.tidy()
        before = torch.cuda.memory_stats()
        kept, _ = train(machine, batch, storage="disk")
        after = torch.cuda.memory_stats()
    failed = after["num_ooms"] - before["num_ooms"]
    room = f"{reserved / 1e9:.1f} GB at the peak and {weights / 2e9:.1f}"
    told = f"{room}; kept {kept}; {failed} allocations failed"
    return Outcome(told, kept == [3 * EVERY, 4 * EVERY] and failed == 0)


@SECTION.check(
    "a run with room for half a copy, small activations", "copies through pinned chunks", 10, on_gpu=True
)
def through_chunks(machine: Machine) -> Outcome:
    batch, weights = 64, 4 * WIDTH**2
    limit = reserved_at_most(machine, batch) + weights // 2
    with limited(machine, limit):
        before = torch.cuda.memory_stats()
        kept, times = train(machine, batch, storage="cpu")
        after = torch.cuda.memory_stats()
    retried = after["num_alloc_retries"] - before["num_alloc_retries"]
    steps = [[t for s, t in times.seconds.items() if s > EVERY and s % EVERY == k] for k in range(EVERY)]
    with_one, quiet = clock.median(steps[0]), clock.median(steps[2])
    rate = weights / max(1e-9, with_one - quiet)
    told = f"kept {kept}; {rate / 1e9:.0f} GB/s in the step; {retried} flushes of the allocator's cache"
    return Outcome(told, len(kept) == 2 and retried <= 1 and share(machine, rate, 5e9))


@SECTION.check("no room on a pretended GPU", "all snapshots are kept, none through pageable memory")
def pretended(machine: Machine) -> Outcome:
    if not machine.is_dry:
        return Outcome("a real one is there")
    with machine.trains() as gpu:
        gpu.peak = gpu.capacity
        kept, _ = train(machine, 4, storage="disk")
        pageable = [
            wait for wait in gpu.waits_of_training() if "pageable" in wait[0] and "outside" not in wait[1]
        ]
    return Outcome(f"kept {kept}; {pageable or 'none'}", kept == [3 * EVERY, 4 * EVERY] and not pageable)


@SECTION.check("device memory that the callback takes", "one copy of the weights", 8, on_gpu=True)
def one_copy(machine: Machine) -> Outcome:
    peaks = []
    for options in ({}, {"storage": "disk"}):
        machine.tidy()
        torch.cuda.reset_peak_memory_stats()
        train(machine, 256, **options)
        peaks.append(torch.cuda.max_memory_allocated())
    copies = (peaks[1] - peaks[0]) / (4 * WIDTH**2)
    return Outcome(f"{copies:.2f} copies", copies < 1.1)
