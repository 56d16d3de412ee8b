"""Snapshots of a LoRA run are merged by what the adapter adds, at its rank; the base is kept once."""

import json

import pytest
import torch
from killed_run import wait_for_snapshots
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn
from training_runs import Classifier, assert_same_bits, emissions, loader, seed, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.checks import one_of
from merge_callback.options import Options
from merge_callback.snapshots.lora_merge import factor_pairs, merge_factors

A, B = "net.2.lora_A.default.weight", "net.2.lora_B.default.weight"


class Adapted(nn.Module):
    """A linear layer with factors by the names that peft gives them."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


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


@pytest.mark.parametrize("options", [{}, {"snapshot_codec": "delta-fp16"}], ids=["whole", "differences"])
def test_a_linear_merge_is_the_nearest_of_the_adapters_rank_to_the_mean_of_the_products(options, tmp_path):
    merged, snapshots, record = run(tmp_path, method="sma", **options)
    assert record["lora"] == {"products": 1}
    if options:
        return  # the snapshots are differences; the same code reads them
    mean = torch.stack([s[B].double() @ s[A].double() for s in snapshots]).mean(0)
    u, values, v = torch.linalg.svd(mean)
    nearest = (u[:, :2] * values[:2]) @ v[:2]
    found = merged[B].double() @ merged[A].double()
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-6)
    apart = torch.stack([s[B] for s in snapshots]).mean(0) @ torch.stack([s[A] for s in snapshots]).mean(0)
    assert torch.dist(found, mean) < torch.dist(apart.double(), mean)
    others = [name for name in merged if name not in (A, B) and name in snapshots[0] and "num" not in name]
    for name in others:
        torch.testing.assert_close(merged[name], torch.stack([s[name] for s in snapshots]).mean(0))


def test_factors_are_merged_apart_where_that_is_asked_for_or_the_method_is_not_linear(tmp_path, caplog):
    merged, snapshots, record = run(tmp_path / "factors", method="sma", lora="factors")
    torch.testing.assert_close(merged[A], torch.stack([s[A] for s in snapshots]).mean(0))
    assert "lora" not in record
    with caplog.at_level("INFO"):
        assert "lora" not in run(tmp_path / "ties", method="ties")[2]
    assert "ties merges the factors A and B" in caplog.text
    with pytest.raises(ValueError, match="lora='other' must be one of 'delta', 'factors'"):
        CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path, lora="other")


def test_without_a_method_adapters_are_averaged_in_the_decay_too(tmp_path):
    assert run(tmp_path / "auto")[2]["method"]["name"] == "sma"
    options = Options.resolve(every_n_steps=2, method={"stable": "ema"}).for_adapters()
    assert {phase: method.name for phase, method in options.methods.items()} == {
        "stable": "ema",
        "decay": "sma",
    }
    given = Options.resolve(every_n_steps=2, method="ties")
    assert given.for_adapters().methods == given.methods


def test_pairs_are_found_by_peft_s_names_and_copied_ones_left_alone():
    names = [
        A,
        B,
        "x.lora_embedding_A.one",
        "x.lora_embedding_B.one",
        "y.lora_A.weight",
        "lora_A",
        "z.A.weight",
    ]
    assert factor_pairs(names) == [(A, B), ("x.lora_embedding_A.one", "x.lora_embedding_B.one")]
    seed()
    given = [{A: torch.randn(2, 5), B: torch.randn(4, 2)} for _ in range(3)]
    out = {A: torch.zeros(2, 5), B: torch.zeros(4, 2)}
    sources = [lambda names, tensors=tensors: tensors for tensors in given]
    assert merge_factors(sources, [1 / 3] * 3, out, {A}) == 0
    assert not any(tensor.any() for tensor in out.values())
    assert merge_factors(sources, [1 / 3] * 3, out, ()) == 1


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
    assert merging.merge("ties") is not None
