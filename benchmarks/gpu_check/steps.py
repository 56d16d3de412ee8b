"""Between snapshots no hook waits for the device, and steps take as long as without the callback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import AdamW, Optimizer

from benchmarks.gpu_check import clock
from benchmarks.gpu_check.checks import Outcome, Section, at_most
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import Classifier, fit, folder, fused
from merge_callback import CheckpointMergeCallback, PowerEma, RunningEma, SpikeOptions

SECTION = Section("steps", 70)

EVERY = 8
"""Steps between snapshots."""


class Watched(CheckpointMergeCallback):
    """Notes what its hooks wait for, apart from the numbers of the step before, and how long they take.

    What is done in the background has to wait meanwhile: PyTorch notes the waits of all threads.
    """

    def __init__(self, machine: Machine, **options: Any) -> None:
        super().__init__(**options)
        self.machine = machine
        self.waits: list[str] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        with self._watching(trainer):
            super().on_train_batch_start(trainer, *args)

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        with self._watching(trainer):
            super().on_before_optimizer_step(trainer, *args)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        with self._watching(trainer):
            super().on_train_batch_end(trainer, *args)

    @contextmanager
    def _watching(self, trainer: Trainer) -> Iterator[None]:
        if self.session is None or trainer.global_step == 0:  # the first batch finds out what can be counted
            yield
            return
        background, gate = self.session.background, threading.Event()
        background.drain()
        background.submit(gate.wait)
        start = time.perf_counter()
        try:
            with self.machine.waits() as found:
                yield
        finally:
            self.seconds.append(time.perf_counter() - start)
            gate.set()
            self.waits += [f"step {trainer.global_step}: {wait}" for wait in found]


def watched(machine: Machine, fit_options: dict[str, Any] | None = None, **options: Any) -> Outcome:
    """A fit whose hooks are watched."""
    with folder() as path, machine.trains():
        given = {"every_n_steps": EVERY, "window": 3, "evaluate": False, "dirpath": path, **options}
        callback = Watched(machine, **given)
        fit(machine, callback, steps=3 * EVERY + 2, **(fit_options or {}))
        kept = len(list(path.glob("window/step=*")))
    assert kept >= 3, f"{kept} snapshots were kept"
    told = f"{1e6 * clock.median(callback.seconds):.0f} µs a hook"
    return Outcome(f"{'; '.join(callback.waits[:6]) or 'none'}; {told}", not callback.waits)


@SECTION.check("an .item() would be noticed", "it is", 1)
def detects(machine: Machine) -> Outcome:
    with machine.trains(), machine.waits() as found:
        torch.ones(1, device=machine.device).item()
    return Outcome(f"{found}", bool(found))


@SECTION.check("waits, with the defaults", "none, not even at a snapshot")
def defaults(machine: Machine) -> Outcome:
    return watched(machine)


@SECTION.check("waits, with grad_norm=True and accumulated gradients", "none")
def gradients(machine: Machine) -> Outcome:
    return watched(machine, {"accumulate_grad_batches": 3}, spike=SpikeOptions(grad_norm=True))


@SECTION.check("waits, with metrics in the progress bar", "none")
def metrics(machine: Machine) -> Outcome:
    return watched(machine, {"module": partial(Classifier, shows=True), "log_every_n_steps": 3})


@SECTION.check("waits, with tokens that are counted on the device", "none")
def tokens(machine: Machine) -> Outcome:
    every = EVERY * 160
    return watched(
        machine,
        count_tokens=lambda batch: (batch[1] >= 0).sum() * 10,
        every_n_steps=None,
        every_n_tokens=every,
    )


@SECTION.check("waits, with a learning rate on the device", "none")
def learning_rate(machine: Machine) -> Outcome:
    def capturable(parameters: Any) -> Optimizer:
        given = list(parameters)
        there = given[0].device.type == "cuda"
        rate = torch.tensor(1e-3, device=given[0].device)
        return AdamW(given, lr=rate, capturable=there, foreach=False)

    return watched(machine, {"module": partial(Classifier, optimizer=capturable)})


@SECTION.check("waits, with running averages", "none")
def averages(machine: Machine) -> Outcome:
    return watched(machine, running=[PowerEma(0.1), RunningEma(decay=0.9)])


@SECTION.check("waits, in fp16 with fused AdamW and grad_norm=True", "none")
def half_precision(machine: Machine) -> Outcome:
    machine = machine.plain()
    options = {"module": partial(Classifier, optimizer=fused), "plugins": [scaled(machine)]}
    return watched(machine, options, spike=SpikeOptions(grad_norm=True))


def scaled(machine: Machine, growth: int = 2000) -> MixedPrecision:
    """fp16 with a loss scale that grows after so many steps."""
    scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**10, growth_interval=growth)
    return MixedPrecision("16-mixed", machine.device.type, scaler)


class Stamps(Callback):
    """Seconds of a step, over all but the first third; the device is waited for at both ends."""

    def __init__(self, machine: Machine, steps: int) -> None:
        self._machine, self._first, self._steps = machine, steps // 3, steps
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._first:
            self._machine.synchronize()
            self.seconds = -time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._steps:
            self._machine.synchronize()
            self.seconds = (self.seconds + time.perf_counter()) / (self._steps - self._first)


@SECTION.check(
    "whole steps, against those without the callback",
    "at most 1.10 times as long, if bound by the device",
    15,
)
def whole_steps(machine: Machine) -> Outcome:
    machine = machine.plain()
    sizes = {"bound by launches": (64, 2, 240), "bound by the device": (2048, 24, 60)}
    if machine.is_dry:
        sizes = {"tiny": (16, 1, 12)}
    ratios = {}
    for name, (width, layers, steps) in sizes.items():
        module = partial(Classifier, width=width, layers=layers)
        times: dict[bool, list[float]] = {False: [], True: []}
        for merges in (False, True) * 3:
            with folder() as path:
                stamps = Stamps(machine, steps)
                merging = CheckpointMergeCallback(every_n_steps=10**6, dirpath=path, evaluate=False)
                others = [merging] if merges else []
                batch = 16 if width < 1000 else 1024
                fit(machine, *others, stamps, module=module, steps=steps, width=width, batch=batch)
            times[merges].append(stamps.seconds)
        ratios[name] = clock.median(times[True]) / clock.median(times[False])
        ratios[f"{name}, ms"] = 1e3 * clock.median(times[False])
    holds = at_most(machine, ratios.get("bound by the device", 1.0), 1.10)
    return Outcome(", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()), holds, ratios)
