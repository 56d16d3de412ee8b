"""What the callback costs a step between snapshots, against no callback and Lightning's EMA callback.

    python benchmarks/overhead.py

Runs the demo's training in short fits, the variants in turn within each round, so that a machine whose speed
drifts slows all of them alike. Quotes the median over rounds of the ratio of median step times. The time
inside the callback's own hooks is measured directly as well: it is far below the noise of a ratio.
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
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from record import write

from merge_callback import CheckpointMergeCallback
from merge_callback.demo.crops import DemoData
from merge_callback.demo.module import DemoModule

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
FAR = 10**9  # an interval that no fit here reaches


class StepTimes(Callback):
    """Times whole steps, data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self, warmup: int) -> float:
        ends = self.ends[warmup:]
        return statistics.median(b - a for a, b in pairwise(ends))


class HookTimes(CheckpointMergeCallback):
    """The callback with a stopwatch around the hooks it has on the step path."""

    spent = 0.0


def _timed(name: str) -> Any:
    def hook(self: HookTimes, *args: Any) -> None:
        start = time.perf_counter()
        getattr(CheckpointMergeCallback, name)(self, *args)
        self.spent += time.perf_counter() - start

    return hook


for _name in HOOKS:
    setattr(HookTimes, _name, _timed(_name))


def fit(callbacks: list[Callback], steps: int, folder: str) -> None:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DemoModule(), datamodule=DemoData())


def variant(name: str, folder: str) -> list[Callback]:
    if name == "merge callback":
        return [CheckpointMergeCallback(every_n_steps=FAR, dirpath=f"{folder}/merges")]
    if name == "merge callback, tokens":
        return [CheckpointMergeCallback(every_n_tokens=FAR * 1000, dirpath=f"{folder}/merges")]
    return [EMAWeightAveraging()] if name == "EMAWeightAveraging" else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    names = ["no callback", "merge callback", "merge callback, tokens", "EMAWeightAveraging"]
    medians: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in names:
                times = StepTimes()
                fit([*variant(name, folder), times], options.steps, folder)
                medians[name].append(times.median(warmup=20))
        watched = HookTimes(every_n_tokens=FAR * 1000, dirpath=f"{folder}/merges")
        fit([watched], 5 * options.steps, folder)
    plain = medians["no callback"]
    ratios = {n: statistics.median(t / p for t, p in zip(medians[n], plain, strict=True)) for n in names}
    hooks = watched.spent / (5 * options.steps)
    share = hooks / statistics.median(plain)
    for name in names:
        print(f"{name:24} {1e3 * statistics.median(medians[name]):7.2f} ms a step   x{ratios[name]:.3f}")
    print(f"{'inside the hooks':24} {1e6 * hooks:7.1f} µs a step   {100 * share:.2f} % of the step")
    figures = {
        "steps_per_fit": options.steps,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "median_step_seconds": {n: statistics.median(m) for n, m in medians.items()},
        "ratio_to_no_callback": ratios,
        "hook_seconds_per_step": hooks,
        "hook_share_of_step": share,
    }
    print(write("overhead", figures))


if __name__ == "__main__":
    main()
