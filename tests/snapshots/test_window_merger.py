"""What a merge of the window owns."""

import threading

import torch
from codec_windows import new_window, take

from merge_callback.merging import resolve_method
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.merge import WindowMerger


def merger_of(*values):
    """The merger of a window in memory with snapshots that hold one value each."""
    window = new_window({"weight": torch.zeros(8)}, size=2, codec="")
    for step, value in enumerate(values, 1):
        take(window, step, {"weight": torch.full((8,), float(value))})
    return WindowMerger(window, {"stable": resolve_method("sma")}, 1)


def test_a_merge_keeps_its_memory_until_it_is_published():
    merger = merger_of(1, 2)
    first = merger.current(ModelTensors())
    published, found = threading.Event(), []
    first.published = published.wait

    def publish():
        found.append(first.arena.tensor("weight").clone())
        published.set()

    take(merger.window, 3, {"weight": torch.full((8,), 3.0)})
    threading.Timer(0.1, publish).start()
    merger.measure(ModelTensors(), merge=True)
    second = merger.current(ModelTensors())

    assert found[0].tolist() == [1.5] * 8
    assert second.arena.tensor("weight").tolist() == [2.5] * 8
    assert second.arena.buffer.data_ptr() == first.arena.buffer.data_ptr()


def test_the_change_of_diversity_is_from_the_first_that_was_measured():
    merger = merger_of(0, 2)
    merger.measure(ModelTensors(), merge=False)
    assert merger.diversity["rms"] == merger.first_rms == 2.0
    assert merger.diversity["change_percent"] == 0.0

    take(merger.window, 3, {"weight": torch.full((8,), 3.0)})
    merger.measure(ModelTensors(), merge=True)
    assert merger.diversity["rms"] == 1.0
    assert merger.diversity["change_percent"] == -50.0
