"""What a merge of the window owns."""

import threading
from dataclasses import dataclass

import pytest
import torch
from codec_windows import new_window, take
from training_runs import assert_same_bits

from merge_callback.merging import MergeMethod, resolve_method
from merge_callback.snapshots import merge_pass
from merge_callback.snapshots.arena_merge import merge_arenas
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.storage import DeviceMemory
from merge_callback.snapshots.window_merger import WindowMerger


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


CANDIDATES = {
    "wma": resolve_method("wma"),
    "ema-3": resolve_method("ema", last=3),
    "wsm-back": resolve_method("wsm", order="reversed"),
    "ties": resolve_method("ties"),
    "slerp-2": resolve_method("slerp", last=2),
}


def tensors_at(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(33, 7, generator=generator),
        "half": torch.randn(50, generator=generator).bfloat16(),
        "wide": torch.randn(9, generator=generator, dtype=torch.float64),
        "count": torch.tensor([step]),
        "router.bias": torch.randn(5, generator=generator),
        "mean": torch.ones(4),
    }


def filled(codec=""):
    window = new_window(tensors_at(0), size=5, codec=codec)
    for step in range(1, 6):
        take(window, step, tensors_at(step))
    return window


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("codec", ["", "delta-fp16"])
def test_each_candidate_has_the_bits_of_its_own_merge(codec, has_room, monkeypatch):
    if not has_room:
        monkeypatch.setattr(DeviceMemory, "free_bytes", lambda *_: 0)
    window, model = filled(codec), ModelTensors(tensors_at(5), buffers=frozenset({"count", "mean"}))
    merger = WindowMerger(
        window,
        {"stable": resolve_method("sma")},
        2,
        ["*.bias"],
        candidates={**CANDIDATES, "sma": resolve_method("sma")},
    )
    merger.measure(model, merge=True)

    assert (merger.default, merger.names) == ("sma", [*CANDIDATES])
    assert len({merger.candidate(model, n).arena.buffer.data_ptr() for n in CANDIDATES}) == (
        len(CANDIDATES) if has_room else 1
    )
    for name, method in {"sma": resolve_method("sma"), **CANDIDATES}.items():
        alone = WindowMerger(window, {"stable": method}, 2, ["*.bias"])
        alone.measure(model, merge=True)
        expected = alone.current(model)
        found = merger.current(model) if name == "sma" else merger.candidate(model, name)
        assert_same_bits(found.arena.tensors(), expected.arena.tensors())
        assert (found.name, found.copied, found.weights) == (name, expected.copied, expected.weights)
        assert [s.step for s in found.snapshots] == [s.step for s in method.select(window.snapshots)]
        assert merger.diversity == alone.diversity
    newest = merger.current(model).arena.tensor("router.bias")
    torch.testing.assert_close(newest, tensors_at(5)["router.bias"], atol=2e-3, rtol=0)  # the codec's


def test_all_linear_candidates_are_made_in_one_pass(monkeypatch):
    passes = []

    def counting(arenas, sums=(), *rest):
        passes.append(len(sums))
        return merge_arenas(arenas, sums, *rest)

    monkeypatch.setattr(merge_pass, "merge_arenas", counting)
    merger = WindowMerger(filled(), {"stable": resolve_method("sma")}, 2, candidates=CANDIDATES)
    merger.measure(ModelTensors(), merge=True)
    for name in merger.names:
        assert merger.candidate(ModelTensors(), name) is not None
    assert passes == [4]  # the default and three candidates; with the diversity


def test_a_candidate_that_cannot_be_made_is_no_reason_to_go_without_the_others(caplog):
    @dataclass(frozen=True)
    class Broken(MergeMethod):
        def merge(self, inputs, out, trajectory, survey=None):
            raise RuntimeError("on purpose")

    candidates = {"broken": Broken(), **CANDIDATES}
    merger = WindowMerger(filled(), {"stable": resolve_method("sma")}, 2, candidates=candidates)
    merger.measure(ModelTensors(), merge=True)
    assert merger.candidate(ModelTensors(), "broken") is None
    assert merger.current(ModelTensors()) is not None
    assert all(merger.candidate(ModelTensors(), name) for name in CANDIDATES)
    assert "the candidate broken was left out: on purpose" in caplog.text
