"""What a narrower window costs in accuracy: raw bf16 snapshots, and differences in 16 bits, against fp32.

    python benchmarks/snapshot_codec.py

Trains the demo once, with four callbacks side by side that differ in how they keep snapshots, and compares
all they publish. Errors are relative to the update: the RMS distance of snapshots that follow each other, of
those that are merged.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from record import QUIET, write
from torch import Tensor

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.demo.crops import DemoData
from merge_callback.demo.module import DemoModule
from merge_callback.demo.run import DemoPlan

WINDOWS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "raw bf16": {"snapshot_dtype": "bf16"},
    "delta-bf16": {"snapshot_codec": "delta-bf16"},
    "delta-fp16": {"snapshot_codec": "delta-fp16"},
}


class Updates(Callback):
    """Measures how far the weights move between snapshots, by the step of the later one."""

    def __init__(self, every: int) -> None:
        self.every, self.rms = every, dict[int, float]()
        self._last: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            now = [p.detach().clone() for p in module.parameters()]
            if self._last:
                self.rms[trainer.global_step] = rms(now, self._last)
            self._last = now


def rms(a: list[Tensor], b: list[Tensor]) -> float:
    squares = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(squares / sum(x.numel() for x in a))


def train(plan: DemoPlan, folder: Path) -> dict[int, float]:
    seed_everything(0, verbose=False)
    updates = Updates(plan.snapshot_every)
    merging = [
        CheckpointMergeCallback(
            every_n_steps=plan.snapshot_every,
            dirpath=folder / name,
            method="sma",
            keep_last=None,
            evaluate=False,
            **options,
        )
        for name, options in WINDOWS.items()
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=plan.schedule.steps,
        callbacks=[*merging, updates],
        default_root_dir=folder,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(DemoModule(schedule=plan.schedule), datamodule=DemoData(epoch_batches=plan.schedule.steps))
    return updates.rms


def compare(folder: Path, updates: dict[int, float]) -> dict[str, dict[str, dict[str, float]]]:
    """The errors of each kind of window in each phase: the median and the largest over all merges."""
    errors: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in WINDOWS}
    for path in sorted((folder / "fp32").glob("step=*")):
        exact, truth = load_merge(path), json.loads((path / "merge.json").read_text())
        newest, steps = truth["snapshots"][-1], [s["step"] for s in truth["snapshots"][1:]]
        update = math.sqrt(statistics.mean(updates[step] ** 2 for step in steps))
        for name in list(WINDOWS)[1:]:
            other = folder / name / path.name
            merged, found = load_merge(other), json.loads((other / "merge.json").read_text())
            error = rms([merged[n] for n in exact], list(exact.values())) / update
            off = (
                abs(found["diversity"]["rms"] / truth["diversity"]["rms"] - 1) if truth["diversity"] else 0.0
            )
            errors[name].setdefault(newest["phase"], []).append((error, off))
    return {
        name: {phase: _summary(pairs) for phase, pairs in phases.items()}
        for name, phases in errors.items()
        if phases
    }


def _summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    merges, diversities = zip(*pairs, strict=True)
    return {
        "merges": len(pairs),
        "merge_error_median": statistics.median(merges),
        "merge_error_max": max(merges),
        "diversity_error_median": statistics.median(diversities),
        "diversity_error_max": max(diversities),
    }


def window_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("window/step=*"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the demo's lengths")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    plan = DemoPlan.scaled(options.scale)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        updates = train(plan, folder)
        errors = compare(folder, updates)
        sizes = {kind: window_bytes(folder / kind) for kind in WINDOWS}
    print(
        f"{'':12} {'phase':8} {'merges':>6}   {'merge error / update':>22}   {'diversity error':>22}   bytes"
    )
    for kind, phases in errors.items():
        for phase, e in phases.items():
            print(
                f"{kind:12} {phase:8} {e['merges']:6.0f}   {e['merge_error_median']:10.1e} to "
                f"{e['merge_error_max']:8.1e}   {e['diversity_error_median']:10.1e} to "
                f"{e['diversity_error_max']:8.1e}   {sizes[kind] / sizes['fp32']:.3f}"
            )
    figures = {
        "steps": plan.schedule.steps,
        "snapshot_every": plan.snapshot_every,
        "parameters": sum(p.numel() for p in DemoModule().parameters()),
        "dtype": str(torch.float32),
        "errors_relative_to_update": errors,
        "window_bytes": sizes,
        "bytes_relative_to_fp32": {kind: size / sizes["fp32"] for kind, size in sizes.items()},
    }
    print(write("snapshot_codec", figures))


if __name__ == "__main__":
    main()
