"""Wrong spike options name themselves, their value and the mend; right ones keep their meaning."""

import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from merge_callback import CheckpointMergeCallback
from merge_callback.merging import Ema, Sma, Ties, Weighted
from merge_callback.signals.spike_detector import SpikeDetector
from merge_callback.spike_options import SpikeOptions, resolve_spike


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"action": "stop"}, "spike.action='stop'.*'restore', 'warn', 'off'"),
        ({"action": None}, "spike.action=None.*'restore'"),
        ({"no_snapshot": "raise"}, "spike.no_snapshot='raise'.*'warn', 'stop'"),
        ({"optimizer": "clear"}, "spike.optimizer='clear'.*'keep', 'reset', 'scale'"),
        ({"optimizer": None}, "spike.optimizer=None"),
        ({"patience": 0}, "spike.patience=0 must be a positive whole number"),
        ({"patience": True}, "spike.patience=True"),
        ({"patience": 128}, "spike.patience=128 must be below 128"),
        ({"grad_norm": "yes"}, "spike.grad_norm='yes' must be True or False"),
        ({"patience": 2.5}, "spike.patience=2.5"),
        ({"patience": None}, "spike.patience=None"),
        ({"pma_window": 0}, "spike.pma_window=0"),
        ({"pma_window": "3"}, "spike.pma_window='3'"),
        ({"max_restores": 0}, "spike.max_restores=0"),
        ({"guard": -1}, "spike.guard=-1"),
        ({"guard": None}, "spike.guard=None"),
        ({"guard": False}, "spike.guard=False"),
        ({"rewarm_steps": None}, "spike.rewarm_steps=None"),
        ({"rewarm_steps": math.nan}, "spike.rewarm_steps=nan"),
        ({"rewarm_steps": math.inf}, "spike.rewarm_steps=inf"),
        ({"cooldown": -1}, "spike.cooldown=-1"),
        ({"cooldown": 0.5}, "spike.cooldown=0.5"),
        ({"threshold": 0}, "spike.threshold=0 must be a positive number"),
        ({"threshold": "6"}, "spike.threshold='6'"),
        ({"threshold": None}, "spike.threshold=None"),
        ({"floor": -0.1}, "spike.floor=-0.1"),
        ({"floor": math.nan}, "spike.floor=nan"),
        ({"lr_factor": math.inf}, "spike.lr_factor=inf"),
        ({"lr_factor": 1.5}, "spike.lr_factor=1.5 must be a positive number of at most 1"),
        ({"optimizer_scale": 2}, "spike.optimizer_scale=2 must be a positive number of at most 1"),
        ({"lr_factor": True}, "spike.lr_factor=True"),
        ({"optimizer_scale": 0.0}, "spike.optimizer_scale=0.0"),
        ({"method": "mean"}, "spike.method='mean'.*sma"),
        ({"method": Weighted(weights=[0.5, 0.5])}, r"spike.method=Weighted.*spike.pma_window=3: .*2 weights"),
        ({"method": Ties()}, "spike.method=.*must be a linear method, e.g. 'sma'"),
    ],
)
def test_wrong_options_name_themselves(options, named):
    with pytest.raises(ValueError, match=named):
        SpikeOptions(**options)


@pytest.mark.filterwarnings("ignore:weights")  # that they are negative, or don't sum to 1
def test_weights_must_serve_fewer_snapshots_too():
    with pytest.raises(ValueError, match=r"spike.method=.*sum to 0"):  # what the last two would
        SpikeOptions(method=Weighted(weights=[1.0, -1.0, 1.0]))


def test_the_defaults_are_those_that_are_documented():
    options = SpikeOptions()
    assert (options.action, options.optimizer, options.no_snapshot) == ("restore", "keep", "warn")
    assert (options.threshold, options.floor, options.patience) == (6.0, 0.05, 5)
    detector = SpikeDetector()
    assert (detector.k, detector.floor, detector.patience) == (6.0, 0.05, 5)
    assert (options.pma_window, options.rewarm_steps, options.lr_factor) == (3, 100, 1.0)
    assert options.merging == Sma()
    assert not options.grad_norm


@pytest.mark.parametrize(
    "option", ["patience", "pma_window", "guard", "rewarm_steps", "cooldown", "max_restores"]
)
def test_whole_numbers_may_be_spelt_as_floats_and_are_counts_all_the_same(option):
    value = getattr(SpikeOptions(**{option: 4.0}), option)
    assert value == 4
    assert type(value) is int


@pytest.mark.parametrize("option", ["guard", "rewarm_steps", "cooldown"])
@pytest.mark.parametrize("zero", [0, 0.0])
def test_none_at_all_is_a_number_of_steps(option, zero):
    value = getattr(SpikeOptions(**{option: zero}), option)
    assert value == 0
    assert type(value) is int


def test_numbers_may_come_from_numpy():
    assert SpikeOptions(threshold=np.float64(3.0)).threshold == 3.0


def test_the_cooldown_is_a_full_history_unless_given():
    assert SpikeOptions().cooldown == 128


@pytest.mark.parametrize(
    "method", ["sma", "ema", "wma", "wsm", Ema(alpha=0.5), Weighted(weights=[0.2, 0.3, 0.5])]
)
def test_every_linear_method_can_restore(method):
    weights = SpikeOptions(method=method).merging.normalised_weights([10.0, 20.0, 30.0])
    assert sum(weights) == pytest.approx(1)


def test_the_optimizer_policy_may_be_a_function():
    policy = print
    assert SpikeOptions(optimizer=policy).optimizer is policy


def test_options_are_settled_once():
    with pytest.raises(FrozenInstanceError):
        SpikeOptions().patience = 3
    assert resolve_spike(None, 10) == SpikeOptions()
    given = SpikeOptions(action="off")
    assert resolve_spike(given, 10) is given
    for wrong in (["warn"], 3, True):
        with pytest.raises(ValueError, match=r"spike=.*must be a SpikeOptions.*action='warn'"):
            resolve_spike(wrong, 10)


def test_options_survive_a_rebuild_from_their_own_fields():
    options = SpikeOptions(patience=3.0, cooldown=0, method="ema")
    assert SpikeOptions(**{f.name: getattr(options, f.name) for f in fields(options)}) == options


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("warn", SpikeOptions(action="warn")),
        ("off", SpikeOptions(action="off")),
        (False, SpikeOptions(action="off")),  # YAML's off
        ({"action": "warn", "patience": 3}, SpikeOptions(action="warn", patience=3)),
        ({}, SpikeOptions()),
        (None, SpikeOptions()),
    ],
)
def test_an_action_or_a_mapping_is_as_good_as_an_object(given, meant):
    assert resolve_spike(given, window=10) == meant
    assert CheckpointMergeCallback(spike=given).options.spike == meant


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("stop", "spike.action='stop'.*'restore', 'warn', 'off'"),
        (True, "spike=True must be a SpikeOptions"),
        (3, "spike=3 must be a SpikeOptions"),
        ({"patiense": 3}, "spike has no option patiense; its options are action"),
        ({"patience": 0}, "spike.patience=0"),
        ({"pma_window": 5}, "spike.pma_window=5 is more than window=4 holds; choose at most 4"),
        (SpikeOptions(pma_window=5), "spike.pma_window=5 is more than window=4 holds"),
    ],
)
def test_other_values_of_spike_are_refused(given, named):
    with pytest.raises(ValueError, match=named):
        CheckpointMergeCallback(spike=given, window=4)


def test_the_default_serves_the_smallest_window():
    assert CheckpointMergeCallback(window=2).options.spike.pma_window == 3
