"""How many Python calls a snapshot takes on its way to a published merge, and through how many files.

    python benchmarks/call_trace.py                 # writes results/call_trace.json; seconds
    python benchmarks/call_trace.py --top 30        # prints the functions that are called most often
    python benchmarks/call_trace.py --against ../before         # the same of another checkout, too

A tiny model is fitted with the callback. Of one snapshot, taken once the window is full, all threads are
traced from the call of ``take_snapshot`` until nothing is left to do in the background: its merge is
published by then. Counted are the calls into ``merge_callback`` alone; each resumption of a generator counts
as a call. What training does in the meantime is not counted, as it waits.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from record import QUIET, write
from torch import Tensor, nn

import merge_callback
from merge_callback import CheckpointMergeCallback
from merge_callback.engine.session import MergeSession

PACKAGE = str(Path(merge_callback.__file__).parent)

VARIANTS: dict[str, dict[str, Any]] = {
    "disk": {},
    "cpu": {"storage": "cpu"},
    "disk, delta-fp16": {"snapshot_codec": "delta-fp16"},
}
WINDOW, EVERY, TRACED = 3, 2, 5
"""Snapshots that are kept, steps between them, and which of them is traced."""


class Tiny(LightningModule):
    """Two blocks and a head, with buffers that change: 16 tensors."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)]
        self.net = nn.Sequential(*blocks, nn.Linear(8, 4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Trace:
    """Counts the calls of the package's functions, in this thread and in those that begin while it is on."""

    def __init__(self) -> None:
        self.calls: Counter[CodeType] = Counter()

    def on(self) -> None:
        """Begins to count."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def off(self) -> None:
        """Ends counting, in this thread and in those that are yet to begin."""
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls[frame.f_code] += 1

    def figures(self) -> dict[str, int]:
        """Calls, and the distinct functions and files that they went into."""
        files = {code.co_filename for code in self.calls}
        return {"calls": sum(self.calls.values()), "functions": len(self.calls), "files": len(files)}

    def top(self, count: int) -> list[str]:
        """The functions that are called most often, a line each."""
        return [
            f"{calls:5d}  {code.co_filename.removeprefix(PACKAGE)}:{code.co_firstlineno} {code.co_qualname}"
            for code, calls in self.calls.most_common(count)
        ]


def wait_for_background() -> None:
    """Waits until no thread of the callback is at work."""
    for thread in threading.enumerate():
        if thread.name.startswith("merge-background"):
            thread.join()


def traced(**options: Any) -> Trace:
    """Fits the model and traces one snapshot."""
    trace, taken, take = Trace(), [0], MergeSession.take_snapshot

    def take_snapshot(session: MergeSession) -> None:
        taken[0] += 1
        wait_for_background()
        if taken[0] != TRACED:
            return take(session)
        trace.on()
        take(session)
        sys.setprofile(None)
        wait_for_background()
        trace.off()

    MergeSession.take_snapshot = take_snapshot  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            callback = CheckpointMergeCallback(
                window=WINDOW, every_n_steps=EVERY, dirpath=folder, evaluate=False, **options
            )
            steps = TRACED * EVERY + 1
            trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[callback], **QUIET)
            trainer.fit(Tiny(), torch.utils.data.DataLoader(torch.randn(8 * steps, 8), batch_size=8))
            merges = sorted(Path(folder).glob("step=*/merge.json"))
            assert f"step={TRACED * EVERY:08d}" in str(merges[-1]), "the traced snapshot's merge is missing"
    finally:
        MergeSession.take_snapshot = take  # type: ignore[method-assign]
    return trace


def measured(top: int) -> dict[str, Any]:
    """The figures of all variants."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    figures = {}
    for name, variant in VARIANTS.items():
        trace = traced(**variant)
        figures[name] = trace.figures()
        print(name, *trace.top(top), sep="\n", file=sys.stderr)
    return figures


def main() -> None:
    """Traces all variants and writes their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--top", type=int, default=0, help="print so many functions of each variant")
    parser.add_argument("--against", type=Path, help="a checkout that is measured, too: as `before`")
    parser.add_argument("--print", action="store_true", help="print the figures instead of writing them")
    options = parser.parse_args()
    if options.print:
        print(json.dumps(measured(options.top)))
        return
    figures: dict[str, Any] = {"tensors": len(Tiny().state_dict()), "window": WINDOW}
    if options.against is not None:
        environment = {**os.environ, "PYTHONPATH": str(options.against.resolve())}
        command = [sys.executable, __file__, "--print"]
        found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        figures["before"] = json.loads(found.stdout.splitlines()[-1])
    figures["now"] = measured(options.top)
    print(json.dumps(figures, indent=2))
    write("call_trace", figures)


if __name__ == "__main__":
    main()
