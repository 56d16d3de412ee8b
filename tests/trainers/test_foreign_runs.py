"""Tensors that come and go, odd data, several fits and callbacks: none of it disturbs training."""

import json
from datetime import timedelta
from enum import Enum
from pathlib import Path

import pytest
import torch
from foreign_modules import Case, Endless, fit, merged_run, tokens
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training_runs import (
    Classifier,
    Probe,
    assert_mean,
    assert_same_bits,
    emissions,
    loader,
    train,
    weights_of,
)

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.merging.linear import Weighted

# Modules and batches that change while they train: nothing of it may end the run


class GrowingBuffer(Classifier):
    """Keeps every feature it has seen in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(1, 8))

    def training_step(self, batch, batch_idx):
        self.bank = torch.cat([self.bank, batch[0].mean(0, keepdim=True)])
        return super().training_step(batch, batch_idx)


class LateParameter(Classifier):
    """Gets a layer in the middle of the run."""

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if batch_idx == 3:
            self.net[0].register_parameter("late", nn.Parameter(torch.ones(2)))


class LostBuffer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(3))

    def on_train_batch_start(self, batch, batch_idx) -> None:
        self.scratch = None


class ExpandedBuffer(Classifier):
    """A buffer whose elements share memory, so that it cannot be written to."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1).expand(4, 4), persistent=self.persistent)
        self.after = nn.Linear(4, 4)

    def forward(self, x):
        return self.after(super().forward(x)) * self.mask[0]


class ExpandedTransientBuffer(ExpandedBuffer):
    persistent = False


@pytest.mark.parametrize(
    "make", [GrowingBuffer, LateParameter, LostBuffer, ExpandedBuffer, ExpandedTransientBuffer]
)
def test_tensors_that_come_go_grow_or_overlap_do_not_touch_training(make, tmp_path):
    case = Case(make)
    plain, module = fit(case)
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    probe, other = fit(case, callback)
    assert_same_bits(probe.outputs, plain.outputs)
    assert_same_bits(weights_of(other), weights_of(module))


@pytest.mark.parametrize("make", [ExpandedBuffer, ExpandedTransientBuffer])
def test_an_expanded_buffer_does_not_stop_merged_evaluation(make, tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    trainer = train(make(), callback, data=loader(), val=loader(16))
    assert "merge_gain/val_loss" in trainer.callback_metrics


class Split(Enum):
    TRAIN = "train"


class Mixed(IterableDataset):
    """Batches of which only some are token ids."""

    def __init__(self, *kinds) -> None:
        self.kinds = kinds

    def __iter__(self):
        for _ in range(12):
            yield from self.kinds


TOKENS, ROWS = {"input_ids": tokens()[:4]}, {"image": torch.zeros(4, 8)}


class Node:
    """A batch that points to itself, as nodes of a graph do."""

    def __init__(self) -> None:
        self.neighbour, self.image = self, torch.zeros(4, 8)


@pytest.mark.parametrize(
    "kinds",
    [(TOKENS, ROWS), (ROWS, TOKENS), (TOKENS, None), ({"split": Split.TRAIN, **ROWS},), (Node(),)],
    ids=["tokens first", "rows first", "none", "enum", "cycle"],
)
def test_an_interval_in_steps_never_needs_countable_batches(kinds, tmp_path):
    class Anything(Classifier):
        def training_step(self, batch, batch_idx):
            return self(torch.ones(2, 8)).square().mean()

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    probe = merged_run(Anything(), tmp_path, data=DataLoader(Mixed(*kinds), batch_size=None))
    assert list(probe.weights) == [2, 4, 6, 8, 10, 12]
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


def test_weights_too_few_for_the_window_are_refused_at_once(tmp_path):
    # Else the run would end in the middle, with the first snapshot that has no weight.
    with pytest.raises(ValueError, match="window=3"):
        CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path, method=Weighted((0.5, 0.5)))


def test_one_callback_serves_several_fits(tmp_path):
    # Images, whose batches hold no tokens: that is found out anew in every fit.
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    for _ in range(2):
        module, probe = Classifier(), Probe()
        train(module, callback, probe, data=loader(), val=loader(16))
        assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


def test_a_second_fit_of_the_same_trainer_goes_on_with_its_window(tmp_path):
    callback, probe = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path), Probe()
    module = Classifier()
    trainer = train(module, callback, probe, data=loader(), val=loader(16), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(16))
    assert list(probe.weights) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])
    record = json.loads((tmp_path / "latest" / "merge.json").read_text())
    assert [s["step"] for s in record["snapshots"]] == [12, 14, 16]


def test_two_callbacks_merge_side_by_side(tmp_path):
    case = Case(Classifier, trainer={"max_epochs": 3})
    plain, module = fit(case)
    callbacks = [
        CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "close"),
        CheckpointMergeCallback(window=2, every_n_steps=8, dirpath=tmp_path / "far"),
    ]
    probe, other = fit(case, *callbacks)
    assert_same_bits(probe.outputs, plain.outputs)
    assert_same_bits(weights_of(other), weights_of(module))
    assert_mean(load_merge(tmp_path / "close" / "latest"), [probe.weights[k] for k in (20, 22, 24)])
    assert_mean(load_merge(tmp_path / "far" / "latest"), [probe.weights[k] for k in (16, 24)])


class GraphAcrossBatches(Classifier):
    """Truncated back-propagation: the graph of one batch is still alive after the next validation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kept = None

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.kept is None:
            self.kept = loss
            return loss.detach()
        self.optimizers().zero_grad()
        self.manual_backward(self.kept + loss)
        self.optimizers().step()
        self.kept = None
        return loss.detach()


def test_a_graph_that_lives_across_a_validation_still_runs_backward(tmp_path):
    case = Case(GraphAcrossBatches, trainer={"max_epochs": 3, "val_check_interval": 3})
    plain, module = fit(case)
    probe, other = fit(case, CheckpointMergeCallback(window=2, every_n_steps=1, dirpath=tmp_path))
    assert_same_bits(probe.outputs, plain.outputs)
    assert_same_bits(weights_of(other), weights_of(module))


# Trainers


def test_a_fast_dev_run_writes_nothing(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=1, dirpath=tmp_path / "merges")
    train(Classifier(), callback, data=loader(), val=loader(), fast_dev_run=True, default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_limited_by_time_publishes_its_last_merge(tmp_path, monkeypatch):
    probe = Probe()
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 60.0 if len(probe.weights) == 6 else 0.0)
    callback = CheckpointMergeCallback(
        window=3, every_n_steps=2, dirpath=tmp_path, emit_every=0, durable=False
    )
    options = {"max_time": timedelta(minutes=1), "max_steps": -1, "max_epochs": -1}
    train(Classifier(), callback, probe, data=DataLoader(Endless(), 8), **options)
    assert list(probe.weights) == [2, 4, 6, 8, 10, 12]
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


@pytest.mark.parametrize(
    "options", [{"logger": False}, {"barebones": True}, {"enable_checkpointing": True}, {"logger": True}]
)
def test_without_a_dirpath_merges_lie_beside_lightnings_logs(options, tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2)
    trainer = train(
        Classifier(), callback, data=loader(), val=loader(16), default_root_dir=tmp_path, **options
    )
    beside = Path(trainer.log_dir) if trainer.log_dir else tmp_path
    assert (beside / "merges" / "latest" / "model.safetensors").exists()


def test_checkpoints_and_merges_share_a_folder(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path, keep_best=0)
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, monitor="merged/val_loss", save_top_k=-1, filename="{step}"
    )
    train(
        Classifier(),
        callback,
        checkpoint,
        data=loader(),
        val=loader(16),
        max_epochs=3,
        enable_checkpointing=True,
    )
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert len(emissions(tmp_path)) == 3
