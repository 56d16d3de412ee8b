"""What the callback costs a run: a step between snapshots, a snapshot, and a restore.

    python benchmarks/overhead.py             # 8 minutes on two cores
    python benchmarks/overhead.py --quick     # 2 minutes

* **Whole steps** of the demo's training without a callback, with this one, with Lightning's
  ``EMAWeightAveraging``, and with OLMo-core's way of merging: to average the weights of every step. The
  variants take turns within each round, so that a machine whose speed drifts slows all of them alike;
  quoted is the median over rounds of the ratio of median step times.
* **The time inside our hooks** of a step between snapshots and of a micro-batch that ends no step, far below
  the noise of a ratio: in the demo, whose training empties the caches in between, and in a loop, as Python.
* **A snapshot**, see ``snapshot_stall.py``.
* **A restore after a spike**, see ``spike_recovery.py``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from record import QUIET, write
from snapshot_stall import measure_stalls
from spike_recovery import time_restores
from torch import Tensor

from merge_callback import CheckpointMergeCallback
from merge_callback.demo.crops import DemoData
from merge_callback.demo.module import DemoModule
from merge_callback.trainers.lightning.private import step_progress

FAR = 10**9  # an interval that no fit here reaches

VARIANTS = (
    "no callback",
    "merge callback, steps",
    "merge callback, tokens",
    "EMAWeightAveraging",
    "average of every step",
)


class StepTimes(Callback):
    """Times whole steps, data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self, warmup: int) -> float:
        ends = self.ends[warmup:]
        return statistics.median(b - a for a, b in pairwise(ends))


class AverageOfEveryStep(Callback):
    """What OLMo-core's ``ModelMergeCallback`` does in each step of a merge's window.

    From its definition: it waits for a copy of the weights on the CPU, and adds it to their mean in fp32.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps += 1
        for name, tensor in pl_module.state_dict().items():
            weights = tensor.detach().to("cpu", torch.float32)
            if self.steps == 1:
                self.mean[name] = torch.zeros_like(weights)
            self.mean[name].lerp_(weights, 1 / self.steps)


class HookTimes(CheckpointMergeCallback):
    """The callback with a stopwatch around the hooks that every batch passes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps: list[float] = []  # of batches that end an optimizer step
        self.micro_batches: list[float] = []  # of those that don't
        self._spent, self._steps = 0.0, False

    def on_train_batch_start(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_start(*args)
        self._spent, self._steps = time.perf_counter() - start, False

    def on_before_optimizer_step(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self._spent, self._steps = self._spent + time.perf_counter() - start, True

    def on_train_batch_end(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        spent = self._spent + time.perf_counter() - start
        (self.steps if self._steps else self.micro_batches).append(spent)


class HooksInALoop(Callback):
    """Calls the hooks of a live session again and again: the Python in them alone, its caches warm."""

    def __init__(self, merging: CheckpointMergeCallback, at_step: int = 20, repeats: int = 3000) -> None:
        self.merging, self.at_step, self.repeats = merging, at_step, repeats
        self.seconds: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.at_step:
            return
        progress, merging, optimizer = step_progress(trainer), self.merging, trainer.optimizers[0]
        for _ in range(self.repeats):
            progress.completed += 1
            start = time.perf_counter()
            for _ in range(6):  # Lightning names each hook of a step for its profiler
                merging.state_key  # noqa: B018
            merging.on_train_batch_start(trainer, pl_module, batch, batch_idx)
            merging.on_before_optimizer_step(trainer, pl_module, optimizer)
            merging.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self.seconds.append(time.perf_counter() - start)
        progress.completed -= self.repeats


def fit(callbacks: list[Callback], steps: int, folder: str, accelerator: str, accumulate: int = 1) -> None:
    """Trains the demo."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(DemoModule(), datamodule=DemoData())


def variant(name: str, folder: str) -> list[Callback]:
    if name == "merge callback, steps":
        return [CheckpointMergeCallback(every_n_steps=FAR, dirpath=f"{folder}/merges")]
    if name == "merge callback, tokens":
        return [CheckpointMergeCallback(every_n_tokens=FAR * 1000, dirpath=f"{folder}/merges")]
    if name == "EMAWeightAveraging":
        return [EMAWeightAveraging()]
    return [AverageOfEveryStep()] if name == "average of every step" else []


def measure_steps(rounds: int, steps: int, accelerator: str) -> dict[str, Any]:
    """Seconds of a whole step, by variant, and the ratio to those without a callback."""
    medians: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in VARIANTS:
                times = StepTimes()
                fit([*variant(name, folder), times], steps, folder, accelerator)
                medians[name].append(times.median(warmup=steps // 6))
    plain = medians["no callback"]
    return {
        name: {
            "seconds": statistics.median(found),
            "ratio": statistics.median(f / p for f, p in zip(found, plain, strict=True)),
        }
        for name, found in medians.items()
    }


def measure_hooks(steps: int, accelerator: str) -> dict[str, Any]:
    """Seconds inside our hooks of a step, and of a micro-batch that ends none, between snapshots."""
    with tempfile.TemporaryDirectory() as folder:
        plain = HookTimes(every_n_tokens=FAR * 1000, dirpath=f"{folder}/plain")
        fit([plain], steps, folder, accelerator)
        accumulating = HookTimes(every_n_tokens=FAR * 1000, dirpath=f"{folder}/accumulating")
        fit([accumulating], steps // 4, folder, accelerator, accumulate=4)
        looping = CheckpointMergeCallback(every_n_tokens=FAR * 1000, dirpath=f"{folder}/looping")
        fit([looping, loop := HooksInALoop(looping)], loop.at_step, folder, accelerator)
    return {
        "optimizer step, in a loop": _spread(loop.seconds),
        "optimizer step": _spread(plain.steps),
        "micro-batch": _spread(accumulating.micro_batches),
        "optimizer step of 4 micro-batches, its last": _spread(accumulating.steps),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    known = sorted(seconds[len(seconds) // 6 :])  # the first ones find out what batches hold
    return {
        "fastest_tenth": known[len(known) // 10],
        "median": statistics.median(known),
        "mean": statistics.fmean(known),
    }


def print_steps(found: dict[str, Any]) -> None:
    for name, step in found.items():
        print(f"{name:44} {1e3 * step['seconds']:8.2f} ms a step   x{step['ratio']:.3f}", flush=True)


def print_hooks(found: dict[str, Any]) -> None:
    for name, seconds in found.items():
        median, mean = 1e6 * seconds["median"], 1e6 * seconds["mean"]
        print(f"hooks: {name:44} median {median:.1f} µs, mean {mean:.1f} µs", flush=True)


def print_targets(step: dict[str, Any], hooks: dict[str, Any]) -> None:
    looped, inside = hooks["optimizer step, in a loop"]["median"], hooks["optimizer step"]["mean"]
    share = 100 * inside / step["no callback"]["seconds"]
    print(f"  in a loop {1e6 * looped:.1f} µs (target 15); {share:.2f} % of the demo's step (target 0.5)")


def print_stalls(millions: int, found: dict[str, Any]) -> None:
    for name, seconds in found.items():
        times = ", ".join(f"{what} {1e3 * s:.1f} ms" for what, s in seconds.items())
        print(f"{millions:>4} M: {name:30} {times}", flush=True)


def print_restore(found: dict[str, Any]) -> None:
    seconds, ratio = found["seconds"]["restore"], found["restore_to_merge_and_copy"]
    millions = found["parameters"] // 10**6
    print(f"{millions:>4} M: a restore {1e3 * seconds:.0f} ms, x{ratio:.2f} of one merge and one copy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and the smaller model only")
    parser.add_argument("--accelerator", default="auto", help="as Lightning names it")
    parser.add_argument("--rounds", type=int, help="of whole fits")
    parser.add_argument("--steps", type=int, help="of a fit")
    options = parser.parse_args()
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rounds = options.rounds or (3 if options.quick else 7)
    steps = options.steps or (48 if options.quick else 120)
    sizes, repeats = ((25,), 3) if options.quick else ((25, 100), 6)
    print_steps(step := measure_steps(rounds, steps, options.accelerator))
    print_hooks(hooks := measure_hooks(4 * steps, options.accelerator))
    print_targets(step, hooks)
    stalls = {}
    for millions in sizes:
        stalls[millions] = measure_stalls(millions, repeats, options.accelerator)
        print_stalls(millions, stalls[millions])
    print_restore(restore := time_restores(sizes[-1], repeats, options.accelerator))
    figures = {
        "accelerator": options.accelerator,
        "rounds": rounds,
        "steps_per_fit": steps,
        "snapshots": repeats,
        "step": step,
        "hooks": hooks,
        "snapshot": {f"{millions} million parameters": found for millions, found in stalls.items()},
        "restore": restore,
    }
    print(write("overhead", figures))


if __name__ == "__main__":
    main()
