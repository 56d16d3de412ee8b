"""Runs in which most of the model is frozen, as with LoRA."""

import pytest
import torch
from tiny_run import Keeper, Tiny, fit, wait_for_snapshots
from torch import nn
from torch.nn.functional import cross_entropy

from merge_callback.snapshots import live_copy
from merge_callback.snapshots.deltas import flat_tensors

BASE = {"embed.weight", "head.weight", "head.bias"}
"""What `Adapted` does not train."""

SHORT = {"trainer": {"max_steps": 14}}
"""Options of a run that is over soon after its window is full for the second time."""


class Adapted(Tiny):
    """A frozen model with a small trained part: the down and the up projection of an adapter, and a norm."""

    def __init__(self):
        super().__init__(width=32)
        self.embed.requires_grad_(False)
        self.head.requires_grad_(False)
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def loss(self, batch):
        tokens = batch["input_ids"]
        hidden = self.norm(self.embed(tokens[:, :-1]).flatten(0, 1))
        return cross_entropy(self.head(hidden + self.up(self.down(hidden))), tokens[:, 1:].flatten())


def whole(monkeypatch):
    """Has all snapshots be whole, as they were in versions that kept nothing once."""
    monkeypatch.setattr(live_copy, "_WORTH_A_FILE", 2)


class Exact(Keeper):
    """Makes sure after every step from `first` on that each snapshot is the model at its step, to the bit."""

    def __init__(self, first=0):
        super().__init__()
        self.first, self.seen = first, set()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if trainer.global_step < self.first:
            return
        wait_for_snapshots(trainer)
        snapshots = trainer.callbacks[0].session.window.snapshots
        for index, snapshot in enumerate(snapshots):
            live = self.weights[snapshot.step]
            found = flat_tensors([s.arena for s in snapshots[: index + 1]])
            assert found.keys() == live.keys()
            for name, tensor in live.items():
                assert same_bits(found[name], tensor.view(-1)), (snapshot.step, name)
            self.seen.add(snapshot.step)


def same_bits(tensor, other):
    """Whether two tensors of one dtype are equal as bytes."""
    return torch.equal(tensor[:].view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture
def adapted(tmp_path):
    """The folder of a finished run, and the live weights of every step."""
    keeper = Keeper()
    fit(tmp_path / "run", module=Adapted, callbacks=[keeper], storage="disk", **SHORT)
    return tmp_path / "run/merges", keeper.weights
