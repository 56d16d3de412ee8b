"""Runs that spike: what is restored, from what, how training goes on, when it stops, and what is told."""

import copy
import functools
import itertools
import json
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from spiking_runs import (
    BURST,
    EVERY,
    FIRES,
    SPIKE,
    USED,
    Batches,
    Damage,
    Line,
    TwoOptimizers,
    bursts,
    plain,
    spiking,
    used,
)
from torch.optim.lr_scheduler import LambdaLR
from training_runs import assert_same_bits

from merge_callback import SpikeOptions, load_merge
from merge_callback import merge_state_dicts as merge
from merge_callback.snapshots import live_merge
from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.live_merge import HalfRestoredError

pytestmark = pytest.mark.filterwarnings("ignore:merge:")

REWARM = 10
"""Of every run here, unless told otherwise."""


def expected(run, steps, **options):
    """The merge of the weights that the run's steps left behind."""
    return merge([run.watch.weights[step] for step in steps], **options)


def own_step(kind):
    """A subclass of an optimizer whose step may keep anything as its state."""
    return type("Own", (kind,), {"step": lambda self, closure=None: kind.step(self, closure)})


# --- a restore that fails half way --------------------------------------------------------------------------


@pytest.fixture
def short_of_memory(monkeypatch):
    """Makes so many restores run out of memory once the first tensor is overwritten."""

    def fail(times):
        real, left = live_merge.merge_into, [times]

        def merge_into(factors, arenas, tensors, *args):
            if left[0]:
                left[0] -= 1
                next(iter(tensors.values())).zero_()
                raise MemoryError("on purpose")
            return real(factors, arenas, tensors, *args)

        monkeypatch.setattr(live_merge, "merge_into", merge_into)

    return fail


def test_a_restore_that_runs_out_of_memory_is_made_once_more(tmp_path, short_of_memory):
    short_of_memory(1)
    run = spiking(tmp_path)

    assert used(run.restores[0]) == USED
    assert_same_bits(run.watch.weights[FIRES], expected(run, USED))


def test_weights_of_a_restore_that_failed_half_way_are_never_saved(tmp_path, short_of_memory):
    class Rescue(Callback):
        def on_exception(self, trainer, module, exception):
            with pytest.raises(HalfRestoredError, match="not saved"):
                trainer.save_checkpoint(tmp_path / "rescued.ckpt")
            rescued.append(type(exception))

    rescued = []
    short_of_memory(2)
    with pytest.raises(HalfRestoredError, match="on purpose"):
        spiking(tmp_path, callbacks=[Rescue()])

    assert rescued == [HalfRestoredError]
    assert not (tmp_path / "rescued.ckpt").exists()


# --- what is restored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["disk", "cpu", "device"])
def test_the_live_weights_become_the_merge_of_the_snapshots_before_the_spike(tmp_path, storage):
    run = spiking(tmp_path, storage=storage, durable=storage == "disk")

    (event,) = run.restores
    assert used(event) == USED
    assert (event["onset"], event["step"], event["restored_at"]) == (SPIKE, FIRES - 1, FIRES)
    assert_same_bits(run.watch.weights[FIRES], expected(run, USED))
    # Integers are no mean: the batch norm has counted as many batches as in the newest of the snapshots.
    assert run.watch.weights[FIRES]["net.1.num_batches_tracked"] == USED[-1]


@pytest.mark.parametrize("storage", ["disk", "cpu", "device"])
def test_the_live_weights_become_the_merge_of_differences_and_later_ones_build_on_what_is_left(
    tmp_path, storage
):
    held = {}

    def look(module):  # before the batch of step 90, the next that a snapshot is taken after
        window = module.trainer.callbacks[0].session.window
        held.update(by_step(window))

    run = spiking(
        tmp_path,
        storage=storage,
        durable=storage == "disk",
        snapshot_codec="delta-fp16",
        callbacks=[Damage({FIRES + 1: look})],
    )

    (event,) = run.restores
    assert used(event) == USED
    restored, exact = run.watch.weights[FIRES], expected(run, USED)
    for name, tensor in merge([held[step] for step in USED]).items():
        # A sum of differences rounds to fp32 elsewhere than a sum of weights: a few times, of the largest.
        torch.testing.assert_close(restored[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))
        moved = max(
            float((run.watch.weights[b][name] - run.watch.weights[a][name]).abs().max())
            for a, b in itertools.pairwise([USED[0] - EVERY, *USED])
        )
        # bf16 has 8 bits: each snapshot is off by 2^-8 of its step at most, and so is their mean.
        limit = 2.0**-8 * moved * 1.01 + 1e-6 * float(tensor.abs().max())
        torch.testing.assert_close(restored[name], exact[name], rtol=0, atol=limit)
    records = {record["step"]: record for record in run.window}
    assert list(records) == [*range(40, 75, EVERY), 90, 95, 100]
    assert [records[step]["difference_to"] for step in (40, 70, 90, 95, 100)] == [None, 65, 70, 90, 95]


def by_step(window):
    """The whole tensors of every snapshot in a window."""
    arenas = [snapshot.arena for snapshot in window.snapshots]
    shapes = {s.name: s.shape for group in window.store.layout.groups for s in group.segments}
    return {
        snapshot.step: {n: t[:].clone().view(shapes[n]) for n, t in flat_tensors(arenas[: i + 1]).items()}
        for i, snapshot in enumerate(window.snapshots)
    }


def test_the_method_the_window_and_the_guard_are_the_user_s(tmp_path):
    run = spiking(tmp_path, spike={"method": "wma", "pma_window": 4, "guard": 17})

    assert used(run.restores[0]) == [45, 50, 55, 60]
    assert_same_bits(run.watch.weights[FIRES], expected(run, [45, 50, 55, 60], method="wma"))


def test_tied_frozen_and_excluded_tensors_stay_what_they_are(tmp_path):
    class Model(Line):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
            self.more[1].weight = self.more[0].weight
            self.more[0].bias.requires_grad_(False)

        def loss(self, batch):
            return super().loss((batch[0] + 0.1 * self.more(batch[0]), batch[1]))

    run = spiking(tmp_path, module=Model, exclude=["net.2.*"])

    assert_same_bits(run.watch.weights[FIRES], expected(run, USED, exclude=["net.2.*", "more.0.bias"]))
    assert run.module.more[1].weight is run.module.more[0].weight


def test_the_restore_is_in_place_and_leaves_no_gradients(tmp_path):
    places = {}

    def note(module):
        places[module.trainer.global_step] = [t.data_ptr() for t in (*module.parameters(), *module.buffers())]

    run = spiking(tmp_path, callbacks=[Damage({FIRES - 1: note, FIRES: note})])

    assert places[FIRES] == places[FIRES - 1]
    assert not run.watch.gradients[FIRES]
    assert all(gradient.any() for gradient in run.watch.gradients[FIRES + 1][-1:])


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    ],
)
def test_after_a_reset_the_next_update_is_that_of_a_new_optimizer(tmp_path, optimizer, options):
    def build(**more):
        return Line(optimizer=optimizer, lr=0.01, **options, **more)

    # Half the rate in the first step: a power of two, so scaling the rate rounds nothing.
    run = spiking(tmp_path, module=build, spike={"rewarm_steps": 2, "optimizer": "reset"}, steps=FIRES + 1)

    twin = build()
    twin.load_state_dict(run.watch.weights[FIRES])
    new = optimizer(twin.parameters(), lr=0.005, **options)
    twin.loss(run.watch.batches[FIRES]).backward()
    new.step()
    assert run.restores
    assert_same_bits(run.watch.weights[FIRES + 1], dict(twin.state_dict()))


def test_the_optimizer_s_state_is_kept(tmp_path):
    before = spiking(tmp_path / "off", spike={"action": "off"}, steps=FIRES)
    run = spiking(tmp_path / "keep", steps=FIRES)

    assert run.restores
    assert_same_bits(run.watch.states[FIRES], before.watch.states[FIRES])


def test_the_optimizer_s_moments_are_scaled_on_demand(tmp_path):
    before = spiking(tmp_path / "off", spike={"action": "off"}, steps=FIRES)
    run = spiking(tmp_path / "scale", spike={"optimizer": "scale", "optimizer_scale": 0.5}, steps=FIRES)

    for scaled, state in zip(
        run.watch.states[FIRES][0].values(), before.watch.states[FIRES][0].values(), strict=True
    ):
        assert torch.equal(scaled["exp_avg"], state["exp_avg"] * 0.5)
        assert torch.equal(scaled["exp_avg_sq"], state["exp_avg_sq"] * 0.25)
        assert torch.equal(scaled["step"], state["step"])


@pytest.mark.parametrize("policy", ["keep", "scale"])
def test_moments_that_are_not_finite_are_reset_all_the_same(tmp_path, policy):
    run = spiking(tmp_path, Batches(broken=[SPIKE]), spike={"optimizer": policy})

    (event,) = run.restores
    assert event["trigger"] == "non-finite loss"
    for state in run.watch.states[event["restored_at"]][0].values():
        assert not any(tensor.any() for tensor in state.values())
    assert all(p.isfinite().all() for p in run.module.parameters())


@pytest.mark.parametrize("form", [lambda f: f, functools.partial], ids=["function", "partial"])
def test_a_function_resets_what_nobody_else_knows_how_to(tmp_path, form):
    handed = []
    kind = own_step(torch.optim.Adam)

    run = spiking(tmp_path, module=lambda: Line(optimizer=kind), spike={"optimizer": form(handed.append)})

    assert [type(optimizer) for optimizer in handed] == [kind]
    assert_same_bits(run.watch.weights[FIRES], expected(run, USED))


def test_an_optimizer_nobody_knows_how_to_reset_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"Own.*SpikeOptions\(optimizer=fn.*action='warn'"):
        spiking(tmp_path, module=lambda: Line(optimizer=own_step(torch.optim.Adam)), steps=3)


@pytest.mark.parametrize("action", ["warn", "off"])
def test_an_optimizer_nobody_knows_how_to_reset_is_left_alone(tmp_path, action):
    run = spiking(
        tmp_path, module=lambda: Line(optimizer=own_step(torch.optim.Adam)), spike={"action": action}
    )

    assert [event["event"] for event in run.events] == (["warn"] if action == "warn" else [])


def test_all_optimizers_are_reset_in_manual_optimization(tmp_path):
    options = {"every_n_steps": 2 * EVERY, "spike": {"guard": 20, "optimizer": "reset"}}
    run = spiking(tmp_path, module=TwoOptimizers, steps=2 * 100, **options)

    (event,) = run.restores
    assert event["onset"] == 2 * SPIKE
    assert_same_bits(run.watch.weights[2 * FIRES], expected(run, used(event)))
    adam, sgd = run.watch.states[2 * FIRES]
    assert not any(tensor.any() for state in adam.values() for tensor in state.values())
    assert not any(state["momentum_buffer"].any() for state in sgd.values())
    # Nobody but the module itself drops them here; it may count on their memory staying where it is.
    assert run.watch.gradients[2 * FIRES]
    assert not any(gradient.any() for gradient in run.watch.gradients[2 * FIRES])


# --- from what ----------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_streak_that_healed_is_never_restored(tmp_path):
    def slow():  # so that the streak ends with its batches
        return Line(lr=1e-3)

    data = Batches(bad=[74, 75, 76, *bursts(95)])
    run = spiking(tmp_path, data, 105, slow, spike={"pma_window": 4})

    (event,) = run.restores
    assert used(event) == [65, 70, 80, 85]


def test_weights_whose_loss_was_an_outlier_are_never_restored(tmp_path):
    def slow():
        return Line(lr=1e-3)

    # The loss of step 81 is that of the weights after step 80, whose own batch was fine.
    run = spiking(tmp_path, Batches(bad=[81, *bursts(100)]), 110, slow, spike={"pma_window": 4})

    assert used(run.restores[0]) == [70, 75, 85, 90]


def test_weights_whose_loss_was_an_outlier_are_never_restored_where_two_optimizers_step(tmp_path):
    def slow():
        return TwoOptimizers(lr=1e-3)

    data = Batches(bad=[81, *bursts(100)])
    options = {"every_n_steps": 2 * EVERY, "spike": {"guard": 20, "pma_window": 4}}
    run = spiking(tmp_path, data, 2 * 110, slow, **options)

    assert used(run.restores[0]) == [2 * step for step in (70, 75, 85, 90)]


def test_a_snapshot_that_is_not_finite_is_never_restored(tmp_path):
    healthy = {}

    class Spoiled(Line):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.trainer.global_step == 74:  # counted afterwards: this was step 75
                healthy["bias"] = self.net[2].bias.data.clone()
                self.net[2].bias.data.fill_(math.nan)

    mend = Damage({75: lambda module: module.net[2].bias.copy_(healthy["bias"])})
    run = spiking(tmp_path, Batches(bad=bursts(90)), module=Spoiled, callbacks=[mend])

    assert used(run.restores[0]) == [65, 70, 80]


def test_snapshots_of_the_warm_up_are_never_restored(tmp_path):
    def build():
        return Line(schedule=lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 50)))

    run = spiking(tmp_path, module=build, window=20, spike={"pma_window": 20})

    # Step 50 was the first at the full rate.
    assert used(run.restores[0]) == [50, 55, 60, 65, 70]


def test_a_restore_never_crosses_phases(tmp_path):
    def build():
        return Line(schedule=lambda o: LambdaLR(o, lambda step: 1.0 if step < 57 else 0.3))

    run = spiking(tmp_path, module=build, window=20, spike={"pma_window": 20})

    assert used(run.restores[0]) == [60, 65, 70]


def test_the_window_goes_on_from_the_snapshots_that_were_restored(tmp_path):
    run = spiking(tmp_path)

    # Neither those taken since, nor one of the restored weights, which are no point of the trajectory.
    assert [s["step"] for s in run.window] == [*range(40, 75, EVERY), 90, 95, 100]


def test_snapshots_of_a_streak_that_healed_are_never_merged(tmp_path):
    def slow():
        return Line(lr=1e-3)

    data = Batches(bad=[74, 75, 76])
    run = spiking(tmp_path, data, 90, slow, durable=True, emit_every=1, keep_last=None)

    assert not run.events
    assert [s["step"] for s in run.window if s["in_spike"]] == [75]
    merges = [json.loads(path.read_text()) for path in tmp_path.glob("step=*/merge.json")]
    # The one emitted at step 75, before anybody knew of its loss, stays; none was emitted while it was known.
    late = [[s["step"] for s in merge["snapshots"]] for merge in merges if merge["step"] > 75]
    assert late
    assert not any(75 in steps for steps in late)


def test_the_next_emission_after_a_restore_holds_nothing_of_the_spike(tmp_path):
    run = spiking(tmp_path, durable=True, emit_every=1, keep_last=None, steps=90)

    record = (tmp_path / "latest" / "merge.json").read_text()
    steps = [snapshot["step"] for snapshot in run.window]
    assert steps[-2:] == [70, 90]
    assert (tmp_path / "latest").resolve().name.startswith("step=00000090")
    merged = [weights for step, weights in run.watch.weights.items() if step in steps]
    for name, tensor in merge(merged).items():
        assert torch.equal(load_merge(tmp_path / "latest")[name], tensor), record


# --- when ---------------------------------------------------------------------------------------------------


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
