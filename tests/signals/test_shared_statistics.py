"""Two real ranks read the same statistics of every step, those of one process that sees all their batches."""

import json
import math

import pytest
import shared_statistics
from distributed_runs import run_ranks
from shared_statistics import BAD, SCENARIOS, STEPS

from merge_callback.sharding import Ranks

ALONE = Ranks()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of the two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = json.dumps(shared_statistics.state_at(ALONE))
    return run_ranks(2, shared_statistics.all_of_them, folder=folder, alone=alone)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    found = {scenario.__name__: scenario(ALONE) for scenario in SCENARIOS}
    found["unbroken"] = shared_statistics.resumed(ALONE, save=False)
    return {**found, "fits": shared_statistics.fits(ALONE, tmp_path_factory.mktemp("alone"))}


@pytest.mark.parametrize("name", [s.__name__ for s in SCENARIOS if s.__name__ != "late"])
def test_all_ranks_find_the_same(both, name):
    assert repr(both[0][name]) == repr(both[1][name])


def close(found, expected):
    """The same but for the order in which fp64 numbers (fp32 ones, for gradients) were summed up."""
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-6, nan_ok=True)
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize(
    "name",
    [
        "uneven",
        "one_is_nan",
        "one_is_infinite",
        "tensor_parallel",
        "uncountable",
        "by_steps",
        "by_tokens",
        "gradients",
        "scaled",
        "restored",
        "resumed",
        "one_saves",
    ],
)
def test_the_ranks_find_what_one_process_does(both, alone, name):
    assert close(both[0][name], alone[name])


def test_the_loss_is_the_mean_of_all_micro_batches_not_of_the_means(both):
    seen = both[0]["uneven"]["seen"]
    for step, loss, *_ in seen:
        batches = shared_statistics.micro_batches(ALONE, step, [8])
        losses = [float(loss) for loss, _ in batches if loss is not None]
        assert loss == (pytest.approx(sum(losses) / len(losses), rel=1e-12) if losses else None)
    assert [step for step, *_ in seen] == [*range(1, STEPS)]


@pytest.mark.parametrize("name", ["one_is_nan", "tensor_parallel_nan"])
def test_a_nan_on_one_rank_is_every_ranks_at_the_same_step(both, name):
    for found in both:
        assert [step for step, loss, *_ in found[name]["seen"] if loss and math.isnan(loss)] == [BAD]


def test_the_tokens_of_uneven_batches_are_exact(both):
    batches = [b for step in range(1, STEPS + 1) for b in shared_statistics.micro_batches(ALONE, step, [8])]
    assert both[0]["uneven"]["tokens"] == sum(tokens for _, tokens in batches)


def test_a_step_beyond_twice_the_largest_is_noticed_one_step_late(both, alone):
    first = alone["sudden"]["due"][0][0]
    assert first == BAD
    assert both[0]["sudden"]["due"][0][0] == BAD + 1
    seen = {step: tokens for step, *_, tokens in alone["sudden"]["seen"]}
    assert both[0]["sudden"]["due"][0][1] == sum(seen[step] for step in range(1, BAD + 2))  # and is exact


def test_no_rank_waits_for_a_step_before_the_next_one_is_sent_but_near_the_interval(both):
    events = both[0]["waits"]["events"]
    hurried = [n for i, (event, n) in enumerate(events) if event == "read" and events[i - 1] == ["begun", n]]
    due = [step for step, _ in both[0]["waits"]["due"]]
    assert len(due) >= 2
    assert set(due) <= set(hurried)
    assert len(hurried) <= 3 * len(due) + 3  # the first, those of up to two steps before, and the last
    assert [n for event, n in events if event == "read"] == [*range(1, STEPS + 1)]


def test_resuming_changes_no_bit(both):
    for found in both:
        assert repr(found["resumed"]) == repr(found["unbroken"])


def test_a_state_of_two_ranks_loads_on_one_and_that_of_one_on_two(both, alone):
    expected = alone["unbroken"][BAD - 1 :]
    assert close(shared_statistics.resumed(ALONE, both[0]["state_at"]), expected)
    assert close(both[0]["from_one"], expected)
    assert repr(both[0]["from_one"]) == repr(both[1]["from_one"])


def test_a_checkpoint_does_not_wait_for_ever_and_the_run_goes_on(both):
    [first, second] = (found["late"] for found in both)
    assert first[2][1:] == [None, True]
    assert [*first[:2], first[2][0], first[3]] == second
    assert [loss for _, loss, *_ in second[1:]] == [1.0, 2.0, 3.0]


# --- real fits --------------------------------------------------------------------------------------------


def test_a_step_sends_one_sum_of_less_than_64_bytes_and_nothing_else(both):
    for found in both:
        own = [*zip(found["fits"]["sent"], found["fits"]["sent_without"], strict=True)]
        assert len(own) == 20
        for merging, without in own[1:]:  # before the first one it is settled whether batches can be counted
            assert merging == [*without, ["all_reduce", 56]]


def test_a_fit_takes_its_snapshots_where_one_process_would(both, alone):
    for found in both:
        for name in ("quiet", "by_tokens", "accumulated"):
            assert found["fits"][name]["records"] == alone["fits"][name]["records"]
            assert found["fits"][name]["tokens"] == alone["fits"][name]["tokens"]
    assert len(alone["fits"]["by_tokens"]["records"]) > 5


def test_where_one_rank_cannot_count_tokens_none_does(both, alone):
    for found in (*both, alone):
        assert found["fits"]["stopped"]["records"] == [[8, None], [16, None]]


def test_where_one_rank_cannot_count_tokens_an_interval_in_tokens_is_refused_by_all(both, alone):
    assert both[0]["fits"]["refused"] == ["RemoteError", "on rank 1: ValueError: no tokens here"]
    assert both[1]["fits"]["refused"] == alone["fits"]["refused"] == ["ValueError", "no tokens here"]
