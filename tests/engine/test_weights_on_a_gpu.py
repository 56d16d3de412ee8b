"""Merged validations, trials and restores of weights on a pretended GPU."""

from collections import Counter

import pytest
from pretend_gpu import OneGpu, plain, pretend_gpu, put_on
from spiking_runs import BURST, FIRES, RULES, Batches, Line, events
from training_runs import Classifier, assert_same_bits, loader, seed, train

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.snapshots import arena

TRAINING = "MainThread"


@pytest.fixture
def gpu(monkeypatch):
    with pretend_gpu(monkeypatch) as gpu:
        yield gpu


def pageable(gpu):
    """What training's thread copied between the package's tensors on the device and pageable memory."""
    return [wait for wait in gpu.waits_of_training() if "pageable" in wait[0] and "outside" not in wait[1]]


@pytest.mark.parametrize(
    ("storage", "has_room"),
    [("disk", True), ("disk", False), ("cpu", True), ("cpu", False), ("device", True)],
)
def test_a_merged_validation_swaps_weights_through_pinned_memory_only(
    tmp_path, gpu, monkeypatch, storage, has_room
):
    gpu.peak = 0 if has_room else gpu.capacity
    to_the_host, fetch = [], arena.fetch
    monkeypatch.setattr(arena, "fetch", lambda pairs: (to_the_host.append(1), fetch(pairs)))

    def validated(*callbacks, to=lambda module: module, **options):
        seed()
        module = Classifier()
        trainer = train(to(module), *callbacks, data=loader(), val=loader(16), **options)
        metrics = {name: plain(value) for name, value in trainer.callback_metrics.items()}
        return metrics, {name: plain(tensor) for name, tensor in module.state_dict().items()}

    def merging(name):
        return CheckpointMergeCallback(
            every_n_steps=3, dirpath=tmp_path / name, storage=storage, method="sma", window=3
        )

    found, weights = validated(merging("there"), to=put_on, strategy=OneGpu())
    expected, as_expected = validated(merging("here"))
    assert "merged/val_loss" in found
    assert_same_bits(found, expected)
    assert_same_bits(weights, as_expected)
    assert not pageable(gpu)
    # The live weights wait where the next snapshot will be copied to.
    assert bool(to_the_host) is not has_room
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    assert storage == "device" or Counter(gpu.allocated)[nbytes] == has_room


@pytest.mark.parametrize(
    ("storage", "has_room", "evidence"),
    [("disk", True, "batch"), ("disk", True, "rules"), ("cpu", False, "rules"), ("device", True, "rules")],
)
def test_a_restore_puts_weights_in_through_pinned_memory_only(tmp_path, gpu, storage, has_room, evidence):
    gpu.peak = 0 if has_room else gpu.capacity

    def restored(name, to=lambda module: module, **options):
        seed()
        module = Line()
        merging = CheckpointMergeCallback(
            every_n_steps=5,
            dirpath=tmp_path / name,
            storage=storage,
            emit_every=0,
            evaluate=False,
            spike=SpikeOptions(**{**RULES, "cooldown": 1000, "evidence": evidence}),
        )
        data = Batches(bad=BURST)
        train(to(module), merging, data=data, max_steps=FIRES + 2, **options)
        told = [{k: v for k, v in e.items() if k not in ("time", "seconds")} for e in events(tmp_path / name)]
        return told, {name: plain(tensor) for name, tensor in module.state_dict().items()}

    found, weights = restored("there", to=put_on, strategy=OneGpu())
    expected, as_expected = restored("here")
    assert [event["event"] for event in found] == ["restore" if evidence == "rules" else "hard data"]
    assert str(found) == str(expected)
    assert_same_bits(weights, as_expected)
    assert not pageable(gpu)


def test_a_snapshot_in_host_memory_is_read_from_the_device_once(tmp_path, monkeypatch):
    seed()
    with pretend_gpu(monkeypatch) as gpu:
        merging = CheckpointMergeCallback(every_n_steps=4, dirpath=tmp_path, storage="cpu", evaluate=False)
        train(put_on(Classifier()), merging, data=loader(), strategy=OneGpu())
    arrivals = [place for thread, what, place in gpu.waits if thread != TRAINING and what == "event"]
    assert Counter(arrivals)["staging.py: chunks"] == len(merging.window) == 3
    assert {what for _, what, place in gpu.waits if "outside" not in place} <= {"event", "__bool__"}
