"""`merge --optimizer-state`: moments merged like the weights, and a Trainer that goes on from the output."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import Evil, save_distributed
from distributed_runs import UnevenModule, fit, full_weights, run_jobs
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.utils.data import DataLoader
from training_runs import QUIET

from merge_callback.checkpoints.dcp_entries import DistributedEntries
from merge_callback.checkpoints.open import open_checkpoint
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


pytestmark = pytest.mark.usefixtures("in_this_process")


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


def trained(steps):
    """A small model and its optimizer after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def distributed_state(model, optimizer):
    """As Lightning nests it in its sharded checkpoints."""
    return {
        "state_dict": get_model_state_dict(model),
        "optimizer_0": get_optimizer_state_dict(model, optimizer),
        "epoch": 3,
    }


def test_a_distributed_checkpoint_is_resumed_from_too(tmp_path):
    states = [distributed_state(*trained(steps)) for steps in (1, 2, 3)]
    paths = [save_distributed(tmp_path / f"step={i}", state) for i, state in enumerate(states, 1)]
    (paths[-1] / "meta.pt").write_bytes(b"Lightning's part")
    assert merge(*paths, "--method", "wma", "--output", tmp_path / "out") == 0

    model, optimizer = trained(1)
    loaded = distributed_state(model, optimizer)
    dcp.load(loaded, checkpoint_id=tmp_path / "out")
    weights = (1 / 6, 2 / 6, 3 / 6)
    for name, value in loaded["state_dict"].items():
        expected = sum(w * s["state_dict"][name] for w, s in zip(weights, states, strict=True))
        torch.testing.assert_close(value, expected)
    for name, entries in loaded["optimizer_0"]["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            each = [state["optimizer_0"]["state"][name][moment] for state in states]
            torch.testing.assert_close(
                entries[moment], sum(w * e for w, e in zip(weights, each, strict=True))
            )
        assert entries["step"] == 3
    assert loaded["epoch"] == 3
    assert loaded["optimizer_0"]["param_groups"][0]["lr"] == 0.01
    assert (tmp_path / "out/meta.pt").read_bytes() == b"Lightning's part"
    assert main(["inspect", str(tmp_path / "out")]) == 0
    opened = [open_checkpoint(path).tensors.keys() for path in (tmp_path / "out", paths[-1])]
    assert opened[0] == opened[1]


def test_a_distributed_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    paths = []
    for step in (1, 2):
        state = {**distributed_state(*trained(step)), "evil": Evil(tmp_path / "ran")}
        paths.append(save_distributed(tmp_path / f"step={step}", state))
    assert merge(*paths, "--output", tmp_path / "out") == 1
    assert "'evil' is nothing that is loaded without running code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_distributed_checkpoint_without_moments_is_refused(tmp_path, capsys):
    model, _ = trained(1)
    paths = [
        save_distributed(tmp_path / f"step={step}", {"state_dict": model.state_dict()}) for step in (1, 2)
    ]
    assert merge(*paths, "--output", tmp_path / "out") == 1
    assert "holds no moments" in capsys.readouterr().err


class Saved(UnevenModule):
    """Notes a moment when training begins."""

    def on_train_start(self):
        optimizer = self.optimizers().optimizer
        moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
        self.first = full(moments[0]).clone() if moments else None
        self.begins = full_weights(self)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(folder, max_steps, ckpt_path=None):
    """Trains on two ranks; the weights and a moment it began with, and the step it came to."""
    module = Saved()
    saving = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
    run = fit("fsdp2", module, saving, max_steps=max_steps, ckpt_path=ckpt_path, enable_checkpointing=True)
    return module.begins, module.first, max(run.weights)


@pytest.mark.slow
def test_lightning_goes_on_from_its_sharded_checkpoint(tmp_path):
    run_jobs(2, {"train": (sharded, {"folder": tmp_path / "run", "max_steps": 12})})
    paths = sorted((tmp_path / "run").iterdir(), key=lambda path: int(path.stem.rpartition("=")[2]))
    assert len(paths) == 3
    assert merge(*paths, "--output", tmp_path / "out") == 0
    job = (sharded, {"folder": tmp_path / "next", "max_steps": 16, "ckpt_path": tmp_path / "out"})
    [(begins, first, last), _] = run_jobs(2, {"resume": job})["resume"]
    assert last == 16
    expected = open_checkpoint(tmp_path / "out").tensors
    for name, tensor in expected.items():
        assert torch.equal(begins[name], tensor), name
    entries = [DistributedEntries(path) for path in paths]
    [name] = [n for n in entries[0].tensors if n.endswith("embedding.weight.exp_avg")]
    torch.testing.assert_close(first, sum(one.tensor(name) for one in entries) / 3)
