"""Snapshots of a LoRA run are merged by what the adapter adds, at its rank; the base is kept once."""

import json

import pytest
import torch
from adapted import Adapted
from lightning.pytorch import Callback
from safetensors.torch import load_file
from spiking_runs import FIRES, Line, spiking, used
from tiny_run import wait_for_snapshots
from torch import nn
from training_runs import Classifier, assert_same_bits, emissions, loader, mean_of, seed, train

from merge_callback import CheckpointMergeCallback, load_merge, merge_state_dicts
from merge_callback.checks import one_of

A, B = "net.2.lora_A.default.weight", "net.2.lora_B.default.weight"


def run(folder, **options):
    """A run with all snapshots in one merge; the merge, and the snapshots in it."""
    seed()
    module = Classifier()
    module.net[2] = Adapted(module.net[2])
    callback = CheckpointMergeCallback(every_n_steps=2, window=6, dirpath=folder, evaluate=False, **options)
    train(module, callback, data=loader(), max_steps=12)
    merge = emissions(folder)[-1]
    snapshots = [load_file(path) for path in sorted((folder / "window").glob("step*.safetensors"))]
    return load_file(merge / "model.safetensors"), snapshots, json.loads((merge / "merge.json").read_text())


def product(state):
    return state[B].double() @ state[A].double()


def cut(matrix):
    """The nearest matrix of rank 2."""
    u, values, v = torch.linalg.svd(matrix)
    return (u[:, :2] * values[:2]) @ v[:2]


@pytest.mark.parametrize("options", [{}, {"snapshot_codec": "delta-fp16"}], ids=["whole", "differences"])
def test_a_linear_merge_is_the_nearest_of_the_adapters_rank_to_the_mean_of_the_products(options, tmp_path):
    merged, snapshots, record = run(tmp_path, method="sma", **options)
    assert record["lora"] == {"products": 1}
    if options:
        return  # the snapshots are differences; the same code reads them
    mean = torch.stack([product(s) for s in snapshots]).mean(0)
    found = product(merged)
    torch.testing.assert_close(found, cut(mean), rtol=1e-5, atol=1e-6)
    for name in (A, B):  # the factors are those of this run, not of another basis
        average = torch.stack([s[name] for s in snapshots]).mean(0)
        assert torch.dist(merged[name], average) < 0.1 * torch.linalg.vector_norm(average)
    apart = torch.stack([s[B] for s in snapshots]).mean(0) @ torch.stack([s[A] for s in snapshots]).mean(0)
    assert torch.dist(found, mean) < torch.dist(apart.double(), mean)
    others = [name for name in merged if name not in (A, B) and name in snapshots[0] and "num" not in name]
    for name in others:
        torch.testing.assert_close(merged[name], torch.stack([s[name] for s in snapshots]).mean(0))


@pytest.mark.parametrize("method", ["ties", "slerp", "dare"])
def test_any_other_method_merges_the_dense_products(method, tmp_path):
    merged, snapshots, record = run(tmp_path, method=method)
    assert record["lora"] == {"products": 1}
    if method == "dare":  # its draws depend on the snapshots' steps
        assert torch.linalg.matrix_rank(product(merged)) == 2
        return
    dense = merge_state_dicts([{"w": product(s).float()} for s in snapshots], method)["w"]
    torch.testing.assert_close(product(merged), cut(dense.double()), rtol=1e-5, atol=1e-6)
    other = merge_state_dicts([{"w": s["net.0.weight"]} for s in snapshots], method)["w"]
    torch.testing.assert_close(merged["net.0.weight"], other)


def test_a_restore_merges_the_products_too(tmp_path):
    class AdaptedLine(Line):
        def __init__(self):
            super().__init__(lr=0.005)
            self.net[2] = Adapted(nn.Linear(8, 6), 2)
            self.net.append(nn.Linear(6, 1))

    found = spiking(tmp_path, module=AdaptedLine)
    (event,) = found.restores
    snapshots = [found.watch.weights[step] for step in used(event)]
    restored = found.watch.weights[FIRES]
    mean = torch.stack([product(s) for s in snapshots]).mean(0)
    torch.testing.assert_close(product(restored), cut(mean), rtol=1e-5, atol=1e-6)
    for name in (A, B):
        average = torch.stack([s[name] for s in snapshots]).mean(0)
        assert torch.dist(restored[name], average) < 0.1 * torch.linalg.vector_norm(average)
    others = {name for name in restored if "lora" not in name}
    expected = mean_of([{n: s[n] for n in others} for s in snapshots])
    for name in others:
        torch.testing.assert_close(restored[name], expected[name])


def test_factors_are_merged_apart_where_that_is_asked_for(tmp_path):
    merged, snapshots, record = run(tmp_path / "factors", method="sma", lora="factors")
    torch.testing.assert_close(merged[A], torch.stack([s[A] for s in snapshots]).mean(0))
    assert "lora" not in record
    with pytest.raises(ValueError, match="lora='other' must be one of 'delta', 'factors'"):
        CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path, lora="other")


def test_the_window_of_a_lora_run_takes_what_trains_and_the_base_once(tmp_path):
    seed()
    module = Classifier()
    module.net[0] = Adapted(nn.Linear(module.net[0].in_features, 8192), rank=8)
    module.net[1], module.net[2] = (
        nn.Identity(),
        nn.Linear(8192, module.net[-1].out_features).requires_grad_(False),
    )
    callback = CheckpointMergeCallback(
        every_n_steps=2, window=6, dirpath=tmp_path, method="sma", evaluate=False
    )
    trains = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    trainer = train(module, callback, data=loader(), max_steps=20)
    wait_for_snapshots(trainer)
    taken = sum(path.stat().st_size for path in (tmp_path / "window").iterdir())
    assert len(list((tmp_path / "window").glob("step*.safetensors"))) == 6
    assert taken <= 1.05 * 6 * trains + 1.01 * base


def test_one_of_gives_the_value_back():
    assert one_of("x", "a", ("a", "b")) == "a"


class Asks(Callback):
    """Merges at the last step."""

    def __init__(self, merging):
        self.merging, self.merge = merging, None

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 12:
            self.merge = self.merging.merge()


def test_a_merge_on_demand_is_by_products_while_the_run_goes_on_and_refused_afterwards(tmp_path):
    seed()
    module = Classifier()
    module.net[2] = Adapted(module.net[2])
    merging = CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path, evaluate=False)
    asks = Asks(merging)
    train(module, merging, asks, data=loader(), max_steps=12)
    assert_same_bits(asks.merge, load_merge(merging.latest))
    with pytest.raises(RuntimeError, match="the run is over, and it has trained LoRA adapters: call merge"):
        merging.merge()
