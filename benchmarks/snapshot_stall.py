"""How long a snapshot holds up training, seen from outside: whole steps, and whole hooks.

Imported by ``overhead.py``. A module with many weights and short steps takes a snapshot every few steps. Of
each snapshot but the first ones, which allocate memory:

* ``stall``: how much longer the step with the snapshot lasts than its quiet neighbours;
* ``after``: how much longer the steps right after it last, all together, while it may still be written;
* ``hook``: the time inside our hook;
* ``durable``: from that hook's begin until the window's manifest names the snapshot.

Beside it the same of a checkpoint of the weights alone (Lightning's ``ModelCheckpoint``), and a bare copy.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from record import QUIET
from spike_recovery import Wide

from merge_callback import CheckpointMergeCallback

EVERY = 24
"""Steps between snapshots."""
AFTER = 8
"""Steps after a snapshot in which it may still be written; then it is waited for, which is not measured."""
WARMUP = 2
"""Snapshots that are not measured."""


class TimedHook(CheckpointMergeCallback):
    """The callback with a stopwatch around the hook that takes snapshots."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.began: dict[int, float] = {}  # by step; on the wall clock, as files are dated
        self.seconds: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.began[trainer.global_step], start = time.time(), time.perf_counter()
        super().on_train_batch_end(trainer, *args)
        self.seconds[trainer.global_step] = time.perf_counter() - start


class WholeSteps(Callback):
    """Times every step from the start of its batch to the start of the next one, all callbacks included.

    Args:
        window: the folder to wait for, where the steps after a snapshot are over; ``None`` for no waiting.
    """

    def __init__(self, window: Path | None = None) -> None:
        self.window = window
        self.seconds: dict[int, float] = {}
        self.durable: dict[int, float] = {}  # when, by the step of the snapshot
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        synchronize()
        step = trainer.global_step
        self.seconds[step] = time.perf_counter() - self._start
        if self.window is not None and step > EVERY and step % EVERY == AFTER:
            self.durable[step - AFTER] = named_in_manifest(self.window, step - AFTER)
        self._start = time.perf_counter()


def synchronize() -> None:
    """Waits for the device, so that the wall clock tells what it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def named_in_manifest(window: Path, step: int, patience: float = 120.0) -> float:
    """When the manifest that names this snapshot was written, by the wall clock; NaN where it never was."""
    manifest, end = window / "manifest.json", time.monotonic() + patience
    while time.monotonic() < end:
        try:
            written = manifest.stat().st_mtime
            if step in (entry["step"] for entry in json.loads(manifest.read_text())["snapshots"]):
                return written
        except (OSError, ValueError):
            pass  # not there yet
        time.sleep(0.002)
    return float("nan")


def measure_stalls(millions: int, repeats: int, accelerator: str) -> dict[str, dict[str, float]]:
    """Median seconds of each way to keep the weights of a model of so many million fp32 parameters."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for storage in ("disk", "cpu", "device"):
            folder = Path(name) / storage
            callback = TimedHook(
                window=3, every_n_steps=EVERY, dirpath=folder, storage=storage, emit_every=0, evaluate=False
            )
            steps = WholeSteps(folder / "window")
            fit(millions, repeats, accelerator, [callback, steps])
            found[f"snapshot, {storage}"] = of_snapshots(steps, repeats, callback)
        saver = ModelCheckpoint(
            dirpath=Path(name) / "saved", every_n_train_steps=EVERY, save_weights_only=True, save_top_k=1
        )
        steps = WholeSteps()
        fit(millions, repeats, accelerator, [steps, saver])
        found["ModelCheckpoint, weights only"] = of_snapshots(steps, repeats)
    found["copy of the weights"] = {"copy": copy_seconds(millions, accelerator)}
    return found


def fit(millions: int, repeats: int, accelerator: str, callbacks: list[Callback]) -> None:
    """Trains until the snapshots that are measured are taken, and their neighbours passed."""
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=(WARMUP + repeats + 1) * EVERY - 1,
        callbacks=callbacks,
        **{**QUIET, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)},
    )
    rows = torch.randn(4 * EVERY * (WARMUP + repeats + 1), 1000)
    trainer.fit(Wide(millions), torch.utils.data.DataLoader(rows, batch_size=4))


def of_snapshots(steps: WholeSteps, repeats: int, callback: TimedHook | None = None) -> dict[str, float]:
    """The medians over the snapshots that are measured."""
    each: dict[str, list[float]] = {}
    for snapshot in range((WARMUP + 1) * EVERY, (WARMUP + repeats) * EVERY + 1, EVERY):
        # The step that is waited in is not timed. Those before the next snapshot are quiet.
        after = [steps.seconds[snapshot + i] for i in range(1, AFTER + 1)]
        quiet = statistics.median(steps.seconds[snapshot + i] for i in range(AFTER + 1, EVERY - 1))
        measured = {
            "stall": steps.seconds[snapshot] - quiet,
            "after": sum(after) - AFTER * quiet,
            "quiet step": quiet,
        }
        if callback is not None:
            measured["hook"] = callback.seconds[snapshot]
            measured["durable"] = steps.durable[snapshot] - callback.began[snapshot]
        for what, seconds in measured.items():
            each.setdefault(what, []).append(seconds)
    return {what: statistics.median(seconds) for what, seconds in each.items()}


def copy_seconds(millions: int, accelerator: str, repeats: int = 9) -> float:
    """A copy of the weights to host memory that is there already, tensor by tensor."""
    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    weights = list(Wide(millions).to(device).parameters())
    kept = [torch.zeros(w.shape, pin_memory=device == "cuda") for w in weights]
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            for copy, weight in zip(kept, weights, strict=True):
                copy.copy_(weight, non_blocking=True)
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
