"""Candidates on several ranks: they are compared, chosen and published as in one process."""

import json

import pytest
from distributed_runs import run_jobs
from sharded_runs import merged_fit
from training_runs import assert_same_bits, emissions

from merge_callback import load_merge
from merge_callback.merging import Ema, Wsm

STRATEGIES = ["ddp", "fsdp2"]
OPTIONS = {
    "spike": "off",
    "candidates": {"wsm-back": Wsm(order="reversed"), "ema-2": Ema(last=2), "ties": "ties"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("candidates")


@pytest.fixture(scope="module")
def alone(folder):
    return merged_fit("alone", folder / "alone", **OPTIONS)


@pytest.fixture(scope="module")
def ranks(folder):
    jobs = {name: (merged_fit, {"strategy": name, "folder": folder / name, **OPTIONS}) for name in STRATEGIES}
    return run_jobs(2, jobs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_choose_and_publish_what_one_process_does(folder, alone, ranks, strategy):
    for rank in ranks[strategy]:
        assert rank.told == []
        assert_same_bits(rank.run.final, alone.run.final)
    curves = {name: value for name, value in alone.metrics.items() if "merged/" in name}
    assert len({name.split()[1] for name in curves}) == 5
    first = ranks[strategy][0].metrics
    assert {name: first[name] for name in curves} == pytest.approx(curves, rel=1e-6)
    expected, found = emissions(folder / "alone" / "merges"), emissions(folder / strategy / "merges")
    assert [path.name for path in found] == [path.name for path in expected]
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(load_merge(one), load_merge(other))
    assert [*map(selected, found)] == [*map(selected, expected)]
    assert len([*filter(None, map(selected, found))]) == 3


def selected(path):
    """The candidate that was published; ``None`` if none was compared."""
    return json.loads((path / "merge.json").read_text()).get("candidates", {}).get("selected")
