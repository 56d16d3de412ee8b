"""One of two ranks is killed: nothing is left half written, the other ends, and the run can be resumed."""

import itertools
import re

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
    "in the midst of sending": ("_flat", "call", 12),
}
OF_THE_FIRST = {
    "before a file of the emission": ("write_safetensors", "call", 2),
    "before an emission appears": ("_place", "call", 2),
    "after an emission has appeared": ("_place", "return", 2),
}
OF_DIFFERENCES = {
    "before a difference is made": ("encoded", "call", 2),
    "before a snapshot is made whole": ("_make_whole", "call", 1),
    "after its whole file is written": ("write_shard", "return", 4),
    "after a snapshot is made whole": ("_make_whole", "return", 1),
}
"""Of runs that keep two snapshots, as differences: that of step 6 is the first to evict another."""

CODEC = {"snapshot_codec": "delta-fp16", "window": 2}

DEFAULT = [("fsdp2", 0, "before the list")]
ALL = [
    *itertools.product(("ddp", "fsdp2"), (0, 1), POINTS),
    *itertools.product(("ddp", "fsdp2"), (0,), OF_THE_FIRST),
    *itertools.product(("ddp", "fsdp2"), (0, 1), OF_DIFFERENCES),
]
REST = [case for case in ALL if case not in DEFAULT]


def unbroken_twin(strategy, point):
    """The name of the run like it that nobody kills."""
    return f"{strategy} of differences" if point in OF_DIFFERENCES else strategy


def cases(folder, chosen):
    found, points = {}, {**POINTS, **OF_THE_FIRST, **OF_DIFFERENCES}
    for strategy, rank, point in chosen:
        options, twin = CODEC if point in OF_DIFFERENCES else {}, unbroken_twin(strategy, point)
        found[strategy, rank, point] = {
            "strategy": strategy,
            "folder": str(folder / f"{strategy}-{rank}-{point}"),
            "dies": dict(zip(("function", "moment", "nth"), points[point], strict=True), rank=rank),
            **options,
        }
        found[twin] = {"strategy": strategy, "folder": str(folder / twin), "dies": None, **options}
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
    found, unbroken = lives[case], lives[unbroken_twin(strategy, point)]
    killed, resumed = found["ends"]
    assert killed[rank] == -9
    assert killed[1 - rank] == 1, "the other rank did not end by itself"
    assert found["seconds"][0] < PATIENCE
    assert resumed == [0, 0], found["logs"]
    assert found["torn"] == []
    place, expected = folder / f"{strategy}-{rank}-{point}", unbroken["results"][0]
    twin = folder / unbroken_twin(strategy, point)
    for result in found["results"]:
        assert_same_bits(result.run.final, expected.run.final)
        for step, window in result.windows.items():
            assert window == expected.windows[step]
        assert not [line for line in result.told if "left out" in line]
    weights = {name: tensor for name, tensor in expected.run.final.items() if name != "head.weight"}
    assert_same_bits(snapshots(place, weights), snapshots(twin, weights))
    assert published(place) == published(twin)
    assert [steps_of(name) for name in left_over(place)] == [steps_of(name) for name in left_over(twin)]


def steps_of(name):
    """A snapshot's name without that of its session."""
    return re.sub("-[0-9a-f]{12}", "", name)


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_a_run_whose_rank_was_killed_is_resumed_as_if_it_had_not_been(lives, folder, case):
    assert_survives(folder, lives, case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", REST, ids=str)
def test_a_rank_may_be_killed_at_any_point(all_lives, case):
    assert_survives(*all_lives, case)
