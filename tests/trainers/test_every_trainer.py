"""The same training through every training loop: the same snapshots and merges, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoint_files import ROOT
from torch import nn
from training_runs import QUIET, assert_same_bits, one_thread, seed

from merge_callback import CheckpointMergeCallback, CheckpointMerger, load_merge

STEPS, EVERY = 24, 4
OPTIONS = {"window": 3, "every_n_steps": EVERY, "keep_last": None}


def batches():
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 8, generator=generator)
        yield x, x.sum(1, keepdim=True)


def model():
    seed()
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def through_lightning(namespace, folder):
    class Module(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model()

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(list(batches()), batch_size=None)

        def val_dataloader(self):
            return torch.utils.data.DataLoader(list(batches())[:2], batch_size=None)

    callback = CheckpointMergeCallback(dirpath=folder, strip_prefix="net.", **OPTIONS)
    trainer = namespace.Trainer(**QUIET, max_steps=STEPS, callbacks=[callback], val_check_interval=8)
    module = Module()
    seed(1)
    trainer.fit(module)
    return module.net.state_dict(), {k: float(v) for k, v in trainer.callback_metrics.items()}


def through_a_loop(folder):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    seed(1)
    with CheckpointMerger(net, optimizer, total_steps=STEPS, dirpath=folder, **OPTIONS) as merger:
        for step, (x, y) in enumerate(batches(), 1):
            loss = nn.functional.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            merger.step(loss=loss)
            if step % 8 == 0:
                net.eval()
                live = validated(net)
                with merger.merged_weights() as merge:
                    merged = validated(net)
                    assert merge.step == step
                merger.log_validation(live={"val_loss": live}, merged={"val_loss": merged})
                net.train()
    return net.state_dict(), merger.metrics


def through_transformers(folder):
    from transformers import Trainer, TrainingArguments

    from merge_callback.transformers import CheckpointMergeTrainerCallback

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, x, y):
            return {"loss": nn.functional.mse_loss(self.net(x), y)}

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    whole = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "max_grad_norm": 0.0}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    often = {"eval_strategy": "steps", "eval_steps": 8, "max_steps": STEPS, "label_names": ["y"]}
    trainer = Trainer(
        net,
        TrainingArguments(folder.parent / "trainer", **whole, **quiet, **one, **often),
        data_collator=lambda rows: {"x": rows[0][0], "y": rows[0][1]},
        train_dataset=list(batches()),
        eval_dataset=list(batches())[:2],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[CheckpointMergeTrainerCallback(dirpath=folder, strip_prefix="net.", **OPTIONS)],
    )
    seed(1)
    trainer.train()
    metrics = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    names = {"merged_eval_loss": "merged/val_loss", "merge_gain/eval_loss": "merge_gain/val_loss"}
    return net.net.state_dict(), {names.get(name, name): value for name, value in metrics.items()}


@torch.no_grad()
def validated(net):
    return sum(float(nn.functional.mse_loss(net(x), y)) for x, y in list(batches())[:2]) / 2


def through(loop, folder):
    with one_thread():
        if loop == "plain loop":
            return through_a_loop(folder)
        if loop == "transformers":
            pytest.importorskip("accelerate")
            return through_transformers(folder)
        namespace = pytest.importorskip(loop)
        return through_lightning(namespace, folder)


@pytest.fixture(scope="module")
def lightning(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning") / "merges"
    return folder, *through("lightning.pytorch", folder)


def merges(folder):
    return {path.name: load_merge(path) for path in sorted(folder.glob("step=*"))}


@pytest.mark.parametrize("loop", ["plain loop", "pytorch_lightning", "transformers"])
def test_every_training_loop_gives_the_same_merges(loop, lightning, tmp_path):
    expected_folder, expected, expected_metrics = lightning
    found, metrics = through(loop, tmp_path / "merges")
    assert_same_bits(found, expected)
    published, wanted = merges(tmp_path / "merges"), merges(expected_folder)
    assert [*published] == [*wanted]
    assert len(published) == STEPS // EVERY - 1  # of one snapshot there is no merge
    for name in published:
        assert_same_bits(published[name], wanted[name])
    merged = {k: v for k, v in expected_metrics.items() if k.startswith("merge")}
    assert {k: v for k, v in metrics.items() if k.startswith("merge")} == pytest.approx(merged, rel=1e-6)
    assert "merge_gain/val_loss" in merged


PLAIN = """
import sys
BLOCKED = ("lightning", "pytorch_lightning", "lightning_fabric", "transformers")
sys.modules.update(dict.fromkeys(BLOCKED))
import importlib, json, pathlib, pkgutil
import torch
import merge_callback
from torch import nn

OWN = ("merge_callback.trainers.lightning.", "merge_callback.trainers.transformers", "merge_callback.demo",
       "merge_callback.transformers", "merge_callback.__main__", "merge_callback.reduce._kernels")
names = [m.name for m in pkgutil.walk_packages(merge_callback.__path__, "merge_callback.")]
for name in names:
    if not name.startswith(OWN):
        importlib.import_module(name)

torch.manual_seed(0)
net = nn.Linear(8, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

def compute_loss(batch):
    return ((net(batch) - batch.sum(1, keepdim=True)) ** 2).mean()

options = {"rewarm_steps": 5, "guard": 5}
with merge_callback.CheckpointMerger(
    net, optimizer, every_n_steps=5, window=4, dirpath=sys.argv[1], compute_loss=compute_loss, spike=options
) as merger:
    for step in range(100):
        batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = compute_loss(batch) + 1
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        merger.step(loss=loss, batch=batch)
        if step == 70:
            with torch.no_grad():
                net.weight.mul_(50)
    state = merger.state_dict()
merges = len(list(pathlib.Path(sys.argv[1]).glob("step=*")))
found = {"restores": merger.metrics["merge_spike/restores"], "loss": float(loss.detach()), "merges": merges}
print(json.dumps({**found, "step": state["step"]}))
"""


def test_a_plain_loop_trains_merges_and_is_restored_without_lightning(tmp_path):
    found = json.loads(run_alone(PLAIN, tmp_path / "merges"))
    assert found["restores"] == 1
    assert found["loss"] < 1.1  # and 1 is the least there is
    assert found["merges"] == 3
    assert found["step"] == 100


ONLY_PYTORCH_LIGHTNING = """
import sys
sys.modules["lightning"] = None
import json
import pytorch_lightning as pl
import torch
from merge_callback import CheckpointMergeCallback, load_merge

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def loss(self, x):
        return ((self.net(x) - x.sum(1, keepdim=True)) ** 2).mean()
    def training_step(self, batch, batch_idx):
        return self.loss(batch)
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

pl.seed_everything(0, verbose=False)
data = torch.utils.data.DataLoader(torch.randn(12, 8, 4), batch_size=None)
callback = CheckpointMergeCallback(every_n_steps=4, window=2, dirpath=sys.argv[1])
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
module = Module()
trainer.fit(module, data, data)
merged = float(trainer.callback_metrics["merged/val_loss"])
module.load_state_dict(load_merge(sys.argv[1] + "/latest"))
with torch.no_grad():
    expected = sum(float(module.loss(batch)) for batch in data) / 12
print(json.dumps([merged, expected, isinstance(callback, pl.Callback)]))
"""


def test_pytorch_lightning_alone_is_enough(tmp_path):
    pytest.importorskip("pytorch_lightning")
    merged, expected, is_callback = json.loads(run_alone(ONLY_PYTORCH_LIGHTNING, tmp_path / "merges"))
    assert merged == pytest.approx(expected, rel=1e-6)
    assert is_callback


def run_alone(script, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
