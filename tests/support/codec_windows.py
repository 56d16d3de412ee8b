"""Windows that are kept as differences, for tests: how they are made, read and judged."""

import torch

from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window import Window

CODEC = "delta-fp16"


RELATIVE = {"delta-fp16": 2.0**-11, "delta-bf16": 2.0**-8}
"""The largest relative error of a difference: fp16 has 11 significant bits, bf16 has 8."""


TINY = {"delta-fp16": 2.0**-35, "delta-bf16": 2.0**-134}
"""The largest error below the normal numbers; those of fp16 count in units of 2⁻¹⁰."""


ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""The largest relative error of a sum in that dtype."""


def new_window(tensors, size=10, folder=None, static=(), codec=CODEC):
    """An empty window for such tensors, in memory or, given a folder, on disk."""
    layout = Layout.of(tensors, static=static)
    store = SnapshotStore(layout, "disk" if folder else "cpu", folder, codec=codec)
    return Window(size, store, "run")


def take(window, step, tensors):
    window.add(Snapshot(step, step, 0.1, 1.0, "stable", 0, step), window.capture(tensors))


def decoded(window):
    """Copies of every snapshot's tensors, flat, by its step."""
    arenas = [snapshot.arena for snapshot in window.snapshots]
    return {
        snapshot.step: {name: flat[:].clone() for name, flat in flat_tensors(arenas[: i + 1]).items()}
        for i, snapshot in enumerate(window.snapshots)
    }


def assert_rounded_once(found, weights, before, codec=CODEC):
    """``found`` is off by one rounding of the way from ``before``, and one of the sum."""
    error, way = (found.double() - weights.double()).abs(), (weights.double() - before.double()).abs()
    # The way is itself rounded before it is, hence a little more than one rounding of it.
    relative = RELATIVE[codec] * (1 + RELATIVE[codec])
    bound = relative * way + 1.01 * ROUNDING[found.dtype] * found.double().abs() + TINY[codec]
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"
