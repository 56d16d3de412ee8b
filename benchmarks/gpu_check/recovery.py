"""A run whose weights are spoilt goes on from the merge of earlier snapshots."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.gpu_check.checks import Outcome, Section
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import Classifier, fit, folder, fused, weights_of
from benchmarks.gpu_check.steps import scaled
from merge_callback import CheckpointMergeCallback, SpikeOptions

SECTION = Section("recovery", 45)

EVERY, POISONED, STEPS = 4, 20, 32


class Kept(Callback):
    """The weights at each snapshot, and after each step from the poisoned one on."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % EVERY == 0 or trainer.global_step > POISONED:
            self.weights[trainer.global_step] = weights_of(pl_module)


def events_of(path: Path) -> list[dict[str, Any]]:
    """What the record of spikes says."""
    record = path / "spikes.jsonl"
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def restored(
    machine: Machine,
    module: Callable[..., Classifier] = Classifier,
    trainer: Callable[[], dict[str, Any]] = dict,
    **options: Any,
) -> Outcome:
    """A fit with one loss that is NaN, which an optimizer step takes into the weights."""
    spike = SpikeOptions(rewarm_steps=5, guard=4)
    with folder() as path, machine.trains():
        kept = Kept()
        merging = CheckpointMergeCallback(
            every_n_steps=EVERY, window=4, evaluate=False, emit_every=0, dirpath=path, spike=spike, **options
        )
        found = fit(
            machine, merging, kept, module=partial(module, poison=(POISONED,)), steps=STEPS, **trainer()
        )
        events = events_of(path)
    restores = [event for event in events if event["event"] == "restore"]
    assert restores, f"it was not restored: {events}"
    assert all(loss == loss for loss in found.losses[-3:]), f"the last losses are {found.losses[-3:]}"
    finite = [n for n, t in found.weights.items() if t.is_floating_point() and not t.isfinite().all()]
    assert not finite, f"{finite} are not finite"
    first = restores[0]
    steps, at = [snapshot["step"] for snapshot in first["snapshots"]], first["restored_at"]
    if at in kept.weights:
        for name, tensor in kept.weights[at].items():
            if tensor.is_floating_point():
                exact = torch.stack([kept.weights[step][name].double() for step in steps]).mean(0)
                torch.testing.assert_close(tensor.double(), exact, rtol=0, atol=4e-7, msg=name)
    return Outcome(f"at step {at} from {steps}, in {1e3 * first['seconds']:.0f} ms", figures=first)


MEAN = "the weights are the mean of earlier snapshots, and the losses finite again"


for where, storage in (("on disk", "disk"), ("on the device", "device"), ("in host memory", "cpu")):
    SECTION.check(f"fp32, window {where}", MEAN)(partial(restored, storage=storage))


@SECTION.check("bf16-mixed, fused AdamW", MEAN)
def bf16(machine: Machine) -> Outcome:
    module = partial(Classifier, optimizer=fused)
    return restored(machine.plain(), module, lambda: {"precision": "bf16-mixed"}, storage="device")


@SECTION.check("under CUDA graphs", MEAN, 15)
def graphs(machine: Machine) -> Outcome:
    module = partial(Classifier, layers=1, compiled="dry" if machine.is_dry else "reduce-overhead")
    return restored(machine.plain(), module, storage="device")


@SECTION.check(
    "fp16 with fused AdamW and grad_norm=True", "no spike in a healthy run whose loss scale grows", 6
)
def growing_scale(machine: Machine) -> Outcome:
    place = machine.plain()

    def slow(parameters: Any) -> Optimizer:
        return AdamW(parameters, lr=1e-5, fused=True)

    steps = 120
    with folder() as path, place.trains():
        spike = SpikeOptions(grad_norm=True, rewarm_steps=5)
        merging = CheckpointMergeCallback(
            every_n_steps=20, dirpath=path, window=3, evaluate=False, emit_every=0, spike=spike
        )
        module, growth = partial(Classifier, optimizer=slow), [scaled(place, steps // 2)]
        fit(place, merging, module=module, steps=steps, plugins=growth)
        events = [(event["event"], event.get("trigger")) for event in events_of(path)]
    return Outcome(f"{events or 'none'}", not events)
