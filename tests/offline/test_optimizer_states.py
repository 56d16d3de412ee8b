"""`merge --optimizer-state`: moments merged like the weights, and a Trainer that goes on from the output."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from training_runs import QUIET

from merge_callback.cli.main import main
from merge_callback.merging import Ema


class Twice(LightningModule):
    """Two optimizers, a schedule, and a buffer that does not train."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def training_step(self, batch, batch_idx):
        loss = self.norm(self.layer(batch)).pow(4).mean() + self.layer.weight.pow(2).sum()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        first = torch.optim.AdamW(self.layer.parameters(), lr=0.01, amsgrad=True)
        return first, torch.optim.SGD(self.norm.parameters(), lr=0.01, momentum=0.9)


def data():
    return DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints of one run, oldest first."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    saving = ModelCheckpoint(folder / "ckpt", every_n_train_steps=4, save_top_k=-1)
    options = {k: v for k, v in QUIET.items() if k != "enable_checkpointing"}
    Trainer(max_steps=12, default_root_dir=folder, callbacks=[saving], **options).fit(Twice(), data())
    found = [
        (torch.load(path, weights_only=True)["global_step"], path) for path in (folder / "ckpt").iterdir()
    ]
    return [path for _, path in sorted(found)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)


def merge(*arguments):
    return main(["merge", "--quiet", "--optimizer-state", *map(str, arguments)])


def moments(content):
    return [
        {name: value for name, value in entries.items() if name != "step"}
        for state in content["optimizer_states"]
        for entries in state["state"].values()
    ]


def test_moments_are_merged_with_the_weights_of_the_model(run, tmp_path):
    assert merge(*run, "--method", "ema", "--output", tmp_path / "out") == 0
    merged = torch.load(tmp_path / "out/merged.ckpt", weights_only=True)
    sources = [torch.load(path, weights_only=True) for path in run]
    weights = Ema().normalised_weights(range(len(run)))
    everything = [moments(source) for source in sources]
    for i, entries in enumerate(moments(merged)):
        for name, value in entries.items():
            expected = sum(
                w * source[i][name].double() for w, source in zip(weights, everything, strict=True)
            )
            torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-8)
            if name.endswith("sq"):
                assert (value >= 0).all()
    newest = sources[-1]
    assert {*moments(merged)[0]} == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    steps = [content["optimizer_states"][0]["state"][0]["step"] for content in (merged, newest)]
    assert steps[0] == steps[1]
    assert merged["global_step"] == newest["global_step"]
    assert merged.keys() == newest.keys()


def test_training_goes_on_from_it(run, tmp_path):
    assert merge(*run, "--output", tmp_path / "out") == 0
    seen = {}

    class Looking(Twice):
        def on_train_start(self):
            first = self.optimizers()[0].optimizer
            seen["moment"] = first.state[self.layer.weight]["exp_avg"].clone()
            seen["weight"] = self.layer.weight.detach().clone()

    content = torch.load(tmp_path / "out/merged.ckpt", weights_only=True)
    trainer = Trainer(max_steps=content["global_step"] + 4, default_root_dir=tmp_path, **QUIET)
    trainer.fit(Looking(), data(), ckpt_path=tmp_path / "out/merged.ckpt", weights_only=True)
    assert trainer.global_step == content["global_step"] + 4
    assert torch.equal(seen["moment"], content["optimizer_states"][0]["state"][0]["exp_avg"])
    assert torch.equal(seen["weight"], content["state_dict"]["layer.weight"])


def altered(run, tmp_path, change):
    """The run, its newest checkpoint changed."""
    content = torch.load(run[-1], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "step=99.ckpt")
    return [*run[:-1], tmp_path / "step=99.ckpt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("optimizer_states"), "no Lightning checkpoint with the state of an optimizer"),
        (lambda c: c["optimizer_states"][0]["state"][0].pop("exp_avg"), "only one of"),
        (lambda c: c["optimizer_states"][0]["state"][0].update(prodigy=torch.ones(3)), "has 'prodigy'"),
        (lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].fill_(torch.nan), "holds NaN or Inf"),
        (
            lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.ones(2)),
            r"'exp_avg' of parameter 0 is",
        ),
        (lambda c: c["optimizer_states"].__setitem__(0, 3), "optimizer 0 has no state by parameter"),
    ],
)
def test_states_that_have_no_mean_are_refused(run, tmp_path, capsys, change, named):
    assert merge(*altered(run, tmp_path, change), "--output", tmp_path / "out") == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "extrapolate"], "has negative weights"),
        (["--method", "ties"], "is no weighted sum"),
        (["--as", "safetensors"], "leave --as safetensors out"),
    ],
)
def test_merges_that_moments_can_not_follow_are_refused(run, tmp_path, capsys, options, named):
    assert merge(*run, *options, "--output", tmp_path / "out") == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_so_and_writes_nothing(run, tmp_path, capsys):
    assert merge(*run, "--output", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "would merge the moments" in printed
    assert f"would write {tmp_path / 'out/merged.ckpt'}" in printed
    assert not [*Path(tmp_path).iterdir()]
