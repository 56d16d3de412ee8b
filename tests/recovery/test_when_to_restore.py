"""Runs that spike: when they are restored, and when they are left alone."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from spiking_runs import BURST, FIRES, SPIKE, USED, Batches, Line, bursts, expected, plain, spiking, used
from torch.optim.lr_scheduler import LambdaLR
from training_runs import assert_same_bits

from merge_callback import SpikeOptions

pytestmark = pytest.mark.filterwarnings("ignore:merge:")


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_spike_that_heals_by_itself_changes_no_bit_of_the_training(tmp_path, length):
    data = {"bad": bursts(SPIKE, length=length)}
    run = spiking(tmp_path, Batches(**data))

    assert not run.events
    assert_same_bits(run.watch.weights, plain(Batches(**data)).watch.weights)


def test_a_healthy_run_is_never_touched_whatever_its_schedule(tmp_path):
    def build():
        return Line(schedule=lambda o: LambdaLR(o, lambda s: min(1, (s + 1) / 30, max(0.0, (300 - s) / 60))))

    run = spiking(tmp_path, Batches(), 300, build, spike=SpikeOptions(grad_norm=True, evidence="rules"))

    assert not run.events
    assert_same_bits(run.watch.weights, plain(Batches(), 300, build).watch.weights)


@pytest.mark.parametrize(("action", "lines"), [("warn", ["warn"]), ("off", [])])
def test_a_watch_that_only_warns_changes_no_bit_of_the_training(tmp_path, action, lines):
    run = spiking(tmp_path, Batches(bad=BURST, broken=[95]), spike={"action": action})

    assert [event["event"] for event in run.events] == lines * 2
    unwatched = plain(Batches(bad=BURST, broken=[95])).watch.weights
    for step in range(1, 95):  # afterwards it is NaN, which equals nothing
        assert_same_bits(run.watch.weights[step], unwatched[step])


def test_one_nan_is_a_spike(tmp_path):
    run = spiking(tmp_path, Batches(broken=[SPIKE]))

    assert [(e["onset"], e["restored_at"]) for e in run.restores] == [(SPIKE, SPIKE + 1)]
    assert_same_bits(run.watch.weights[SPIKE + 1], expected(run, USED))
    assert run.watch.losses[100] < run.watch.losses[1]


class Bare(Line):
    """Plain gradient descent without the batch norm, which would keep it from diverging.

    Args:
        foot: steps of the warm-up.
        peak: what the learning rate is multiplied by for six steps from step 100 on.
    """

    def __init__(self, foot, peak):
        def factor(step):
            return min(1.0, (step + 1) / foot) * (peak if 100 <= step < 106 else 1.0)

        super().__init__(lr=0.02, optimizer=torch.optim.SGD, schedule=lambda o: LambdaLR(o, factor))
        del self.net[1]


@pytest.mark.parametrize("foot", [20, 1], ids=["after a warm-up", "after a constant rate"])
def test_a_learning_rate_that_makes_a_run_diverge_is_survived(tmp_path, foot):
    def late(watched):
        return sum(watched.watch.losses[step] for step in range(231, 251)) / 20

    run = spiking(tmp_path, Batches(), 250, lambda: Bare(foot, 30.0))

    assert math.isnan(late(plain(Batches(), 250, lambda: Bare(foot, 30.0))))
    unbroken = plain(Batches(), 250, lambda: Bare(foot, 1.0))
    assert late(run) == pytest.approx(late(unbroken), rel=0.02)  # what the callback promises
    (event,) = run.restores
    # The first two losses that a raised rate had a part in rise little. Where the rate never changed
    # before, a rise is taken for the warm-up, and for its three steps nothing is judged.
    assert event["onset"] <= 104 + (3 if foot == 1 else 0)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(tmp_path, accumulate):
    bad = bursts(accumulate * (SPIKE - 1) + 1, length=5 * accumulate)
    run = spiking(tmp_path, Batches(bad=bad), 90, fit={"accumulate_grad_batches": accumulate})

    (event,) = run.restores
    assert (event["onset"], event["restored_at"]) == (SPIKE, FIRES)
    # A step's last micro-batch is seen by the same weights as its first; the batch norm moves in between,
    # but does not enter the loss of a training step.
    twin = copy.deepcopy(run.module)
    twin.load_state_dict(run.watch.weights[SPIKE - 1])
    batches = run.watch.batches[accumulate * (SPIKE - 1) : accumulate * SPIKE]
    with torch.no_grad():
        mean = sum(float(twin.loss(batch)) for batch in batches) / accumulate
    assert event["values"][0] == pytest.approx(mean, rel=1e-6)  # fp32 losses, divided and multiplied again


class Fp16:
    """The precision plugin of fp16 on the CPU, and the loss scale after every step."""

    def __init__(self, **options):
        self.plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))
        self.scales, outer = {}, self

        class Note(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                outer.scales[trainer.global_step] = outer.plugin.scaler.get_scale()

        self.note = Note()


def test_steps_that_loss_scaling_skips_are_no_spike(tmp_path):
    fp16 = Fp16(init_scale=256.0, growth_interval=2)
    run = spiking(tmp_path, Batches(), 150, callbacks=[fp16.note], fit={"plugins": [fp16.plugin]})

    skipped = [step for step in range(80, 151) if fp16.scales[step] < fp16.scales[step - 1]]
    assert len(skipped) > 5
    assert not run.events
    again = Fp16(init_scale=256.0, growth_interval=2)
    without = plain(Batches(), 150, callbacks=[again.note], fit={"plugins": [again.plugin]})
    assert_same_bits(run.watch.weights, without.watch.weights)


def test_the_loss_scale_starts_over_at_a_restore(tmp_path):
    fp16 = Fp16(init_scale=16.0, growth_interval=70)
    data = Batches(bad=bursts(SPIKE, length=5))
    run = spiking(tmp_path, data, 90, callbacks=[fp16.note], fit={"plugins": [fp16.plugin]})

    (event,) = run.restores
    assert fp16.scales[FIRES - 1] == 32.0
    assert fp16.scales[FIRES] == 16.0
    assert used(event) == USED
    assert_same_bits(run.watch.weights[FIRES], expected(run, USED))


def test_a_bf16_run_is_restored(tmp_path):
    run = spiking(tmp_path, fit={"precision": "bf16-mixed"})

    assert_same_bits(run.watch.weights[FIRES], expected(run, USED))


def test_gradients_that_blow_up_under_a_calm_loss_are_a_spike_if_they_are_watched(tmp_path):
    class Steep(Line):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            steepness = 1e4 if self.trainer.global_step + 1 in BURST else 1.0
            return loss.detach() + steepness * (loss - loss.detach())

    def build():
        return Steep(lr=1e-3)

    run = spiking(tmp_path / "watched", Batches(), module=build, spike={"grad_norm": True})
    blind = spiking(tmp_path / "blind", Batches(), module=build)

    (event,) = run.restores
    assert (event["trigger"], event["onset"]) == ("gradient norm", SPIKE)
    assert_same_bits(run.watch.weights[FIRES], expected(run, USED))
    assert not blind.events
