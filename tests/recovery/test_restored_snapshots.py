"""Runs that spike: from which snapshots they are restored, and which ones are merged after it."""

import json
import math

import pytest
import torch
from spiking_runs import EVERY, Batches, Damage, Line, TwoOptimizers, bursts, spiking, used
from torch.optim.lr_scheduler import LambdaLR

from merge_callback import load_merge
from merge_callback import merge_state_dicts as merge

pytestmark = pytest.mark.filterwarnings("ignore:merge:")


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
    # Its record may be written before the mark or after it, so it has none.
    assert not any("in_spike" in s for merge in merges for s in merge["snapshots"])
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
