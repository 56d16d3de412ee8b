"""What a model of 20,000 small tensors costs: Python in training's thread, and the GIL in the background.

    python benchmarks/many_tensors.py                          # 5 minutes on two cores
    python benchmarks/many_tensors.py --against ../before      # the same of another checkout, taking turns

A mixture of experts is trained with the callback; its experts are matrices of 16 × 16, so the bytes weigh
little, and what is measured is what each tensor costs. Of every snapshot but the first ones, which allocate:

* ``snapshot``: seconds inside ``take_snapshot``, in training's thread;
* ``processor``: the same without the time for which another process, or the background, had the processor;
* ``look``: seconds of the processor before that, in ``follow_model``: whether the model has the same tensors;
* ``bytes``: of that, one ``torch._foreach_copy_`` of all tensors to memory that is there: the copy alone;
* ``python``: the rest of ``processor``;
* ``longest``: the longest time for which another Python thread could not run while the background kept,
  measured, merged and published the snapshot; ``over 1 ms`` is the sum of all such times of 1 ms and more.
  Both contain what the operating system's scheduler adds: look at the fastest snapshots.

Half of the parameters are frozen in one of the runs; what is frozen is compared, not copied.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from record import QUIET, write
from torch import Tensor, nn

from merge_callback import CheckpointMergeCallback

VARIANTS: dict[str, dict[str, Any]] = {
    "disk": {"storage": "disk"},
    "cpu, delta-fp16": {"storage": "cpu", "snapshot_codec": "delta-fp16"},
    "disk, half of it frozen": {"storage": "disk"},
}
WARMUP = 5
"""Snapshots that are not measured: until the window is full, each one allocates memory."""


class Experts(LightningModule):
    """So many matrices, of which few take part in a step."""

    def __init__(self, tensors: int, frozen: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("gate", "up")})
            for _ in range(tensors // 2)
        )
        for expert in self.experts if frozen else ():
            expert["gate"].requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        pair = self.experts[batch_idx % len(self.experts)]
        return (pair["up"](pair["gate"](batch)) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-3)


class Probe(threading.Thread):
    """Notes how long another Python thread has to wait to run."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gaps: list[float] = []
        self._stop_asked = threading.Event()

    def run(self) -> None:
        last = time.perf_counter()
        while not self._stop_asked.is_set():
            time.sleep(1e-4)
            now = time.perf_counter()
            self.gaps.append(now - last)
            last = now

    def longest(self) -> tuple[float, float]:
        """The longest gap, and the sum of those of 1 ms and more."""
        self._stop_asked.set()
        self.join()
        return max(self.gaps), sum(gap for gap in self.gaps if gap > 1e-3)


class Timed(CheckpointMergeCallback):
    """The callback with a stopwatch around ``take_snapshot`` and a probe beside the background's jobs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.found: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.session is not None
        self.session.follow_model = self._looked(self.session.follow_model)  # type: ignore[method-assign]
        self.session.take_snapshot = self._timed(self.session.take_snapshot, pl_module)  # type: ignore[method-assign]

    def _looked(self, look: Any) -> Any:
        def looked() -> Any:
            busy = time.thread_time()
            session = look()
            self.found.setdefault("look", []).append(time.thread_time() - busy)
            return session

        return looked

    def _timed(self, take: Any, module: nn.Module) -> Any:
        live = list(module.parameters())
        kept = [torch.zeros_like(p) for p in live]

        def timed() -> None:
            assert self.session is not None
            start, busy = time.perf_counter(), time.thread_time()
            take()
            seconds, busy = time.perf_counter() - start, time.thread_time() - busy
            (probe := Probe()).start()
            self.session.background.drain()
            longest, lost = probe.longest()
            copied = -time.thread_time()
            with torch.no_grad():
                torch._foreach_copy_(kept, live)
            copied += time.thread_time()
            measured = {
                "snapshot": seconds,
                "processor": busy,
                "bytes": copied,
                "longest": longest,
                "over 1 ms": lost,
            }
            for what, value in measured.items():
                self.found.setdefault(what, []).append(value)

        return timed


def measure(variant: str, tensors: int, snapshots: int) -> dict[str, list[float]]:
    """Seconds of each measured snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        callback = Timed(
            window=3,
            every_n_steps=1,
            dirpath=folder,
            spike=None,
            evaluate=False,
            keep_last=1,
            **VARIANTS[variant],
        )
        steps = WARMUP + snapshots
        trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[callback], **QUIET)
        rows = torch.randn(4 * steps, 16)
        trainer.fit(Experts(tensors, "frozen" in variant), torch.utils.data.DataLoader(rows, batch_size=4))
    return {what: seconds[WARMUP:] for what, seconds in callback.found.items()}


def measured_in(checkout: Path, variant: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """The same, of another checkout's package, in a process of its own."""
    command = [sys.executable, __file__, "--variant", variant, "--tensors", str(options.tensors)]
    command += ["--snapshots", str(options.snapshots)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(rounds: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median and fastest of all rounds' snapshots."""
    joined = {what: [seconds for found in rounds for seconds in found[what]] for what in rounds[0]}
    joined["python"] = [a - b for a, b in zip(joined["processor"], joined["bytes"], strict=True)]
    return {what: {"fastest": min(each), "median": statistics.median(each)} for what, each in joined.items()}


def against_targets(found: dict[str, dict[str, float]]) -> str:
    """What is aimed at, in one line: of the fastest snapshots the copy, of the median one the GIL."""
    copy, taken, look = (found[what]["fastest"] for what in ("bytes", "processor", "look"))
    return (
        f"  take_snapshot: {taken / copy:.2f} x _foreach_copy_ (target 1.3), "
        f"{(taken + look) / copy:.2f} x with the look at the model; "
        f"GIL held for {1e3 * found['longest']['median']:.1f} ms at most (target 5)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, whose package is measured in turn")
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--snapshots", type=int, default=6, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help="one round of it alone, printed as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.variant:
        print(json.dumps(measure(options.variant, options.tensors, options.snapshots)))
        return
    checkouts = {"here": Path(__file__).resolve().parents[1]}
    if options.against:
        checkouts = {"before": options.against.resolve(), **checkouts}
    figures: dict[str, Any] = {"tensors": options.tensors, "snapshots": options.rounds * options.snapshots}
    for variant in VARIANTS:
        rounds = [
            {name: measured_in(path, variant, options) for name, path in checkouts.items()}
            for _ in range(options.rounds)
        ]
        figures[variant] = {name: summary([found[name] for found in rounds]) for name in checkouts}
        for name, found in figures[variant].items():
            times = ", ".join(
                f"{what} {1e3 * t['median']:.1f} ({1e3 * t['fastest']:.1f})" for what, t in found.items()
            )
            print(f"{variant}, {name}: median (fastest) in ms: {times}", flush=True)
            if "half" not in variant:  # there, half of the tensors are not copied
                print(against_targets(found), flush=True)
    print(write("many_tensors", figures))


if __name__ == "__main__":
    main()
