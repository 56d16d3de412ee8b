"""Runs that are stopped or killed around a spike, and resumed from Lightning's checkpoints."""

import signal
from functools import partial

import killed_run
import pytest
import resumed_runs
import spiking_runs
from run_outcomes import outcome
from spiking_runs import EVERY, REWARM, STEPS, TROUBLE, USED, Batches, events, fit, story, used

from merge_callback import SpikeOptions

pytestmark = pytest.mark.filterwarnings("ignore:merge:")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run leaves behind that was never stopped, by its storage."""
    known = {}

    def outcome_of(storage="disk"):
        if storage not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            _, module, _ = fit(folder, storage=storage)
            known[storage] = remains(folder, module)
        return known[storage]

    return outcome_of


stopped = partial(resumed_runs.stopped, fit=fit)


def remains(folder, module):
    """All that a run leaves behind, as primitives."""
    return {**outcome(folder, module), "story": story(folder / "merges")}


def assert_same(found, expected):
    """Two runs ended with the same weights, window, merges, curves and events."""
    for what in ("weights", "latest", "emissions", "metrics", "story"):
        assert found[what] == expected[what], what
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    for record in found["window"]["snapshots"]:
        assert found["window"]["files"][record["file"]] == record["checksum"]


def test_the_unbroken_run_meets_all_there_is_to_meet(unbroken):
    restores = [(e["onset"], e["restored_at"], used(e), e["in_a_row"]) for e in unbroken()["story"]]
    # One streak that heals, then a spike, a second one in the cooldown of the first, and a NaN.
    assert restores == [
        (80, 85, USED, 1),
        (100, 105, [45, 50, 55], 2),
        (118, 119, [45, 50, 55], 3),
    ]
    assert unbroken()["story"] == unbroken("cpu")["story"]
    assert unbroken()["weights"] == unbroken("cpu")["weights"]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(40, id="before there is a threshold"),
        pytest.param(72, id="with a first outlier that is not read yet"),
        pytest.param(74, id="in a streak that heals", marks=pytest.mark.slow),
        pytest.param(82, id="in a streak", marks=pytest.mark.slow),
        pytest.param(84, id="with the last outlier of a spike not read yet"),
        pytest.param(85, id="at a restore"),
        pytest.param(86, id="right after a restore", marks=pytest.mark.slow),
        pytest.param(85 + REWARM // 2, id="in a re-warm-up", marks=pytest.mark.slow),
        pytest.param(85 + REWARM, id="at the end of a re-warm-up"),
        pytest.param(103, id="in the second streak of a cooldown", marks=pytest.mark.slow),
        pytest.param(105, id="at the second restore"),
        pytest.param(118, id="with a NaN that is not read yet"),
        pytest.param(119, id="at the third restore", marks=pytest.mark.slow),
        pytest.param(STEPS - 1, id="at a lower learning rate"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, unbroken, batch):
    checkpoint = stopped(tmp_path, batch)

    _, module, _ = fit(tmp_path, checkpoint)

    assert_same(remains(tmp_path, module), unbroken())


@pytest.mark.parametrize("batch", [82, 85, *(pytest.param(k, marks=pytest.mark.slow) for k in (90, 103))])
def test_a_stopped_run_with_its_window_in_memory_resumes_bit_for_bit(tmp_path, unbroken, batch):
    checkpoint = stopped(tmp_path, batch, storage="cpu")

    _, module, _ = fit(tmp_path, checkpoint, storage="cpu")

    assert_same(remains(tmp_path, module), unbroken("cpu"))


@pytest.mark.parametrize("accumulate", [3])
def test_a_run_stopped_while_it_accumulates_tells_the_same_story(tmp_path, accumulate):
    bad = range(accumulate * 79 + 1, accumulate * 84 + 1)
    options = {"trainer": {"accumulate_grad_batches": accumulate}, "steps": 90}
    fit(tmp_path / "unbroken", data=Batches(bad=bad), **options)
    batch = accumulate * 81 + 2
    checkpoint = stopped(tmp_path / "stopped", batch, data=Batches(bad=bad), **options)

    fit(tmp_path / "stopped", checkpoint, data=Batches(bad=bad), **options)

    # Lightning loses the gradients accumulated before the checkpoint; we lose none of their losses.
    (found,), (expected,) = events(tmp_path / "stopped/merges"), events(tmp_path / "unbroken/merges")
    assert (found["onset"], found["restored_at"], used(found)) == (80, 85, USED)
    assert found["values"][:2] == expected["values"][:2]
    assert len(found["values"]) == len(expected["values"]) == 5


def test_snapshots_that_a_checkpoint_needs_outlive_the_restore_that_drops_them(tmp_path, unbroken):
    early = stopped(tmp_path, 84, stop=92)  # its window holds the snapshots of steps 75 and 80
    kept = {int(path.name[5:13]) for path in (tmp_path / "merges/window").glob("step=*")}
    assert {75, 80} < kept

    _, module, _ = fit(tmp_path, early)

    assert_same(remains(tmp_path, module), unbroken())


def test_a_run_resumed_with_other_options_goes_by_those(tmp_path):
    checkpoint = stopped(tmp_path, 82)

    fit(tmp_path, checkpoint, spike=SpikeOptions(action="warn"), steps=90)

    assert [(event["event"], event["onset"]) for event in events(tmp_path / "merges")] == [("warn", 80)]


def test_a_run_that_was_not_watched_is_watched_from_its_resume_on(tmp_path):
    checkpoint = stopped(tmp_path, 20, spike=SpikeOptions(action="off"))

    fit(tmp_path, checkpoint, steps=110, data=Batches(bad=range(100, 105)))

    (event,) = events(tmp_path / "merges")
    assert (event["onset"], event["restored_at"]) == (100, 105)
    assert used(event) == [80, 85, 90]


def test_two_fits_in_a_row_tell_the_story_of_one(tmp_path):
    data = Batches(**TROUBLE)
    trainer, module, _ = fit(tmp_path / "twice", data=data, steps=90)
    (scheduler,) = trainer.lr_scheduler_configs  # the re-warm-up is not over, yet the rate is the schedule's
    assert trainer.optimizers[0].param_groups[0]["lr"] == scheduler.scheduler.get_last_lr()[0]
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(module, data)

    fit(tmp_path / "once")
    assert story(tmp_path / "twice/merges")[0] == story(tmp_path / "once/merges")[0]
    restored = [(e["onset"], e["restored_at"]) for e in events(tmp_path / "twice/merges")]
    assert restored[1:] == [(e["onset"], e["restored_at"]) for e in events(tmp_path / "once/merges")[1:]]


# --- killed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    """Lives through a run whose processes are killed; see `killed_run.live`."""
    with killed_run.killable_runs(spiking_runs.attempt) as ask:
        yield ask


@pytest.fixture(scope="module")
def survivor(tmp_path_factory, live):
    """The outcome of a run like the killed ones that nobody killed."""
    return live(tmp_path_factory.mktemp("survivor"))["outcome"]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(["restore", "call"], id="before the restore"),
        pytest.param(["_set_back", "return"], id="before the weights change"),
        pytest.param(["overwrite", "return"], id="while the weights change"),
        pytest.param(["merge_into", "return"], id="before the window changes"),
        pytest.param(["drop_newer", "return"], id="before the record"),
        pytest.param(["announce", "call"], id="after the record"),
    ],
)
def test_a_run_killed_during_a_restore_restores_again(tmp_path, live, survivor, moment):
    result = live(tmp_path, [{"dies": moment}])

    assert result["ends"] == [-signal.SIGKILL, 0], result["outcome"].get("log")
    assert not result["damage"]
    assert not result["outcome"]["left over"]
    # An event may be told twice, once by each process; `story` tells it once.
    for what in ("weights", "story", "latest", "emissions"):
        assert result["outcome"][what] == survivor[what], what
    assert result["outcome"]["window"]["snapshots"] == survivor["window"]["snapshots"]


def test_a_snapshot_that_was_cut_off_is_left_out_of_a_restore(tmp_path, live):
    result = live(tmp_path, last={"cut": True})

    assert result["ends"] == [0], "reading past the end of a mapped file kills the process"
    assert used(result["outcome"]["story"][0]) == [55, USED[0], USED[2]]
    assert USED[1] == USED[0] + EVERY
