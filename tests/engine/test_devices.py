"""Snapshots lie on the device of the weights, whatever the module, the strategy or FSDP says of its own."""

from types import SimpleNamespace

import pytest
import torch
from pretend_gpu import GPU, OneGpu, plain, pretend_gpu, put_on
from torch import nn
from training_runs import Classifier, Probe, assert_mean, loader, seed, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.trainers.loop_host import compute_device

CPU = torch.device("cpu")


def fit(folder, strategy, module, **options):
    merging = CheckpointMergeCallback(
        every_n_steps=4, window=3, dirpath=folder, method="sma", evaluate=False, **options
    )
    train(module, merging, data=loader(), strategy=strategy)
    return merging


class OnAnotherDevice(OneGpu):
    """As under FSDP, whose modules say that they are on the CPU."""

    @property
    def root_device(self):
        return CPU


@pytest.mark.parametrize("storage", ["device", "cpu", "disk"])
def test_weights_on_a_gpu_are_copied_there(tmp_path, monkeypatch, storage):
    seed()
    module = Classifier()
    with pretend_gpu(monkeypatch) as gpu:
        merging = fit(tmp_path, OnAnotherDevice(), put_on(module), storage=storage)
    # Wherever the window is, no snapshot is a copy that training waits for.
    assert not [wait for wait in gpu.waits_of_training() if "arena" in wait[1]]
    assert [snapshot.step for snapshot in merging.window] == [4, 8, 12]


@pytest.mark.parametrize("storage", ["device", "cpu", "disk"])
def test_weights_in_host_memory_stay_there_if_training_computes_on_a_gpu(tmp_path, monkeypatch, storage):
    seed()
    module = Classifier()
    with pretend_gpu(monkeypatch) as gpu:
        merging = fit(tmp_path / "there", OneGpu(), module, storage=storage)  # as with FSDP's CPU offload
    assert not [wait for wait in gpu.waits if "copy" in wait[1]]
    assert "empty" not in {name for _, name in gpu.launches}
    assert len(merging.window) == 3


def test_the_device_that_a_sharded_model_computes_on_is_known_whatever_is_offloaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    module = nn.Linear(2, 2)
    assert compute_device(module) == CPU
    module.compute_device = GPU  # FSDP 1 has this attribute
    assert compute_device(module) == GPU
    sharded = SimpleNamespace(device=CPU, device_mesh=SimpleNamespace(device_type="cuda"))
    assert compute_device(SimpleNamespace(parameters=lambda: iter([sharded]))) == GPU
    assert compute_device(nn.Identity()) == CPU


# --- the room for a snapshot on the GPU ---------------------------------------------------------------------


WEIGHTS = 848  # bytes of a classifier


@pytest.mark.parametrize("storage", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("capacity", "room", "tried"),
    [(4 * WEIGHTS, None, 1), (int(2.5 * WEIGHTS), None, 0), (4 * WEIGHTS, WEIGHTS - 1, 1)],
    ids=["enough", "too little at the peak of a step", "in pieces"],
)
def test_a_snapshot_takes_room_that_training_needs_at_no_time(
    tmp_path, monkeypatch, storage, capacity, room, tried
):
    def run(folder, room=None, capacity=1 << 30):
        seed()
        module, probe = put_on(Classifier()), Probe(4)
        with pretend_gpu(monkeypatch) as gpu:
            gpu.room, gpu.capacity, gpu.peak = room, capacity, 2 * WEIGHTS
            merging = CheckpointMergeCallback(
                every_n_steps=4, dirpath=folder, storage=storage, evaluate=False, method="sma"
            )
            train(module, merging, probe, data=loader(), strategy=OneGpu())
        return gpu, merging, {step: {n: plain(t) for n, t in w.items()} for step, w in probe.weights.items()}

    gpu, merging, weights = run(tmp_path, room, capacity)
    assert gpu.allocated.count(WEIGHTS) == tried  # and never again
    assert not [wait for wait in gpu.waits_of_training() if "pageable" in wait[0]]
    assert [snapshot.step for snapshot in merging.window] == [4, 8, 12]
    assert_mean(load_merge(tmp_path / "latest"), list(weights.values()))
