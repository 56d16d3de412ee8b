"""Runs that begin at a constant rate which is raised later: by mistake, or as a warm-up of a few stairs."""

import pytest
import torch
from lightning.pytorch import Callback
from spiking_runs import EVERY, Batches, Line, events, spiking, used
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from training_runs import one_thread, seed

from merge_callback import CheckpointMerger

pytestmark = pytest.mark.filterwarnings("ignore:merge:")

RAISED = 200
"""Steps before the rate is raised."""

OPTIONS = {"every_n_steps": EVERY, "durable": False, "emit_every": 0}
SPIKE = {"rewarm_steps": 10}


def surge(step):
    return 25.0 if RAISED <= step < RAISED + 40 else 1.0


def for_good(step):
    return 25.0 if step >= RAISED else 1.0


def stairs(step):
    """As of a warm-up over five epochs from 1e-6 to 1e-3, stepped once per epoch."""
    return max(5e-3, step // RAISED / 5) if step < 5 * RAISED else 1.0


class Deep(Line):
    """Breaks for good at a rate that is 25 times too high: its units die."""

    def __init__(self, rates=None):
        super().__init__(schedule=lambda optimizer: LambdaLR(optimizer, rates))
        self.net = nn.Sequential(*hidden(8), *hidden(16), nn.Linear(16, 1))

    def loss(self, batch):
        return super().loss(batch) + 5  # what can't be learned: a diverged loss is not several times as high


def hidden(width):
    return nn.Linear(width, 16), nn.ReLU()


class Endless:
    """Batches without a length."""

    def __iter__(self):
        return iter(Batches())


class EndsAfter(Callback):
    """Ends a run, however long it was meant to be."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.steps


class Loop:
    """A loop of one's own with a ``CheckpointMerger``; ``rates`` gives the factor of every step."""

    def __init__(self, folder, rates, lr=0.02, **options):
        seed()
        self.module, self.rates, self.lr = Deep(), rates, lr
        self.net = self.module.net
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, foreach=False)
        options = {**OPTIONS, "spike": SPIKE, "window": 30, **options}
        self.merger = CheckpointMerger(self.net, self.optimizer, dirpath=folder, **options)

    def train(self, steps):
        with one_thread():
            for step in steps:
                self.optimizer.param_groups[0]["lr"] = self.lr * self.rates(step)
                self.optimizer.zero_grad()
                loss = self.module.loss(Batches().draw(step + 1))
                loss.backward()
                self.optimizer.step()
                self.merger.step(loss=loss)
        return self


def assert_restored(folder, latest):
    """The first restore goes back to three snapshots from before the rate was raised; returns its event."""
    first = next(event for event in events(folder) if event["event"] == "restore")
    assert RAISED <= first["onset"] <= first["step"] <= latest
    assert len(used(first)) == 3
    assert all(step <= RAISED for step in used(first))
    return first


LENGTHS = {
    "known and long": {"max_steps": 4000},
    "not given": {"max_steps": -1, "max_epochs": -1},
    "that of data without one": {"max_steps": -1, "max_epochs": 2},
}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_surge_of_the_first_rate_is_seen_whatever_the_length_of_the_run(length, tmp_path):
    data = Endless() if length == "that of data without one" else Batches()
    fit = {**LENGTHS[length]}
    steps, build, spike = fit.pop("max_steps"), lambda: Deep(surge), {**SPIKE, "evidence": "batch"}
    run = spiking(tmp_path, data, steps, build, [EndsAfter(300)], spike, fit, window=30)
    first = assert_restored(tmp_path, RAISED + 45)
    assert first["evidence"]["live"] > first["threshold"]
    assert run.watch.losses[300] < first["threshold"]


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["a number", "a tensor"])
@pytest.mark.parametrize("total", [None, 10_000])
def test_a_first_rate_that_is_raised_for_good_is_seen_by_a_loop_of_ones_own(total, lr, tmp_path):
    loop = Loop(tmp_path, for_good, lr, total_steps=total)
    with loop.merger:
        loop.train(range(RAISED + 80))
    assert_restored(tmp_path, RAISED + 70)


def test_a_resumed_run_with_a_rate_that_is_too_high_is_restored(tmp_path):
    first = Loop(tmp_path, lambda step: 1.0, durable=True)
    with first.merger:
        first.train(range(RAISED))
        state, weights, moments = (o.state_dict() for o in (first.merger, first.net, first.optimizer))
    second = Loop(tmp_path, for_good, durable=True)
    second.net.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    second.merger.load_state_dict(state)
    with second.merger:
        second.train(range(RAISED, RAISED + 80))
    assert_restored(tmp_path, RAISED + 70)


@pytest.mark.parametrize("total", [None, 10_000])
def test_a_warm_up_of_a_few_stairs_is_left_alone(total, tmp_path):
    loop = Loop(tmp_path, stairs, total_steps=total)
    with loop.merger:
        loop.train(range(6 * RAISED))
    assert not events(tmp_path)
