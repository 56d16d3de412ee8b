"""What a window of a mostly frozen model costs, as of a LoRA run, if what is frozen is kept once, and if not.

100 million fp32 parameters, ten snapshots. Writes ``results/frozen.json``::

    python benchmarks/frozen.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from record import write
from torch import nn

from merge_callback.merging import resolve_method
from merge_callback.snapshots import live_copy
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window import Window
from merge_callback.snapshots.window_merger import WindowMerger

WINDOW, SNAPSHOTS = 10, 20


class Mostly(nn.Module):
    """24 matrices, all frozen or all trained, and 1 % beside them that trains."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        matrices = (nn.Linear(2048, 2048, bias=False) for _ in range(24))
        self.base = nn.ModuleList(matrices).requires_grad_(not frozen)
        self.adapter = nn.ParameterList(torch.zeros(21_000) for _ in range(48))


def measure(folder: Path, kept_once: bool, frozen: bool) -> dict[str, Any]:
    """Medians over the snapshots of a full window, in milliseconds, and bytes."""
    live_copy._WORTH_A_FILE = 1 / 32 if kept_once else 2
    module = Mostly(frozen)
    store = SnapshotStore(Layout.of(ModelTensors.of(module).tensors), "disk", folder)
    window = Window(WINDOW, store, "run")
    merger = WindowMerger(window, {"stable": resolve_method("sma")}, 1)
    times: list[list[float]] = []
    for step in range(1, SNAPSHOTS + 1):
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, module.parameters()):
                parameter.add_(1e-3)
        live, marks = ModelTensors.of(module), [time.perf_counter()]
        captured = window.capture(live.tensors, live.frozen, step)
        marks.append(time.perf_counter())
        window.add(Snapshot(step, step, 0.1, 1.0, "stable", 0, step), captured)
        marks.append(time.perf_counter())
        merger.measure(live, merge=True)
        marks.append(time.perf_counter())
        times.append([b - a for a, b in pairwise(marks)])
    stall, keep, merge = (1e3 * statistics.median(column) for column in zip(*times[WINDOW:], strict=True))
    sizes = {path.name: path.stat().st_size for path in folder.glob("*step=*")}
    newest = next(size for name, size in sizes.items() if name.startswith(f"step={SNAPSHOTS:08d}"))
    return {
        "frozen": frozen,
        "kept_once": kept_once,
        "stall_ms": round(stall, 1),
        "keep_ms": round(keep, 1),
        "measure_and_merge_ms": round(merge, 1),
        "window_bytes": sum(sizes.values()),
        "bytes_a_snapshot": newest,
    }


def main() -> None:
    """Measures all cases and writes them."""
    torch.set_num_threads(1)
    cases = []
    for frozen, kept_once in ((True, False), (True, True), (False, False), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            cases.append(measure(Path(folder), kept_once, frozen))
        print(cases[-1])
    write("frozen", {"parameters": 101_671_296, "window": WINDOW, "storage": "disk", "cases": cases})


if __name__ == "__main__":
    main()
