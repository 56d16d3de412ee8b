"""A spike on several ranks: seen by all at the same step, and all go on from the same weights."""

import os
from unittest.mock import patch

import pytest
import torch
from distributed_runs import run_jobs
from killed_ranks import PATIENCE, live
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_runs import merged_fit, on_rank
from spiking_runs import BURST, EVERY, FIRES, RULES, SPIKE, USED, Batches, Line, events, used
from torch.distributed.fsdp import fully_shard
from training_runs import assert_same_bits, seed

from merge_callback import SpikeOptions
from merge_callback.snapshots import live_merge

pytestmark = pytest.mark.timeout(600)

STEPS = FIRES + 2


class Spiking(Line):
    """Learns from batches that all ranks see alike, but for the broken ones of one rank.

    Args:
        bad: outliers.
        broken: batches of NaN.
        broken_rank: that sees them; ``None``: all do.
        spoilt_rank: whose moments hold a NaN when the run is restored.
        bad_rank: that sees the bad batches; ``None``: all do.
        wrecked: steps after which the weights are wrecked.
        dying_rank: that dies when a batch is tried again.
    """

    def __init__(
        self,
        bad=(),
        broken=(),
        broken_rank=None,
        spoilt_rank=None,
        bad_rank=None,
        wrecked=(),
        dying_rank=None,
    ):
        seed()
        super().__init__()
        self.batches = {"bad": list(bad), "broken": list(broken)}
        if broken_rank is not None and not on_rank(broken_rank):
            self.batches["broken"] = []
        if bad_rank is not None and not on_rank(bad_rank):
            self.batches["bad"] = []
        self.spoilt_rank, self.steps = spoilt_rank, 0
        self.wrecked, self.dying_rank = wrecked, dying_rank

    def training_step(self, batch, batch_idx):
        if self.dying_rank is not None and not torch.is_grad_enabled() and on_rank(self.dying_rank):
            os._exit(9)
        return super().training_step(batch, batch_idx)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net[0])
            fully_shard(self.net)

    def train_dataloader(self):
        return Batches(**self.batches)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.steps += 1
        if self.steps in self.wrecked:
            with torch.no_grad():
                self.net[2].bias += 30
        if self.steps == FIRES and self.spoilt_rank is not None and on_rank(self.spoilt_rank):
            moment = next(iter(optimizer.optimizer.state.values()))["exp_avg"]
            (moment.to_local() if hasattr(moment, "to_local") else moment).fill_(torch.nan)


class States(Callback):
    """The whole state of the optimizer after a step."""

    def __init__(self, step):
        self.step, self.seen = step, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            (optimizer,) = trainer.optimizers
            self.seen = [{k: whole(v) for k, v in state.items()} for state in optimizer.state.values()]


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def failing(times):
    """A context in which so many restores on the second rank run out of memory half way."""
    real, left = live_merge.merge_into, [times]

    def fails(factors, arenas, tensors, *args):
        if left[0] == 0:
            return real(factors, arenas, tensors, *args)
        left[0] -= 1
        next(iter(tensors.values())).zero_()
        raise MemoryError("on purpose")

    return patch.object(live_merge, "merge_into", fails if on_rank(1) else real)


def spiking(strategy, folder, spike=None, data=None, steps=STEPS, fails=0, **options):
    """A fit that spikes; its outcome with the optimizer's ``states`` right after the restore."""
    with failing(fails):
        return spiking_fit(strategy, folder, spike, data, steps, **options)


def spiking_fit(strategy, folder, spike, data, steps, **options):
    states = States(FIRES)
    given = {
        "every_n_steps": EVERY,
        "window": 10,
        "durable": False,
        "emit_every": 0,
        "evaluate": False,
        "count_tokens": None,
        **options,
    }
    outcome = merged_fit(
        strategy,
        folder,
        states,
        module=Spiking(**(data or {"bad": BURST})),
        raises=True,
        trainer={"max_steps": steps, "every": FIRES, "val_check_interval": None},
        spike=SpikeOptions(**{**RULES, "cooldown": 1000, **(spike or {})}),
        **given,
    )
    outcome.states = states.seen
    return outcome


NAN = {"broken": [FIRES - 1]}
EARLY = {"spike": {"no_snapshot": "stop"}, "data": {"broken": [5]}, "steps": 20}
CASES = {
    "outliers": {},
    "NaN": {"data": NAN},
    "gradient norm": {"spike": {"grad_norm": True}, "steps": 40},
    "reset": {"spike": {"optimizer": "reset"}},
    "scale": {"spike": {"optimizer": "scale"}},
    "nothing to restore": EARLY,
}
ON_ONE_RANK = {
    "NaN on one rank": {"data": {**NAN, "broken_rank": 1}},
    "NaN on the first rank": {"data": {**NAN, "broken_rank": 0}},
    "spoilt moments on one rank": {"data": {"bad": BURST, "spoilt_rank": 1}},
    "nothing to restore, on one rank": {**EARLY, "data": {"broken": [5], "broken_rank": 1}},
}
FAILS = {"the restore fails once": {"fails": 1}, "the restore fails twice": {"fails": 2}}
EVIDENCE = {"spike": {"evidence": "batch"}}
TRIED = {
    "hard data": {**EVIDENCE, "data": {"bad": BURST}},
    "wrecked weights": {**EVIDENCE, "data": {"wrecked": [SPIKE - 1]}},
}
HARD_ON_ONE = {"hard data on one rank": {**EVIDENCE, "data": {"bad": BURST, "bad_rank": 1}}}
ALL = {**CASES, **ON_ONE_RANK, **FAILS, **TRIED, **HARD_ON_ONE}


def under(case, default, slow):
    """A case under a strategy of the default run, and under one of the slow tests."""
    return [(default, case), pytest.param(slow, case, marks=pytest.mark.slow)]


RESTORED = [
    # The default run has it as the restore that fails once.
    *(pytest.param(strategy, "outliers", marks=pytest.mark.slow) for strategy in ("fsdp2", "ddp")),
    *under("reset", "ddp", "fsdp2"),
    *(pytest.param(strategy, "scale", marks=pytest.mark.slow) for strategy in ("fsdp2", "ddp")),
]
NAN_ON_ONE = [
    pytest.param("ddp", "NaN on the first rank", marks=pytest.mark.slow),
    ("fsdp2", "NaN on one rank"),
]
SPOILT = under("spoilt moments on one rank", "fsdp2", "ddp")
STOPPED = under("nothing to restore, on one rank", "ddp", "fsdp2")
NORMS = under("gradient norm", "fsdp2", "ddp")
RETRIED = under("the restore fails once", "fsdp2", "ddp")
HALF = under("the restore fails twice", "ddp", "fsdp2")
TRIALS = [*under("hard data", "fsdp2", "ddp"), *under("wrecked weights", "ddp", "fsdp2")]
ON_ONE = under("hard data on one rank", "ddp", "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder, request):
    tests = [item.callspec.params for item in request.session.items if item.path == request.path]
    jobs = {
        (strategy, name): (
            spiking,
            {"strategy": strategy, "folder": str(folder / f"{strategy} {name}"), **ALL[name]},
        )
        for strategy, name in {(test["strategy"], test["case"]): None for test in tests if "case" in test}
    }
    return run_jobs(2, jobs, timeout=400)


@pytest.fixture(scope="module")
def alone(folder):
    return {
        name: spiking("alone", folder / f"alone {name}", **case) for name, case in {**CASES, **TRIED}.items()
    }


UNLIKE = ("time", "seconds", "snapshots", "batches")


def story(folder):
    """The events without times and places; of the snapshots the steps and weights."""
    return [
        {k: v for k, v in event.items() if k not in UNLIKE}
        | {"used": [(s["step"], s["weight"]) for s in event.get("snapshots", ())]}
        for event in events(folder / "merges")
    ]


def assert_goes_on_alike(ranks, expected):
    """Weights at the restore and to the end, and the moments right after it, are those of one process."""
    for rank in ranks:
        assert rank.run.weights.keys() == expected.run.weights.keys()
        for step in expected.run.weights:
            assert_same_bits(rank.run.weights[step], expected.run.weights[step])
        assert_same_bits(rank.states, expected.states)
        assert rank.windows == expected.windows
        assert rank.differ == []
        assert rank.replaced == []


@pytest.mark.parametrize(("strategy", "case"), RESTORED)
def test_several_ranks_are_restored_bitwise_like_one_process(runs, alone, folder, strategy, case):
    told = story(folder / f"alone {case}")
    (event,) = [e for e in events(folder / f"alone {case}" / "merges") if e["event"] == "restore"]
    assert event["restored_at"] == FIRES
    assert used(event)[-1] == USED[-1]
    assert story(folder / f"{strategy} {case}") == told
    assert_goes_on_alike(runs[strategy, case], alone[case])


@pytest.mark.parametrize(("strategy", "case"), NAN_ON_ONE)
def test_a_loss_that_is_nan_on_one_rank_restores_all(runs, alone, folder, strategy, case):
    assert story(folder / f"{strategy} {case}") == story(folder / "alone NaN")
    expected = alone["NaN"].run.weights
    for rank in runs[strategy, case]:
        # The mean of the gradients is NaN on all ranks; the buffers of the sound one went on.
        for step in (FIRES, STEPS):
            assert_same_bits(rank.run.weights[step], expected[step])
        assert_same_bits(rank.states, alone["NaN"].states)
        assert rank.differ == []


@pytest.mark.parametrize(("strategy", "case"), SPOILT)
def test_moments_that_are_spoilt_on_one_rank_are_reset_on_all(runs, alone, folder, strategy, case):
    (event,) = [e for e in events(folder / f"{strategy} {case}" / "merges") if e["event"] == "restore"]
    assert event["restored_at"] == FIRES
    for rank in runs[strategy, case]:
        assert all(not value.any() for state in rank.states for value in state.values())
        assert_same_bits(rank.run.final, alone["reset"].run.final)


@pytest.mark.parametrize(("strategy", "case"), STOPPED)
def test_a_run_without_a_snapshot_stops_on_all_ranks(runs, alone, folder, strategy, case):
    for rank in [*runs[strategy, case], alone["nothing to restore"]]:
        assert rank.error.startswith("TrainingDivergedError")
        assert "nothing to restore" in rank.error
        # Less than the time that a rank waits for another one's numbers.
        assert rank.seconds < 25
    (event,) = events(folder / f"{strategy} {case}" / "merges")
    assert event["event"] == "stop"


@pytest.mark.parametrize(("strategy", "case"), RETRIED)
def test_a_restore_that_fails_on_one_rank_is_made_once_more_on_all(runs, alone, folder, strategy, case):
    assert story(folder / f"{strategy} {case}") == story(folder / "alone outliers")
    assert_goes_on_alike(runs[strategy, case], alone["outliers"])


@pytest.mark.parametrize(("strategy", "case"), HALF)
def test_a_restore_that_fails_half_way_ends_the_run_on_all_ranks(runs, folder, strategy, case):
    for rank in runs[strategy, case]:
        assert rank.error.startswith("HalfRestoredError")
        assert "on purpose" in rank.error
        assert rank.seconds < 25
    (event,) = events(folder / f"{strategy} {case}" / "merges")
    assert event["event"] == "stop"


@pytest.mark.parametrize(("strategy", "case"), TRIALS)
def test_several_ranks_try_a_batch_and_decide_like_one_process(runs, alone, folder, strategy, case):
    told, expected = events(folder / f"{strategy} {case}" / "merges"), alone[case]
    (event,) = told
    (reference,) = events(folder / f"alone {case}" / "merges")
    assert event["event"] == reference["event"] == ("hard data" if case == "hard data" else "restore")
    for name, value in reference["evidence"].items():
        if isinstance(value, float):  # the mean over two ranks of the same batch, summed in another order
            assert event["evidence"][name] == pytest.approx(value, rel=1e-5)
    for rank in runs[strategy, case]:
        for step in expected.run.weights:
            assert_same_bits(rank.run.weights[step], expected.run.weights[step])
        assert rank.differ == []
        assert rank.replaced == []


@pytest.mark.parametrize(("strategy", "case"), ON_ONE)
def test_data_that_are_hard_on_one_rank_restore_nobody_and_the_record_says_which_rank(
    runs, folder, strategy, case
):
    (event,) = events(folder / f"{strategy} {case}" / "merges")
    assert event["event"] == "hard data"
    for batch in event["batches"]:
        sound, hard = batch["rank_losses"]
        assert hard > 10 * sound
    for rank in runs[strategy, case]:
        assert rank.differ == []


def dying(strategy, folder, dies=None):
    """A run of which a rank dies in the middle of a trial."""
    data = {"wrecked": [SPIKE - 1], "dying_rank": 1}
    return spiking(strategy, folder, spike={"evidence": "batch"}, data=data)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_rank_that_dies_in_the_middle_of_a_trial_leaves_nobody_hanging(tmp_path, strategy):
    case = {"run": dying, "strategy": strategy, "folder": str(tmp_path), "dies": None}
    (outcome,) = live({strategy: case}).values()
    (codes,), (seconds,) = outcome["ends"], outcome["seconds"]
    assert codes[1] == 9
    assert codes[0] is not None  # it ended by itself, with the error of a lost connection
    assert seconds < PATIENCE


@pytest.mark.parametrize(("strategy", "case"), NORMS)
def test_gradients_are_as_large_as_in_one_process(runs, alone, strategy, case):
    expected = norms(alone[case].state)
    for rank in runs[strategy, case]:
        found = norms(rank.state)
        # The squares are summed up part by part.
        torch.testing.assert_close(
            torch.tensor(numbers(found)), torch.tensor(numbers(expected)), rtol=1e-5, atol=0
        )


def norms(state):
    detectors = state["spikes"]["numbers"]["detectors"]
    (found,) = [detector for watched, _, detector, _ in detectors if watched == "gradient norm"]
    return found


def numbers(state):
    """All floats in nested primitives."""
    if isinstance(state, dict):
        return [n for value in state.values() for n in numbers(value)]
    if isinstance(state, (list, tuple)):
        return [n for value in state for n in numbers(value)]
    return [state] if isinstance(state, float) else []
