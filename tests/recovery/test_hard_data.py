"""Real runs with hard data, which nobody may restore, and with broken weights, which somebody has to."""

import json
import math

import pytest
import torch
from spiking_runs import (
    BURST,
    EVERY,
    FIRES,
    MEMORY,
    SPIKE,
    USED,
    Batches,
    Damage,
    Line,
    TwoOptimizers,
    events,
    plain,
    spiking,
    used,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from training_runs import assert_same_bits, train

from merge_callback import CheckpointMergeCallback, SpikeOptions, TrainingDivergedError
from merge_callback import merge_state_dicts as merge

pytestmark = pytest.mark.filterwarnings("ignore:merge:")


# --- real runs ----------------------------------------------------------------------------------------------

EVIDENCE = {"evidence": "batch", "rewarm_steps": 10, "cooldown": 128}


def wreck(module):
    """What no data do: the output is off by 30 from now on."""
    module.net[2].bias += 30


WRECKED = Damage({SPIKE - 1: wreck})
"""The loss of the next batch, number ``SPIKE``, is the first that shows it."""


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory):
    """A run whose weights are broken by something other than its data."""
    return spiking(tmp_path_factory.mktemp("wrecked"), Batches(), 100, callbacks=[WRECKED], spike=EVIDENCE)


def test_a_burst_of_bad_data_restores_nothing_and_changes_not_one_bit(tmp_path):
    run = spiking(tmp_path, Batches(bad=BURST), 200, spike=EVIDENCE)

    (event,) = [e for e in run.events if e["event"] != "drift"]
    assert (event["event"], event["onset"], event["step"]) == ("hard data", SPIKE, FIRES - 1)
    assert event["evidence"]["source"] == "batch"
    assert event["evidence"]["candidate"] > 0.5 * event["evidence"]["live"]
    assert_same_bits(run.watch.weights, plain(Batches(bad=BURST), 200).watch.weights)


def test_snapshots_of_hard_data_are_merged_like_others(tmp_path):
    run = spiking(tmp_path, Batches(bad=BURST), 100, spike=EVIDENCE)

    assert SPIKE in [snapshot["step"] for snapshot in run.window]
    assert not any(snapshot["in_spike"] for snapshot in run.window)


def test_broken_weights_are_restored_at_the_step_they_always_were(wrecked):
    run = wrecked

    (event,) = run.restores
    assert used(event) == USED
    assert (event["onset"], event["step"], event["restored_at"]) == (SPIKE, FIRES - 1, FIRES)
    assert_same_bits(run.watch.weights[FIRES], merge([run.watch.weights[step] for step in USED]))
    evidence = event["evidence"]
    assert evidence["live"] > 100 > 10 > evidence["candidate"]
    assert evidence["snapshot"] < 10


def test_the_losses_of_the_trial_are_those_of_the_very_batch(wrecked):
    run = wrecked

    (event,) = run.restores
    batch = Batches().draw(event["step"])
    module = Line()
    # The live weights of the trial have taken one step more; the merge is what was restored.
    module.load_state_dict(run.watch.weights[FIRES])
    assert event["evidence"]["candidate"] == pytest.approx(float(module.loss(batch)), rel=1e-6)


def test_weights_that_are_not_finite_need_no_trial(tmp_path):
    def poison(module):
        module.net[2].bias.fill_(torch.nan)

    run = spiking(tmp_path, Batches(), 100, callbacks=[Damage({SPIKE - 1: poison})], spike=EVIDENCE)

    (event,) = run.restores
    assert event["step"] == SPIKE  # at once
    assert event["evidence"]["source"] == "weights"
    assert all(tensor.isfinite().all() for tensor in run.watch.weights[100].values())


class Guarded(Line):
    """Drops the gradients of a batch whose loss is not finite."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)


class Infinite(Guarded):
    """Has an infinite loss now and then, and for eight batches in a row."""

    def training_step(self, batch, batch_idx):
        step = self.global_step
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if step % 25 == 20 or step in range(150, 158) else loss


def test_a_loss_that_is_not_finite_is_hard_data_where_the_weights_are_sound(tmp_path):
    run = spiking(tmp_path, Batches(), 200, Infinite, spike=EVIDENCE)

    assert not run.restores
    (event,) = [e for e in run.events if e["event"] != "drift"]
    assert (event["event"], event["trigger"]) == ("hard data", "non-finite loss")
    assert_same_bits(run.watch.weights, plain(Batches(), 200, Infinite).watch.weights)


def test_a_change_of_the_data_ends_as_the_new_normal_without_a_restore(tmp_path):
    run = spiking(tmp_path, Batches(shift=90), 400, spike=EVIDENCE)

    assert not run.restores
    assert run.events[0]["event"] == "hard data"
    assert_same_bits(run.watch.weights[400], plain(Batches(shift=90), 400).watch.weights[400])


def test_damage_that_is_no_outlier_is_found_as_a_rise_that_lasts(tmp_path):
    def harm(module):  # by 4 standard deviations of the loss, where 6 make an outlier
        module.net[2].bias += 1.6

    class Settled(Line):
        """Has learned what there is to learn by step 200, and goes on so slowly that it does not heal."""

        def __init__(self):
            super().__init__(schedule=lambda o: LambdaLR(o, lambda step: 1.0 if step < 200 else 0.01))

    wrecking = Damage({450: harm})
    run = spiking(tmp_path, Batches(), 600, Settled, callbacks=[wrecking], spike=EVIDENCE, window=30)

    (event,) = run.restores
    assert event["trigger"] == "loss"
    assert 450 - 16 <= event["onset"] <= 482
    assert all(step <= 450 for step in used(event))
    assert run.watch.weights[600]["net.2.bias"] - run.watch.weights[450]["net.2.bias"] < 0.2


def test_a_surge_of_the_rate_in_a_run_without_a_warm_up_is_seen(tmp_path):
    # The phase takes the rise for a warm-up, in which nothing was judged for 290 steps.
    def build():
        return Line(schedule=lambda o: LambdaLR(o, lambda step: 60.0 if 200 <= step < 240 else 1.0))

    run = spiking(tmp_path, Batches(), 400, build, spike=EVIDENCE, window=30)

    first = run.restores[0]
    assert 200 <= first["onset"] <= first["step"] <= 240
    assert all(step <= 200 for step in used(first))
    assert first["evidence"]["live"] > 3 * first["baseline"]
    assert run.watch.losses[400] < 2 * first["threshold"]


# --- in a row -----------------------------------------------------------------------------------------------


def test_a_restore_followed_by_a_clean_history_was_a_success(tmp_path):
    wrecks = Damage(dict.fromkeys(range(79, 79 + 3 * 160, 160), wreck))
    run = spiking(
        tmp_path, Batches(), 79 + 3 * 160, callbacks=[wrecks], spike={**EVIDENCE, "max_restores": 2}
    )

    assert [event["in_a_row"] for event in run.restores] == [1] * 3  # two without a success would end it
    assert {event["lr_factor"] for event in run.restores} == {1.0}
    # Always the newest clean snapshots, never further back.
    assert all(event["onset"] - 30 <= used(event)[-1] for event in run.restores)


def test_a_run_is_ended_only_by_a_divergence_that_restores_did_not_cure(tmp_path):
    wrecks = Damage(dict.fromkeys(range(79, 400, 12), wreck))
    with pytest.raises(TrainingDivergedError) as stopped:
        spiking(tmp_path, Batches(), 400, callbacks=[wrecks], spike={**EVIDENCE, "max_restores": 2})

    said = str(stopped.value)
    assert "2 restores in a row did not help (on the same batch the live weights score" in said
    for part in ("gradient norm is", "the learning rate 0.0", "qk-norm", "z-loss", "fp32", "other data"):
        assert part in said
    record = json.loads((tmp_path / "spikes.jsonl").read_text().splitlines()[-1])
    assert record["event"] == "stop"
    assert record["evidence"]["live"] > record["evidence"]["candidate"]
    assert record["grad_norm"] > 0
    assert 0 < record["lr"] <= 0.02


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


# --- what the validation has to say -------------------------------------------------------------------------


class Surrogate(Line):
    """Trains on what is no measure of how good it is: its scale is learned, too, and grows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch, batch_idx):
        if self.global_step >= SPIKE:
            with torch.no_grad():
                self.scale += 1.0
        return super().training_step(batch, batch_idx) * self.scale.detach() + 0 * self.scale

    def val_dataloader(self):
        return DataLoader([Batches().draw(10**4 + i) for i in range(12)], batch_size=None)


def test_the_validation_may_speak_up_for_weights_whose_training_loss_rises_by_design(tmp_path):
    fit = {"val_check_interval": 20}
    run = spiking(tmp_path, Batches(), 140, Surrogate, spike=EVIDENCE, fit=fit)

    events = [e for e in run.events if e["event"] != "drift"]
    assert not run.restores
    live, candidate = events[0]["evidence"]["validation"]
    assert live < 1.3 * candidate
    assert_same_bits(run.watch.weights, plain(Batches(), 140, Surrogate, fit=fit).watch.weights)


# --- options ------------------------------------------------------------------------------------------------


def test_by_the_rules_alone_a_burst_restores(tmp_path):
    run = spiking(tmp_path, spike={**EVIDENCE, "evidence": "rules"})

    assert [event["evidence"] for event in run.restores] == [None]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"evidence": "loss"}, "spike.evidence='loss' must be one of 'batch', 'validation', 'rules'"),
        ({"on_spike": "stop"}, "spike.on_spike='stop' must be a function of the event"),
        ({"watch": 3}, "spike.watch=3 must be a list of name patterns"),
        ({"watch": {"loss/*": "stop"}}, r"spike.watch\['loss/\*'\]='stop' must be one of 'restore', 'warn'"),
    ],
)
def test_wrong_options_name_themselves(options, named):
    with pytest.raises(ValueError, match=named):
        SpikeOptions(**options)


def test_an_optimizer_that_can_t_be_set_back_trains_all_the_same_where_nobody_asked_for_restores(tmp_path):
    class Own(torch.optim.SGD):
        """Has a step of its own, which may keep anything as its state."""

        def step(self, closure=None):
            return super().step(closure)

    def build():
        return Line(optimizer=Own)

    with pytest.raises(ValueError, match="cannot reset the state of"):
        spiking(tmp_path / "a", module=build, spike=EVIDENCE)
    with pytest.warns(UserWarning, match="loss spikes are only reported, nothing is restored: .*Own"):
        train(
            build(),
            CheckpointMergeCallback(every_n_steps=EVERY, dirpath=tmp_path / "b", **MEMORY),
            data=Batches(bad=BURST),
            max_steps=100,
        )
    (event,) = events(tmp_path / "b")
    assert event["event"] == "warn"
