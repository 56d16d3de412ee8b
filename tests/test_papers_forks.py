"""The papers' claims about forks: what a stage or a restart begins with, and how its figures are counted."""

import numpy as np
import pytest

from benchmarks.papers import recovery, stages
from benchmarks.papers.init import roughness, spikes
from benchmarks.papers.paired import difference, extent, listed
from benchmarks.papers.study import Study
from benchmarks.papers.verdict import Interval


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path, 1, "full")


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_stage_begins_with_the_last_checkpoint_or_a_merge_that_ends_with_it(study, name):
    for rate in stages.STAGES[name].rates:
        last, merged = (stages.run(study, name, 0, rate, count) for count in (1, 10))
        assert last.weights is None
        assert merged.weights.parts[-1] == merged.parent == last.parent
        assert len(merged.weights.parts) == 10
        assert merged.learning_rate == rate


def test_restarts_leave_before_the_surge_and_skip_its_data(study):
    trunk = study.trunk("dense", 0)
    surge = recovery.surge(study, "dense", 0)
    for name, (merged, _) in recovery.ARMS.items():
        arm = recovery.arm(study, "dense", 0, name)
        assert arm.parent == surge.parent == trunk.at(recovery.ONSET)
        assert (arm.weights is not None) is merged
        assert arm.order != trunk.order
    assert recovery.no_action(study, "dense", 0).parent == surge.at(surge.end)


def test_a_spike_stands_out_from_the_steps_around_it():
    norms = np.full(40, 2.0)
    assert spikes(norms) == 0 == roughness(norms)
    norms[[5, 30]] = 3.1
    norms[20] = 2.9
    assert spikes(norms) == 2
    assert roughness(norms) == pytest.approx(2 * np.log(3.1 / 2.0) / 7)


def test_differences_are_taken_seed_by_seed():
    assert difference([3.0, 5.0], [1.0, 3.0]) == Interval(2.0, 0.0)
    shown = {"a": Interval(0.1, 0.02), "b": [Interval(-0.25, 0.01), Interval(0.5, 0.0)]}
    assert listed(shown, 2) == "a +0.10 ± 0.02; b -0.25 ± 0.01, +0.50 ± 0.00"
    assert extent(shown["b"], 1, " %", sign=False) == "-0.2 to 0.5 % (± 0.0 at most)"
