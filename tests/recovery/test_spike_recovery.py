"""Runs that spike: what is restored, and how training goes on."""

import functools
import itertools

import pytest
import torch
from lightning.pytorch import Callback
from spiking_runs import (
    EVERY,
    FIRES,
    SPIKE,
    USED,
    Batches,
    Damage,
    Line,
    TwoOptimizers,
    expected,
    spiking,
    used,
)
from training_runs import assert_same_bits

from merge_callback import merge_state_dicts as merge
from merge_callback.snapshots import live_merge
from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.live_merge import HalfRestoredError

pytestmark = pytest.mark.filterwarnings("ignore:merge:")


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
