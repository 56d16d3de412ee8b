"""Real runs with hard data, which nobody may restore, and with broken weights, which somebody has to."""

import json

import pytest
import torch
from hard_data_runs import EVIDENCE, WRECKED, Guarded, wreck
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
