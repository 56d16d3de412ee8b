"""Whose fault a spike is: the judgement, the trial, and the batches that it takes."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from merge_callback.recovery.evidence import (
    Alarm,
    HeldBatch,
    HeldBatches,
    Trial,
    UnrepeatableStepError,
    is_clearly_better,
)
from merge_callback.sharding import Ranks
from merge_callback.snapshots.capture import ModelTensors

pytestmark = pytest.mark.filterwarnings("ignore:merge:")

NAN, INF = math.nan, math.inf
ALARM = Alarm.of(baseline=2.0, threshold=2.2, value=9.0)


# --- the judgement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("live", "candidate", "guilty"),
    [
        (9.0, 2.0, True),
        (9.0, 5.5, True),  # half of the excess of 7 is gone
        (9.0, 5.6, False),
        (9.0, 9.5, False),
        (2.2, 1.0, False),  # sound by now, however good the other
        (NAN, 50.0, True),
        (INF, 2.0, True),
        (9.0, NAN, False),
        (NAN, NAN, False),  # a batch that is NaN with any weights
        (INF, INF, False),
    ],
)
def test_the_weights_are_to_blame_where_others_do_clearly_better(live, candidate, guilty):
    assert is_clearly_better(candidate, live, ALARM) is guilty


@pytest.mark.parametrize(("baseline", "live", "candidate"), [(-3.0, 1.0, -2.0), (0.0, 1.0, 0.4)])
def test_losses_may_be_negative_or_zero(baseline, live, candidate):
    alarm = Alarm.of(baseline, baseline + 0.1, live)
    assert is_clearly_better(candidate, live, alarm)
    assert not is_clearly_better(live - 0.4 * (live - baseline), live, alarm)


def test_another_loss_is_judged_by_the_same_share_of_excess():
    alarm = Alarm.of(baseline=2.0, threshold=2.2, value=4.0)  # half of it is excess
    assert alarm.scaled_to(10.0) == Alarm(5.0, 5.0, 0.5)
    assert alarm.scaled_to(-10.0).baseline == -15.0
    assert Alarm.of(2.0, 2.2, NAN).scaled_to(10.0).baseline == 0.0


# --- the trial, of a plain model ----------------------------------------------------------------------------


class PlainTrial:
    """A trial as a plain training loop would set it up: this is all that it has to supply."""

    def __init__(self, weight):
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.fill_(weight)
        self.passes = []
        self.trial = Trial("batch", self.rehearse, lambda: ModelTensors.of(self.model), Ranks())

    @contextmanager
    def rehearse(self):
        kept = copy.deepcopy(self.model.state_dict())
        yield self.loss_of
        self.model.load_state_dict(kept)

    def loss_of(self, batches):
        self.passes.append(float(self.model.weight))
        return sum(float(self.model(held.batch).mean()) for held in batches) / len(batches)

    @staticmethod
    def put_in(weight):
        return lambda model: model.tensors["weight"].fill_(weight)

    def hold(self, candidate, newest, batches=None):
        batches = batches or [HeldBatch(torch.ones(2, 1), 0)]
        return self.trial.hold(self.put_in(candidate), self.put_in(newest), batches, ALARM)


def test_sound_weights_take_one_pass_hard_data_two_and_guilt_three():
    for live, candidate, newest, passes in [(2.1, 2, 2, 1), (9, 8.9, 2, 2), (9, 2, 8.9, 3), (9, 2, 2.1, 3)]:
        case = PlainTrial(live)
        evidence = case.hold(candidate, newest)
        assert evidence.guilty == (newest == 2.1)
        assert len(case.passes) == passes
        assert evidence.live == pytest.approx(live)
        assert float(case.model.weight) == pytest.approx(live)  # they are back


def test_a_merge_that_is_better_than_any_single_snapshot_proves_nothing():
    # On hard data, too: what speaks against the live weights is a single snapshot that does better.
    evidence = PlainTrial(9.0).hold(candidate=3.0, newest=8.8)
    assert not evidence.guilty
    assert (evidence.candidate, evidence.snapshot) == pytest.approx((3.0, 8.8))


def test_a_loss_that_cannot_be_computed_is_no_evidence_and_the_weights_are_back():
    case = PlainTrial(9.0)
    with pytest.raises(UnrepeatableStepError, match="RuntimeError"):
        case.hold(2.0, 2.0, [HeldBatch(torch.ones(3, 7), 0)])
    assert float(case.model.weight) == 9.0


# --- the batches that are held ------------------------------------------------------------------------------


def held(batches, step):
    return [held.batch for held in batches.of(step)]


def test_the_batches_of_the_last_two_steps_are_held():
    batches = HeldBatches()
    for step in (1, 2, 3):
        for micro in "ab":
            batches.add(f"{step}{micro}", 0)
        batches.end_step(step)
    assert held(batches, 2) == ["2a", "2b"]
    assert held(batches, 3) == ["3a", "3b"]
    assert held(batches, 1) == ["2a", "2b"]  # of the oldest that are there


def test_of_many_micro_batches_the_newest_eight_are_held():
    batches = HeldBatches()
    for step in (1, 2):
        for micro in range(20):
            batches.add((step, micro), micro)
        batches.end_step(step)
    assert held(batches, 2) == [(2, micro) for micro in range(12, 20)]
    assert held(batches, 1) == held(batches, 2)  # the others are gone


def test_large_batches_are_not_held_any_longer_than_training_does(monkeypatch):
    monkeypatch.setattr("merge_callback.recovery.evidence._MOST_BYTES", 1000)
    batches = HeldBatches()
    for step in (1, 2):
        batches.add({"x": torch.zeros(300), "n": step}, 0)
        batches.end_step(step)
        assert len(batches.all) == 1
        assert held(batches, 1)[0]["n"] == step
    small = HeldBatches()
    for step in range(9):
        small.add([torch.zeros(60)], step)  # 240 bytes
        small.end_step(step)
    assert len(small.all) == 4


def test_what_a_training_step_takes_out_of_a_batch_is_still_held():
    batches, batch = HeldBatches(), {"x": 1, "labels": 2}
    batches.add(batch, 0)
    batch.pop("labels")
    batches.end_step(1)
    assert held(batches, 1) == [{"x": 1, "labels": 2}]
