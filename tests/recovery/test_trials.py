"""Steps that are tried again to tell the data from the weights, and steps that can't be."""

import math

import pytest
import torch
from hard_data_runs import EVIDENCE, WRECKED, Guarded, wreck
from spiking_runs import (
    BURST,
    SPIKE,
    USED,
    Batches,
    Damage,
    Line,
    TwoOptimizers,
    plain,
    spiking,
    used,
)
from torch.utils.data import DataLoader
from training_runs import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:merge:")


# --- what can't be repeated ---------------------------------------------------------------------------------


class ByHand(Line):
    """Trains by hand, accumulates by hand, clips and steps the optimizer and its scheduler."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.runs = False, 0

    def training_step(self, batch, batch_idx):
        self.runs += 1
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.toggle_optimizer(optimizer)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)
        return loss


def test_a_manual_optimization_is_tried_without_training_anything(tmp_path):
    hard = spiking(tmp_path / "a", Batches(bad=BURST), 150, ByHand, spike=EVIDENCE)
    assert [e["event"] for e in hard.events if e["event"] != "drift"] == ["hard data"]
    unwatched = plain(Batches(bad=BURST), 150, ByHand)
    assert_same_bits(hard.watch.weights, unwatched.watch.weights)
    assert_same_bits(hard.watch.states, unwatched.watch.states)
    assert hard.module.runs == unwatched.module.runs == 150

    broken = spiking(tmp_path / "b", Batches(), 100, ByHand, callbacks=[WRECKED], spike=EVIDENCE)
    assert [used(event) for event in broken.restores] == [USED]


class Taking(Line):
    """Takes the noise that it adds from an iterator."""

    def __init__(self):
        super().__init__()
        self.noise = iter(range(10**6))

    def training_step(self, batch, batch_idx):
        next(self.noise)
        return super().training_step(batch, batch_idx)


class Validated(Taking):
    """The same, validated now and then; it learns so slowly that a burst does it no harm."""

    def __init__(self, lr=1e-3):
        super().__init__()
        self.build = lambda parameters: torch.optim.Adam(parameters, lr=lr)

    def val_dataloader(self):
        return DataLoader([Batches().draw(10**4 + i) for i in range(12)], batch_size=None)


def test_a_step_that_takes_from_an_iterator_is_judged_by_the_validation(tmp_path):
    fit = {"val_check_interval": 20}
    hard = spiking(tmp_path / "a", Batches(bad=BURST), 100, Validated, spike=EVIDENCE, fit=fit)
    (event,) = [e for e in hard.events if e["event"] != "drift"]
    assert (event["event"], event["evidence"]["source"]) == ("hard data", "validation")
    assert_same_bits(hard.watch.weights, plain(Batches(bad=BURST), 100, Validated, fit=fit).watch.weights)

    broken = spiking(tmp_path / "b", Batches(), 100, Validated, callbacks=[WRECKED], spike=EVIDENCE, fit=fit)
    (event,) = broken.restores
    assert (used(event), event["evidence"]["source"]) == (USED, "validation")


def test_without_a_validation_the_losses_alone_decide_and_that_is_said_once(tmp_path):
    with pytest.warns(UserWarning, match="could not be tried on the batch") as warned:
        run = spiking(tmp_path, Batches(bad=[*BURST, *range(110, 115)]), 130, Taking, spike=EVIDENCE)

    assert len(run.restores) >= 1
    assert run.restores[0]["evidence"] is None
    said = [str(w.message) for w in warned if "could not be tried on the batch" in str(w.message)]
    assert len(said) == 1
    assert "may take from an iterator that the module holds (<range_iterator" in said[0]


class InTurn(TwoOptimizers):
    """Its optimizers take turns: ten batches each."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        optimizer = self.optimizers()[batch_idx // 10 % 2]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_the_loss_of_opponents_restores_nothing_without_evidence(tmp_path):
    bad = range(241, 250)
    run = spiking(tmp_path, Batches(bad=bad), 300, InTurn, spike=EVIDENCE)

    assert [event["event"] for event in run.events if event["event"] != "drift"] == ["warn"]
    assert "take turns" in run.events[0]["reason"]


def test_optimizers_that_step_together_are_tried_like_one(tmp_path):
    def slow():
        return TwoOptimizers(lr=1e-4)  # else the bad batches harm the weights

    bad = range(80, 86)
    hard = spiking(tmp_path / "a", Batches(bad=bad), 240, slow, spike=EVIDENCE)
    assert not hard.restores
    assert any(event["event"] == "hard data" for event in hard.events)
    assert_same_bits(hard.watch.weights, plain(Batches(bad=bad), 240, slow).watch.weights)

    wrecking = Damage({2 * SPIKE: wreck})  # each batch counts two steps
    broken = spiking(tmp_path / "b", Batches(), 240, TwoOptimizers, callbacks=[wrecking], spike=EVIDENCE)
    assert broken.restores[0]["evidence"]["source"] == "batch"
    assert broken.watch.losses[240] < 10


class Counting(Line):
    """Its own counter decides which batches are hard: seven in a hundred."""

    def __init__(self):
        super().__init__(lr=1e-3)
        self.count = 0
        self.register_buffer("counted", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.counted += 1
        x, y = batch
        hard = self.count % 100 in range(80, 87) or int(self.counted) % 100 in range(40, 47)
        return super().training_step((x, 20 - 5 * y if hard else y), batch_idx)


def test_each_pass_of_a_trial_starts_from_the_same_state(tmp_path):
    run = spiking(tmp_path, Batches(), 250, Counting, spike=EVIDENCE)

    assert not run.restores
    assert any(event["event"] == "hard data" for event in run.events)
    assert_same_bits(run.watch.weights, plain(Batches(), 250, Counting).watch.weights)


class PoisonedBuffer(Guarded):
    """Divides by a running scale that one batch makes NaN; the weights stay finite."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def training_step(self, batch, batch_idx):
        if self.global_step == SPIKE:
            self.scale.fill_(torch.nan)
        return torch.nn.functional.mse_loss(self.net(batch[0]) / self.scale, batch[1])


def test_a_buffer_that_is_not_finite_breaks_a_model_like_a_weight(tmp_path):
    run = spiking(tmp_path, Batches(), 120, PoisonedBuffer, spike=EVIDENCE)

    assert run.restores[0]["evidence"]["source"] == "weights"
    assert math.isfinite(run.watch.losses[120])


class Penalised(Line):
    """Asks for gradients in its training step."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return torch.nn.functional.mse_loss(self.net(x), batch[1]) + 1e-3 * slope.square().mean()


def test_a_step_that_needs_gradients_has_them(tmp_path):
    run = spiking(tmp_path, Batches(bad=BURST), 100, Penalised, spike=EVIDENCE)

    assert [e["event"] for e in run.events if e["event"] != "drift"] == ["hard data"]
    assert_same_bits(run.watch.weights, plain(Batches(bad=BURST), 100, Penalised).watch.weights)
