"""What a snapshot costs training: the copy on the device, and the steps while the rest is done."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from benchmarks.gpu_check import clock
from benchmarks.gpu_check.bandwidth import GPT
from benchmarks.gpu_check.checks import Outcome, Section, at_most
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import Classifier, fit, folder
from merge_callback import CheckpointMergeCallback
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.storage import SnapshotStore

SECTION = Section("snapshots", 70)

MOST = 1.2
"""What a snapshot may take of the device, against a copy of one flat tensor of as many bytes."""

SNAPSHOTS = 4
"""That are measured, after two that allocate memory."""


def gpt(machine: Machine) -> nn.Module:
    """A module with the tensors of a GPT of 1.3e9 parameters, in fp32."""
    module, layers = nn.Module(), 1 if machine.is_dry else 24
    divisor = 1024 if machine.is_dry else 1
    for layer in range(layers):
        for index, numel in enumerate(GPT):
            values = torch.randn(numel // divisor, device=machine.device) / 50
            module.register_parameter(f"p{layer}_{index}", nn.Parameter(values))
    return module


@SECTION.check("the copy on the device", f"at most {MOST} times that of one flat tensor", 8)
def copies(machine: Machine) -> Outcome:
    module = gpt(machine)
    model = ModelTensors.of(module)
    store = SnapshotStore(Layout.of(model.tensors), "device", None, machine.device)

    def capture() -> None:
        store.pool.recycle(store.capture(model.tensors))

    arena = store.capture(model.tensors)
    there = torch.empty_like(arena.buffer)
    bare = clock.seconds(machine, lambda: there.copy_(arena.buffer))
    taken = clock.seconds(machine, capture)
    host = clock.on_the_wall(machine, capture)
    for name, tensor in arena.tensors().items():
        assert torch.equal(tensor, model.tensors[name]), f"{name} was not copied"
    told = f"{taken / bare:.2f} times a copy of {arena.buffer.nbytes / 1e9:.2f} GB ({1e3 * bare:.2f} ms)"
    figures = {"copy": bare, "snapshot": taken, "until it is over": host, "tensors": len(model.tensors)}
    return Outcome(f"{told}, {len(model.tensors)} tensors", at_most(machine, taken / bare, MOST), figures)


class Steps(Callback):
    """Seconds of whole steps, all callbacks included; the device is waited for at both ends."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.seconds = machine, dict[int, float]()
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        now = clock.now(self.machine)
        self.seconds[trainer.global_step], self._start = now - self._start, now

    def of(self, every: int, offsets: range) -> list[float]:
        """Those of steps so far behind the snapshots that are measured."""
        return [self.seconds[(2 + k) * every + offset] for k in range(1, SNAPSHOTS + 1) for offset in offsets]


def stalled(machine: Machine, storage: str, **options: Any) -> Outcome:
    """Steps of a fit with a snapshot, after one, and without."""
    width, layers, batch, every = (64, 2, 16, 12) if machine.is_dry else (2048, 12, 1024, 100)
    steps, module = Steps(machine), partial(Classifier, width=width, layers=layers)
    with folder() as path:
        merging = CheckpointMergeCallback(
            every_n_steps=every, window=3, evaluate=False, storage=storage, dirpath=path, **options
        )
        total = (SNAPSHOTS + 3) * every
        fit(machine, merging, steps, module=module, steps=total, width=width, batch=batch)
    quiet = statistics.median(steps.of(every, range(every // 2, every)))
    figures = {
        "a quiet step": quiet,
        "a snapshot, more": statistics.median(steps.of(every, range(1))) - quiet,
        "the next 5 steps, more": 5 * (statistics.mean(steps.of(every, range(1, 6))) - quiet),
    }
    return Outcome(
        ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in figures.items()), None, figures
    )


STALL = "how much longer the step with a snapshot, and those after it, take"


@SECTION.check("steps, window on disk", STALL, 10)
def disk(machine: Machine) -> Outcome:
    return stalled(machine, "disk")


@SECTION.check("steps, window on the device", STALL, 10)
def device(machine: Machine) -> Outcome:
    return stalled(machine, "device")


@SECTION.check("steps, window in host memory", STALL, 10)
def host(machine: Machine) -> Outcome:
    return stalled(machine, "cpu")


@SECTION.check("steps, window on the device, TIES", STALL, 10)
def ties(machine: Machine) -> Outcome:
    return stalled(machine, "device", method="ties")


@SECTION.check("steps, window of fp16 differences on the device", STALL, 10)
def differences(machine: Machine) -> Outcome:
    return stalled(machine, "device", snapshot_codec="delta-fp16")
