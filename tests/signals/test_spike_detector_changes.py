"""What a detector makes of data that change, of a restore, and of steps that fp16 training skips."""

import math

import numpy as np
import pytest
from detector_curves import healthy, kinds, warm, watch

from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_detector import HISTORY

NAN, INF = math.nan, math.inf


# --- a shift of the data ----------------------------------------------------------------------------------


def test_128_outliers_in_a_row_are_the_new_normal():
    detector = warm()
    events = watch(detector, healthy(300, level=3.0, seed=5), start=200)
    assert kinds(events) == [(204, "spike", 200), (327, "shift", 200)]
    assert len(events[327].values) == HISTORY
    assert events[327].baseline == events[204].baseline  # that which they were judged by
    assert detector.baseline == pytest.approx(3.0, abs=0.01)
    assert kinds(watch(detector, [9.0] * 5, start=500)) == [(504, "spike", 500)]


@pytest.mark.parametrize(("outliers", "of"), [(96, 128), (95, 128)])
def test_a_shift_needs_three_outliers_in_four(outliers, of):
    # So that they overlap with the clean values; never five in a row, so that there is no spike.
    values = np.full(of, 9.0)
    values[np.linspace(1, of - 2, of - outliers).astype(int)] = 2.0
    events = watch(warm(), values, start=200)
    assert kinds(events) == ([(327, "shift", 200)] if outliers == 96 else [])
    if events:
        assert events[327].values == [9.0] * 96


def test_a_shift_is_told_from_the_last_128_values_only():
    curve = [9.0] + [2.0] * 150 + [9.0] * 128  # the first has no part in it
    assert kinds(watch(warm(), curve, start=200)) == [(355, "spike", 351), (478, "shift", 351)]


def test_the_outliers_of_a_shift_lie_among_finite_values():
    curve = [9.0] * 127 + [NAN] + [9.0] * 128
    assert kinds(watch(warm(), curve, start=200)) == [(204, "spike", 200), (455, "shift", 328)]


def test_a_warm_up_begins_a_new_baseline():
    detector = warm()
    assert watch(detector, [9.0] * 127, start=200)
    assert not watch(detector, [9.0] * 10, start=327, warmup=Warmup.AGAIN)
    assert not watch(detector, [9.0] * 53, start=337)
    assert math.isnan(detector.threshold)
    assert not watch(detector, [9.0] * 100, start=390)
    assert (detector.baseline, detector.onset) == (9.0, None)


def test_a_report_holds_the_last_128_values_at_most():
    detector = restored(*BEFORE)
    watch(detector, [INF] * 2, start=300, skipped=True)
    assert not watch(detector, [8.0] * 126, start=302)
    assert watch(detector, [-INF], start=428, broken=True)[428].values == [INF, *[8.0] * 126, -INF]


# --- after a restore --------------------------------------------------------------------------------------


def restored(*outliers, unmoved=5):
    """A detector whose run was restored after these; the next step is 300."""
    detector = warm()
    watch(detector, outliers, start=200)
    detector.restored(unmoved)
    return detector


BEFORE = (9.0,) * 5


def test_a_restore_ends_the_streak():
    detector = restored(*BEFORE)
    assert detector.onset is None
    assert not watch(detector, healthy(50), start=300)


@pytest.mark.parametrize("height", [3.0, 8.0, 9.0, 20.0])
def test_outliers_right_after_a_restore_are_not_the_weights_fault(height):
    detector = restored(*BEFORE)
    assert not watch(detector, [height] * 100, start=300)
    assert detector.onset == 300  # but no snapshot should be taken
    assert kinds(watch(detector, [height] * 28, start=400)) == [(427, "shift", 300)]
    assert kinds(watch(detector, [1.5 * height] * 5, start=428)) == [(432, "spike", 428)]


def test_a_spike_among_changed_data_stands_out_of_these():
    detector = restored(*BEFORE)
    assert not watch(detector, [8.0, 8.1] * 20, start=300)
    assert not watch(detector, [8.3] * 20, start=340)
    assert kinds(watch(detector, [10.0] * 5, start=360)) == [(364, "spike", 300)]


def test_a_spike_among_the_first_changed_data_stands_out_of_the_very_first():
    events = watch(restored(*BEFORE), [8.0] * 6 + [10.0] * 5, start=300)
    assert kinds(events) == [(310, "spike", 300)]


@pytest.mark.parametrize("first", [[2.0, 9.0, 2.0, 2.0, 9.0], [9.0, 2.0, 2.0, 9.0, 9.0]])
def test_a_bad_batch_or_three_do_not_make_changed_data(first):
    detector = restored(*BEFORE)
    assert not watch(detector, [*first, 2.0], start=300)
    assert kinds(watch(detector, [3.0] * 5, start=306)) == [(310, "spike", 306)]


def test_a_divergence_soon_after_a_restore_is_none_of_the_data():
    curve = [2.0, 2.1, 2.5, 4.0, 6.0, 7.0, 7.0]
    assert kinds(watch(restored(*BEFORE), curve, start=300)) == [(306, "spike", 302)]
    assert kinds(watch(restored(*BEFORE, unmoved=1), [2.0, *[7.0] * 5], start=300)) == [(305, "spike", 301)]


@pytest.mark.parametrize("level", [2.3, 2.5, 3.0, 8.0])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_changed_data_cost_two_restores_at_most(level, noise):
    for seed in range(20):
        detector = warm(values=healthy(seed=seed))
        restores, shifts, step = 0, 0, 200
        for value in healthy(600, level, noise, seed=100 + seed):
            event = detector.observe(step, value)
            if event and event.kind == "spike":
                restores += 1
                detector.restored(5)
            shifts += event is not None and event.kind == "shift"
            step += 1
        assert restores <= 2
        assert shifts <= 1
        assert detector.baseline == pytest.approx(level, rel=0.1)  # the new normal, one way or the other


def test_finite_outliers_after_a_restore_from_nan_are_the_data():
    assert not watch(restored(9.0, 9.0, 9.0, NAN), [30.0] * 100, start=300)


@pytest.mark.parametrize("before", [BEFORE, (NAN,)])
def test_a_nan_of_broken_weights_after_a_restore_fires_at_once(before):
    detector = restored(*before)
    assert not watch(detector, [8.0, 8.0], start=300)
    assert kinds(watch(detector, [NAN], start=302, broken=True)) == [(302, "spike", 300)]


# --- fp16 -------------------------------------------------------------------------------------------------


def test_finite_values_of_skipped_steps_are_not_there():
    detector, unharmed = warm(), warm()
    assert not watch(detector, [9.0, 1.0, 1e30] * 50, start=200, skipped=True)
    assert detector.state_dict() == unharmed.state_dict()
    watch(detector, [9.0] * 3, start=350)
    watch(detector, [2.0, 9.0], start=353, skipped=True)  # neither ends a streak nor goes on with it
    assert kinds(watch(detector, [9.0] * 2, start=355)) == [(356, "spike", 350)]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_values_of_skipped_steps_are_a_spike_in_a_row_only(bad):
    detector = warm()
    for start in range(200, 300, 5):
        assert not watch(detector, [bad] * 4, start=start, skipped=True)
        assert not watch(detector, [2.0], start=start + 4)
    assert kinds(watch(detector, [bad] * 9, start=300, skipped=True)) == [(304, "spike", 300)]


@pytest.mark.parametrize("before", [BEFORE, (NAN,)])
def test_steps_that_overflow_for_ever_after_a_restore_are_a_spike(before):
    events = watch(restored(*before), [NAN] * 9, start=300, skipped=True)
    assert kinds(events) == [(304, "spike", 300)]


@pytest.mark.parametrize("order", [(NAN, 8.0, 8.0, 8.0, 8.0), (8.0, 8.0, 8.0, 8.0, NAN)])
def test_one_skipped_nan_among_tolerated_outliers_stays_one_outlier(order):
    detector = restored(*BEFORE)
    for step, value in enumerate(order, 300):
        assert detector.observe(step, value, skipped=not math.isfinite(value)) is None
    assert not watch(detector, [8.0] * 20, start=305)
