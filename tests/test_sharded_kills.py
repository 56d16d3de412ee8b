"""One of two ranks is killed: nothing is left half written, the other ends, and the run can be resumed."""

import itertools

import pytest
from killed_ranks import PATIENCE, live
from sharded_runs import left_over, published, snapshots
from training_runs import assert_same_bits

pytestmark = pytest.mark.timeout(600)

AT = 3
"""The snapshot, or the emission before it, that the kill hits: that of step 6."""

POINTS = {
    "before its file is written": ("write_shard", "call", AT),
    "after its file is written": ("write_shard", "return", AT),
    "before the list": ("list_shards", "call", AT),
    "after the list": ("list_shards", "return", AT),
    "before the manifest": ("_commit", "call", AT),
    "after the manifest": ("_commit", "return", AT),
    "while it is measured": ("measure", "call", AT),
    "before it sends to an emission": ("gather", "call", 2),
    "in the midst of sending": ("gather", "call", 12),
}
OF_THE_FIRST = {
    "before a file of the emission": ("_write_weights", "call", 2),
    "before an emission appears": ("_place", "call", 2),
    "after an emission has appeared": ("_place", "return", 2),
}
DEFAULT = [
    ("ddp", 1, "after its file is written"),
    ("ddp", 0, "before the list"),
    ("fsdp2", 1, "before the list"),
    ("ddp", 0, "before the manifest"),
    ("ddp", 1, "in the midst of sending"),
    ("fsdp2", 0, "before an emission appears"),
]
ALL = [
    *itertools.product(("ddp", "fsdp2"), (0, 1), POINTS),
    *itertools.product(("ddp", "fsdp2"), (0,), OF_THE_FIRST),
]
REST = [case for case in ALL if case not in DEFAULT]


def cases(folder, chosen):
    found = {
        (strategy, rank, point): {
            "strategy": strategy,
            "folder": str(folder / f"{strategy}-{rank}-{point}"),
            "dies": dict(
                zip(("function", "moment", "nth"), {**POINTS, **OF_THE_FIRST}[point], strict=True), rank=rank
            ),
        }
        for strategy, rank, point in chosen
    }
    for strategy in ("ddp", "fsdp2"):
        found[strategy] = {"strategy": strategy, "folder": str(folder / strategy), "dies": None}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lives(folder):
    return live(cases(folder, DEFAULT))


@pytest.fixture(scope="module")
def all_lives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    return folder, live(cases(folder, REST), timeout=1500)


def assert_survives(folder, lives, case):
    strategy, rank, point = case
    found, unbroken = lives[case], lives[strategy]
    killed, resumed = found["ends"]
    assert killed[rank] == -9
    assert killed[1 - rank] == 1, "the other rank did not end by itself"
    assert found["seconds"][0] < PATIENCE
    assert resumed == [0, 0], found["logs"]
    assert found["torn"] == []
    place, expected = folder / f"{strategy}-{rank}-{point}", unbroken["results"][0]
    for result in found["results"]:
        assert_same_bits(result.run.final, expected.run.final)
        for step, window in result.windows.items():
            assert window == expected.windows[step]
        assert not [line for line in result.told if "left out" in line]
    weights = {name: tensor for name, tensor in expected.run.final.items() if name != "head.weight"}
    assert_same_bits(snapshots(place, weights), snapshots(folder / strategy, weights))
    assert published(place) == published(folder / strategy)
    assert left_over(place) == []


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_a_run_whose_rank_was_killed_is_resumed_as_if_it_had_not_been(lives, folder, case):
    assert_survives(folder, lives, case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", REST, ids=str)
def test_a_rank_may_be_killed_at_any_point(all_lives, case):
    assert_survives(*all_lives, case)
