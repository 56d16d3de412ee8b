"""Modules that step as they like, do not train at all, are compiled in part, or change while they train."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_runs import (
    Classifier,
    Probe,
    assert_mean,
    assert_same_bits,
    emissions,
    loader,
    seed,
    train,
    weights_of,
)

from merge_callback import CheckpointMergeCallback, load_merge


def merging(folder, **options) -> CheckpointMergeCallback:
    return CheckpointMergeCallback(
        **{"window": 3, "every_n_steps": 6, "dirpath": folder / "merges", **options}
    )


def told(records, part: str) -> list[str]:
    return [str(r.message) for r in records if part in str(r.message)]


# Steps


class Opponents(Classifier):
    """Two optimizers, of which one steps so many times with each batch."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.automatic_optimization, self.times = False, times

    def training_step(self, batch, batch_idx):
        for optimizer, times in zip(self.optimizers(), (1, self.times), strict=True):
            for _ in range(times):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


@pytest.mark.parametrize("times", [1, 5])
def test_the_plan_counts_the_steps_of_all_optimizers_as_the_clock_does(times, tmp_path, recwarn, caplog):
    with caplog.at_level("INFO"):
        trainer = train(Opponents(times), merging(tmp_path), data=loader(), max_epochs=2)
    assert trainer.global_step == 16 * (1 + times)
    lines, steps = told(caplog.records, "merge: "), trainer.global_step
    said = (
        f"merge: {1 + times} optimizer steps per batch (of all optimizers), so a snapshot about every "
        f"{6 / (1 + times):,.3g} batches; {steps // 6} in this run of {steps} steps"
    )
    assert said in lines
    assert not told(recwarn, "never fills")
    assert trainer.callback_metrics["merge/window"] == 3


def test_a_manual_optimization_whose_window_never_fills_is_warned_of_once_that_is_known(tmp_path):
    with pytest.warns(UserWarning, match="the run ends after 32 steps, with 1 of 3 snapshots"):
        train(Opponents(1), merging(tmp_path, every_n_steps=20), data=loader(), max_epochs=2)


class Bank(LightningModule):
    """Collects what it sees, as PatchCore does, and has nothing that trains."""

    def __init__(self, optimizers) -> None:
        super().__init__()
        self.automatic_optimization, self.given = False, optimizers
        self.register_buffer("mean", torch.zeros(8))

    def training_step(self, batch, batch_idx):
        self.mean += batch[0].mean(0)

    def configure_optimizers(self):
        return self.given


@pytest.mark.parametrize("optimizers", [None, []])
def test_a_module_without_an_optimizer_is_left_alone(optimizers, tmp_path, caplog):
    module, plain = Bank(optimizers), Bank(optimizers)
    with caplog.at_level("INFO"):
        train(module, merging(tmp_path), data=loader(), max_epochs=1)
    train(plain, data=loader(), max_epochs=1)
    assert torch.equal(module.mean, plain.mean)
    assert len(told(caplog.records, "no optimizer, so no weights are trained")) == 1
    assert not (tmp_path / "merges").exists()


# Names


class Checkpointed(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = part

    def forward(self, x):
        return checkpoint(self._checkpoint_wrapped_module, x, use_reentrant=False)


class Wrapped(Classifier):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.net = wrap(self.net)


class TiedAcross(Wrapped):
    """A compiled part, a head outside that is tied to it, and the part's plain module beside it."""

    def __init__(self, wrap) -> None:
        super().__init__(wrap)
        inside = self.net[0] if isinstance(self.net, nn.Sequential) else self.net._orig_mod[0]
        self.head = torch.compile(nn.Linear(8, 16), backend="eager")
        self.head._orig_mod.weight = inside.weight
        self.inside = inside


WRAPPERS = {
    "part": lambda net: torch.compile(net, backend="eager"),
    "nested": lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:]),
    "twice": lambda net: torch.compile(Checkpointed(net), backend="eager"),
    "none": lambda net: net,
}


def test_tied_weights_of_compiled_parts_load_strictly(tmp_path):
    module = TiedAcross(WRAPPERS["part"])
    with torch.compiler.set_stance("force_eager"):
        train(module, merging(tmp_path), data=loader(), max_steps=12)
    path = tmp_path / "merges" / "latest"
    module.load_state_dict(load_merge(path, module))
    assert {"net.0.weight", "head.weight", "inside.weight"} <= load_merge(path).keys()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_merge_loads_strictly_into_a_module_with_wrapped_parts(kind, tmp_path):
    module = Wrapped(WRAPPERS[kind])
    with torch.compiler.set_stance("force_eager"):
        train(module, merging(tmp_path), data=loader(), max_steps=12)
    path = tmp_path / "merges" / "latest"
    module.load_state_dict(load_merge(path, module))
    Classifier().load_state_dict({n.replace(".0.net.", "."): t for n, t in load_merge(path).items()})
    loaded = {
        n.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for n in module.state_dict()
    }
    assert loaded == load_merge(path).keys()


# Tensors that come and change


class Changing(Classifier):
    """Changes itself before batch 6."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("bank", torch.zeros(2, 8))

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if batch_idx == 6:
            self.change(self)


def add_parameter(module) -> None:
    module.scale = nn.Parameter(torch.ones(4))
    module.trainer.optimizers[0].add_param_group({"params": [module.scale]})


def grow_buffer(module) -> None:
    module.bank = torch.ones(5, 8)


def add_module(module) -> None:
    module.extra = nn.Linear(2, 2)


def drop_parameter(module) -> None:
    module.net[0].bias = None


def widen(module) -> None:
    module.bank = module.bank.double()


def grow_in_place(module) -> None:
    module.bank.resize_(5, 8).zero_()


def other_data(module) -> None:
    module.bank.data = torch.ones(1, 8)  # which could be copied to where the former one lies


CHANGES = {
    "grown in place": (grow_in_place, r"changed bank from \(2, 8\) float32 to \(5, 8\) float32"),
    "other data": (other_data, r"changed bank from \(2, 8\) float32 to \(1, 8\) float32"),
    "new parameter": (add_parameter, "there is now scale"),
    "grown buffer": (grow_buffer, r"changed bank from \(2, 8\) float32 to \(5, 8\) float32"),
    "new module": (add_module, r"there is now extra\.weight, extra\.bias"),
    "dropped": (drop_parameter, r"there is no more net\.0\.bias"),
    "other dtype": (widen, r"changed bank from \(2, 8\) float32 to \(2, 8\) float64"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_window_of_the_changed_model_begins_when_its_tensors_change(kind, storage, tmp_path):
    change, said = CHANGES[kind]
    module, probe = Changing(change), Probe()
    options = {"every_n_steps": 2, "keep_last": None, "storage": storage}
    with pytest.warns(UserWarning, match=said):
        trainer = train(module, merging(tmp_path, **options), probe, data=loader(count=96), max_steps=12)
    newest = load_merge(tmp_path / "merges" / "latest")
    assert_mean(newest, [probe.weights[step] for step in (8, 10, 12)])
    module.load_state_dict(newest)
    assert trainer.callback_metrics["merge/window"] == 3
    before = load_merge(emissions(tmp_path / "merges")[1])  # of step 6
    assert_mean(before, [probe.weights[step] for step in (2, 4, 6)])


class Lazy(Classifier):
    """Its layers get their shapes in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.LazyLinear(4))


def test_a_lazy_module_is_merged_once_it_has_its_shapes(tmp_path):
    def trained(*callbacks):
        seed()
        module = Lazy()
        train(module, *callbacks, data=loader(), val=loader(16), max_steps=8, check_val_every_n_epoch=1)
        return module

    probe = Probe()
    with pytest.warns(UserWarning, match=r"now net\.0\.weight, .* A new window begins here$"):
        module = trained(merging(tmp_path, every_n_steps=2), probe)
    newest = load_merge(tmp_path / "merges" / "latest")
    assert_mean(newest, [probe.weights[step] for step in (4, 6, 8)])
    assert_same_bits(weights_of(module), weights_of(trained()))
    module.load_state_dict(newest)


def resize_embeddings(module) -> None:
    """As Hugging Face's ``resize_token_embeddings`` does: a new layer, and the head is tied to it again."""
    wider = nn.Embedding(12, 8)
    with torch.no_grad():
        wider.weight[:8] = module.embedding.weight
    module.embedding, module.head.weight = wider, wider.weight
    module.trainer.optimizers[0].param_groups[0]["params"] = list(module.parameters())


class Embedded(Classifier):
    """Its embedding, tied to a head, grows in the third epoch."""

    def __init__(self, rows: int = 8) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(rows, 8), nn.Linear(8, rows, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.net(self.head(x)[:, :8])

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            resize_embeddings(self)


def test_resized_and_tied_embeddings_begin_a_new_window(tmp_path):
    module = Embedded()
    with pytest.warns(UserWarning, match=r"changed embedding\.weight from \(8, 8\) float32 to \(12, 8\)"):
        train(module, merging(tmp_path, every_n_steps=4), data=loader(), max_epochs=4)
    newest = load_merge(tmp_path / "merges" / "latest")
    assert torch.equal(newest["head.weight"], newest["embedding.weight"])
    Embedded(12).load_state_dict(newest)


def test_training_is_the_same_whether_its_window_begins_again_or_not(tmp_path):
    def weights(*callbacks):
        seed()
        module = Changing(add_parameter)
        train(module, *callbacks, data=loader(count=96), max_steps=12)
        return weights_of(module)

    with pytest.warns(UserWarning, match="A new window begins"):
        merged = weights(merging(tmp_path, every_n_steps=2))
    assert_same_bits(merged, weights())


def test_a_run_whose_window_began_again_can_be_resumed(tmp_path):
    def module():
        changing = Changing(grow_buffer)
        changing.bank = torch.zeros(5, 8)
        return changing

    with pytest.warns(UserWarning, match="A new window begins"):
        trainer = train(
            Changing(grow_buffer), merging(tmp_path, every_n_steps=2), data=loader(count=96), max_steps=10
        )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    train(
        module(),
        merging(tmp_path, every_n_steps=2),
        data=loader(count=96),
        max_steps=12,
        ckpt_path=tmp_path / "last.ckpt",
    )
    newest = emissions(tmp_path / "merges")[-1]
    assert "step=00000012" in newest.name
    assert [s["step"] for s in json.loads((newest / "merge.json").read_text())["snapshots"]] == [8, 10, 12]


def test_a_merge_of_the_model_before_is_not_validated_and_is_told_of(tmp_path, caplog):
    module, callback = Changing(add_parameter), merging(tmp_path, every_n_steps=3, window=2)
    options = {"data": loader(count=64), "val": loader(16), "max_steps": 7, "val_check_interval": 7}
    with pytest.warns(UserWarning, match="the last merge is of the model before .* there is now scale"):
        trainer = train(module, callback, **options)
    assert not [name for name in trainer.callback_metrics if name.startswith("merge_gain")]
    assert "scale" not in load_merge(tmp_path / "merges" / "latest")
