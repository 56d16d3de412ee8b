"""Training is bit for bit what it is without the callback, and the merge is that of its snapshots."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from benchmarks.gpu_check.checks import Outcome, Section
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import (
    Classifier,
    Fit,
    deterministic,
    first_difference,
    fit,
    folder,
    fused,
    plain,
    weights_of,
)
from benchmarks.gpu_check.steps import scaled
from merge_callback import CheckpointMergeCallback, load_merge

SECTION = Section("training", 100)

STEPS, EVERY = 24, 4


class Kept(Callback):
    """Copies of the weights at each snapshot, and the metrics of merged validations."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.merged: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % EVERY == 0:
            self.weights[trainer.global_step] = weights_of(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.merged |= {name: float(plain(value)) for name, value in metrics if name.startswith("merged/")}


def the_same(
    machine: Machine,
    module: Callable[[], Classifier] = Classifier,
    trainer: Callable[[], dict[str, Any]] = dict,
    **options: Any,
) -> Outcome:
    """Trains without and with the callback; compares losses, weights, and the merge with its snapshots."""
    train = partial(fit, machine, module=module, steps=STEPS, validates=True, val_check_interval=2 * EVERY)
    with folder() as path, deterministic(), machine.trains():
        expected = train(**trainer())
        kept = Kept()
        given = {"every_n_steps": EVERY, "window": 3, "method": "sma", "dirpath": path, **options}
        found = train(CheckpointMergeCallback(**given), kept, **trainer())
        compare(found, expected)
        assert kept.merged, "there are no merged metrics"
        told = f"{len(found.losses)} losses, {len(found.weights)} tensors; {kept.merged}"
        if given["method"] == "sma":
            told += f"; merge off by {distance_to_mean(path, kept):.1e}"
    return Outcome(told)


def compare(found: Fit, expected: Fit) -> None:
    """Makes sure that two fits are the same, bit for bit."""
    pairs = enumerate(zip(found.losses, expected.losses, strict=True))
    differ = next((step for step, (ours, theirs) in pairs if ours != theirs), None)
    assert differ is None, f"the losses differ, first at step {differ}"
    if name := first_difference(found.weights, expected.weights):
        raise AssertionError(f"the weights differ at the end: {name}")


def distance_to_mean(path: Path, kept: Kept) -> float:
    """How far the newest merge is from the mean of its snapshots in fp64, beyond a rounding of its dtype."""
    record = json.loads((path / "latest" / "merge.json").read_text())
    merge, steps, worst = load_merge(path / "latest"), [s["step"] for s in record["snapshots"]], 0.0
    for name, tensor in merge.items():
        if tensor.is_floating_point():
            exact = torch.stack([kept.weights[step][name].double() for step in steps]).mean(0)
            # Three sums in fp32; and a cast, which an fp32 tensor does not need.
            cast = 0.0 if tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).eps
            allowed = 4 * 2.0**-24 * exact.abs().max() + cast * exact.abs() + 1e-12
            off = (tensor.double() - exact).abs()
            assert (off <= allowed).all(), f"the merge of {name} is off by {float(off.max()):.1e}"
            worst = max(worst, float(off.max()))
    return worst


SAME = "losses and weights as without it, bit for bit; the merge is the mean"


@SECTION.check("fp32, window on disk", SAME)
def disk(machine: Machine) -> Outcome:
    return the_same(machine, storage="disk")


@SECTION.check("fp32, window on the device", SAME)
def device(machine: Machine) -> Outcome:
    return the_same(machine, storage="device")


@SECTION.check("fp32, window in host memory, as fp16 differences, TIES", SAME)
def host(machine: Machine) -> Outcome:
    return the_same(machine, storage="cpu", snapshot_codec="delta-fp16", method="ties")


@SECTION.check("fp32, window on the device, as fp16 differences", SAME)
def device_differences(machine: Machine) -> Outcome:
    return the_same(machine, storage="device", snapshot_codec="delta-fp16", method="ties")


@SECTION.check("batch norm, TIES on the device", SAME)
def batch_norm(machine: Machine) -> Outcome:
    module = partial(Classifier, norm=torch.nn.BatchNorm1d)
    return the_same(machine, module, storage="device", method="ties")


@SECTION.check("bf16 weights, window on the device", SAME)
def bf16_weights(machine: Machine) -> Outcome:
    return the_same(machine.plain(), trainer=lambda: {"precision": "bf16-true"}, storage="device")


@SECTION.check("bf16-mixed, TIES on the device", SAME)
def bf16(machine: Machine) -> Outcome:
    return the_same(
        machine.plain(), trainer=lambda: {"precision": "bf16-mixed"}, storage="device", method="ties"
    )


@SECTION.check("fp16 with a loss scale and fused AdamW", SAME)
def fp16(machine: Machine) -> Outcome:
    plain_machine = machine.plain()
    module = partial(Classifier, optimizer=fused)
    return the_same(plain_machine, module, lambda: {"plugins": [scaled(plain_machine)]}, storage="device")


@SECTION.check("a resume", "finds its window on the device, bit for bit as it was; trains on as unbroken", 6)
def resume(machine: Machine) -> Outcome:
    def merging(path: Path) -> CheckpointMergeCallback:
        return CheckpointMergeCallback(
            every_n_steps=EVERY, dirpath=path, window=3, storage="device", method="sma", evaluate=False
        )

    class Begun(Callback):
        """The window that the run begins with."""

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert again.session is not None
            for snapshot in again.session.window.snapshots:
                assert snapshot.arena.buffer.device.type == machine.device.type
                self.window[snapshot.step] = {n: plain(t) for n, t in snapshot.arena.tensors().items()}

        window: dict[int, dict[str, Tensor]] = {}  # noqa: RUF012

    # Lightning begins the data again; after eight batches they are the same once more.
    saved_at, machine = 16, machine.plain()  # what pretends to be on a GPU can't be saved
    with folder() as path, deterministic(), machine.trains():
        saver = ModelCheckpoint(
            path / "saved", save_top_k=-1, every_n_train_steps=saved_at, filename="{step}"
        )
        kept, begun = Kept(), Begun()
        unbroken = fit(machine, merging(path / "run"), kept, saver, steps=STEPS, enable_checkpointing=True)
        again = merging(path / "run")
        saved = path / "saved" / f"step={saved_at}.ckpt"
        resumed = fit(machine, again, begun, steps=STEPS, ckpt_path=saved)
    if name := first_difference(resumed.weights, unbroken.weights):
        raise AssertionError(f"the weights differ at the end: {name}")
    assert [*begun.window] == [saved_at - 2 * EVERY, saved_at - EVERY, saved_at], (
        f"the window is {[*begun.window]}"
    )
    for step, weights in begun.window.items():
        if name := first_difference(weights, kept.weights[step]):
            raise AssertionError(f"the snapshot of step {step} differs: {name}")
    return Outcome(f"window {[*begun.window]}")


@SECTION.check("torch.compile", SAME, 15)
def compiled(machine: Machine) -> Outcome:
    module = partial(Classifier, layers=1, compiled="dry" if machine.is_dry else "default")
    return the_same(machine.plain(), module, storage="device")


@SECTION.check("torch.compile with CUDA graphs", SAME, 15)
def graphs(machine: Machine) -> Outcome:
    module = partial(Classifier, layers=1, compiled="dry" if machine.is_dry else "reduce-overhead")
    return the_same(machine.plain(), module, storage="disk")
