"""What a spike is: the threshold against independent arithmetic, and when what is reported."""

import math
from itertools import pairwise

import numpy as np
import pytest
from detector_curves import healthy, kinds, warm, watch

from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_detector import ACTIVE_FROM, HISTORY, SpikeDetector

NAN, INF = math.nan, math.inf


def threshold_by_numpy(clean, k, floor, start):
    last = np.asarray(clean[-HISTORY:], dtype=np.float64)
    middle = np.median(last)
    upper = np.quantile(last, 0.75, method="higher") - middle
    deviation = 1.4826 * max(np.median(np.abs(last - middle)), upper)
    level = np.median(np.abs(start))
    return middle + max(k * deviation, floor * max(abs(middle), 0.01 * level))


# --- the threshold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "floor"), [(6.0, 0.05), (3.0, 1e-9), (0.1, 0.5)])
@pytest.mark.parametrize("level", [2.0, 0.0, -5.0, 1e30, 1e-30])
def test_threshold_is_that_of_the_last_128_clean_values(k, floor, level):
    rng = np.random.default_rng(1)
    detector, clean, start = SpikeDetector(k, floor), [], []
    for step in range(400):
        value = float(level + (abs(level) or 1.0) * 0.2 * rng.standard_t(3))
        if len(clean) >= ACTIVE_FROM:
            expected = threshold_by_numpy(clean, k, floor, start)
            # The same sums in the same precision, up to the order within a median's mean of two.
            assert detector.threshold == pytest.approx(expected, rel=1e-12)
            outlier = value > expected
        else:
            assert math.isnan(detector.threshold)
            outlier = False
        detector.observe(step, value)
        assert (detector.onset is not None) == outlier
        start += [value] if len(start) < ACTIVE_FROM else []
        if not outlier:
            clean.append(value)
    assert detector.baseline == pytest.approx(np.median(clean[-HISTORY:]), rel=1e-12)


def test_a_value_on_the_threshold_is_no_outlier():
    detector = warm([2.0] * 100)
    assert detector.threshold == 2.1
    detector.observe(100, detector.threshold)
    assert detector.onset is None
    detector.observe(101, math.nextafter(2.1, 3))
    assert detector.onset == 101


def test_nothing_finite_is_an_outlier_before_64_clean_values():
    detector = SpikeDetector()
    assert not watch(detector, [2.0] * (ACTIVE_FROM - 7) + [1e6] * 6)
    assert detector.onset is None
    assert math.isnan(detector.threshold)
    assert math.isnan(SpikeDetector().baseline)
    detector.observe(63, 2.0)
    assert detector.threshold == 2.1
    detector.observe(64, 1e6)
    assert detector.onset == 64


def test_a_downward_outlier_is_none():
    detector = warm()
    assert not watch(detector, [0.0, -1e9, 1e-9] * 3, start=200)
    assert detector.onset is None


@pytest.mark.parametrize("level", [2.0, -2.0])
def test_without_noise_the_floor_alone_decides(level):
    detector = warm([level] * 100)
    assert detector.threshold == level + 0.1
    assert not watch(detector, [level + 0.099] * 20, start=100)
    assert kinds(watch(warm([level] * 100), [level + 0.101] * 5, start=100)) == [(104, "spike", 100)]


def test_a_loss_that_always_was_zero_has_no_scale_to_judge_by():
    detector = warm([0.0] * 100)
    assert math.isnan(detector.threshold)
    assert not watch(detector, [1e-9] * 20, start=100)
    assert detector.onset is None


def test_a_loss_that_came_down_to_zero_is_judged_by_where_it_came_from():
    detector = warm([1.0] * 64 + [0.0] * 136)
    assert detector.threshold == pytest.approx(0.05 * 0.01)
    assert not watch(detector, [4e-4], start=200)
    assert detector.onset is None
    assert kinds(watch(detector, [6e-4] * 5, start=201)) == [(205, "spike", 201)]


@pytest.mark.parametrize("zeros", [0.3, 0.45, 0.5, 0.55])
def test_a_loss_that_is_often_exactly_zero_raises_no_alarm(zeros):
    # A hinge loss: with MAD alone, which is 0 or near it, 5 of 5 such runs do.
    for seed in range(5):
        rng = np.random.default_rng(seed)
        values = np.where(rng.random(4000) < zeros, 0.0, rng.exponential(1.0, 4000))
        assert not watch(SpikeDetector(), values)


def test_a_skewed_loss_is_judged_by_its_upper_half():
    for seed in range(10):
        assert not watch(SpikeDetector(), np.random.default_rng(seed).lognormal(0, 1.5, 4000))


def test_a_baseline_of_zero_is_judged_by_its_noise_alone():
    rng = np.random.default_rng(2)
    detector = warm(rng.standard_normal(200) / 100)
    assert 0.04 < detector.threshold < 0.09  # six times a standard deviation of .01
    assert kinds(watch(detector, [0.1] * 5, start=200)) == [(204, "spike", 200)]


# --- what is reported, and when ---------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 5, 20])
def test_a_spike_is_patience_outliers_in_a_row_and_dates_from_the_first(patience):
    detector = warm(patience=patience)
    baseline, threshold = detector.baseline, detector.threshold
    events = watch(detector, [3.0 + i for i in range(60)], start=200)
    assert kinds(events) == [(199 + patience, "spike", 200)]  # once, however long it lasts
    event = events[199 + patience]
    assert event.values == [3.0 + i for i in range(patience)]
    assert (event.baseline, event.threshold) == (baseline, threshold)
    assert (event.trigger, event.watched) == ("loss", "loss")


def test_a_spike_that_heals_by_itself_is_never_reported():
    detector = warm()
    assert not watch(detector, ([9.0] * 2 + [2.0]) * 50, start=200)


def test_each_streak_is_reported_once_and_one_that_heals_raises_the_patience_for_its_like():
    detector = warm()
    values = [9.0] * 7 + [2.0]
    assert kinds(watch(detector, values, start=200)) == [(204, "spike", 200)]  # as where nothing is restored
    assert not watch(detector, [*values, *[2.0] * 6] * 13, start=208)
    # Twice as long and another five, or clearly higher, and it is reported again.
    assert kinds(watch(detector, [9.0] * 30, start=400)) == [(418, "spike", 400)]
    assert not watch(detector, [2.0] * 10, start=430)
    assert kinds(watch(detector, [12.0] * 5, start=440)) == [(444, "spike", 440)]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_value_of_broken_weights_is_a_spike_at_once(bad):
    events = watch(warm(), [2.0], start=200) | watch(warm(), [bad, bad, bad], start=201, broken=True)
    assert kinds(events) == [(201, "spike", 201)]
    assert events[201].trigger == "non-finite loss"
    assert SpikeDetector().observe(0, bad, broken=True).onset == 0  # also as the first value of all


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_value_of_sound_weights_is_an_outlier_like_others(bad):
    assert not watch(warm(), ([bad] * 4 + [2.0]) * 50, start=200)
    assert kinds(watch(warm(), [2.0, *[bad] * 9], start=200)) == [(205, "spike", 201)]


def test_a_nan_of_broken_weights_amid_outliers_dates_from_the_first_of_them():
    detector = warm()
    assert not watch(detector, [9.0, 9.0], start=200)
    assert kinds(watch(detector, [NAN], start=202, broken=True)) == [(202, "spike", 200)]


def test_the_number_watched_is_named():
    event = watch(warm(watched="gradient norm"), [NAN], start=200, broken=True)[200]
    assert event.trigger == "non-finite gradient norm"


def test_while_the_rate_warms_up_only_what_is_far_off_counts():
    detector = warm()
    # Below three times the baseline of 2, as a cycle's restart makes it.
    assert not watch(detector, [5.9] * 50, start=200, warmup=Warmup.AGAIN)
    assert detector.onset is None
    event = watch(detector, [6.1] * 5, start=250, warmup=Warmup.AGAIN)[254]
    assert (event.kind, event.onset) == ("spike", 250)
    assert event.baseline == pytest.approx(2.0, abs=0.01)  # that before the rise


def test_a_rising_rate_is_no_reason_where_the_loss_was_far_worse_at_the_start():
    # Learned by heart: 50 times the baseline, and nothing to what the run began with.
    curve = [2.0] * 70 + [0.001] * 130
    detector = warm(curve)
    assert not watch(detector, [0.05] * 50, start=200, warmup=Warmup.AGAIN)
    assert kinds(watch(detector, [1.5] * 5, start=250, warmup=Warmup.AGAIN)) == [(254, "spike", 250)]


def test_a_non_finite_value_of_broken_weights_counts_while_the_rate_warms_up():
    found = watch(warm(), [NAN], start=250, warmup=Warmup.AGAIN, broken=True)
    assert kinds(found) == [(250, "spike", 250)]


def test_a_warm_up_that_begins_amid_outliers_ends_the_streak():
    detector = warm()
    watch(detector, [5.0] * 4, start=200)
    assert not watch(detector, [5.0], start=204, warmup=Warmup.AGAIN)
    assert detector.onset is None


# --- a first warm-up ----------------------------------------------------------------------------------------

FIRST = {"warmup": Warmup.FIRST}


def learning(start=5.0, noise=0.02):
    """A detector of a run that went from ``start`` to a loss of 2; the next step is 200."""
    fall = [2.0 + (start - 2.0) * 0.9**i for i in range(200)]
    return warm(np.add(fall, healthy(level=0.0, noise=noise)))


def test_a_loss_that_stays_bad_in_a_first_warm_up_is_a_spike():
    found = watch(learning(), [2.9] * 70, start=200, **FIRST)  # takes back 30 % of what was learned
    assert kinds(found) == [(263, "spike", 200)]  # the 64th of them


def test_a_noisy_divergence_in_a_first_warm_up_needs_three_outliers_in_four():
    assert kinds(watch(learning(), [3.5, 3.5, 3.5, 2.0] * 20, start=200, **FIRST)) == [(264, "spike", 201)]
    assert not watch(learning(), [3.5, 3.5, 2.0, 2.0] * 40, start=200, **FIRST)


def test_what_a_higher_rate_stirs_up_in_a_first_warm_up_calms_down():
    for curve in ([9.0] * 45 + [2.0] * 200, [2.55] * 300):  # high for a while; or higher by a quarter
        assert not watch(learning(), curve, start=200, **FIRST)


def test_a_rate_that_falls_back_has_its_divergence_judged_as_ever():
    detector = learning()
    assert not watch(detector, [4.0] * 40, start=200, **FIRST)
    assert kinds(watch(detector, [4.0] * 10, start=240)) == [(240, "spike", 200)]


def test_a_run_that_has_learned_little_may_rise_four_times_as_far_in_a_first_warm_up():
    curve = [2.0] * 200  # as a pre-training that is continued; the threshold is 2.1
    assert not watch(warm(curve), [2.35] * 300, start=200, **FIRST)
    assert kinds(watch(warm(curve), [2.45] * 70, start=200, **FIRST)) == [(263, "spike", 200)]


@pytest.mark.parametrize(("broken", "fires"), [(True, 200), (False, 204)])
def test_no_rate_explains_a_loss_that_is_not_finite(broken, fires):
    assert kinds(watch(learning(), [NAN] * 10, start=200, broken=broken, **FIRST)) == [(fires, "spike", 200)]


def test_hard_data_in_a_first_warm_up_are_asked_about_once():
    detector, asked = learning(), 0
    for step in range(200, 327):
        if event := detector.observe(step, 4.0, **FIRST):
            asked += 1
            assert event.kind == "spike"
            assert detector.acquit() == (asked == 1)
    assert asked == 7  # at 64, then after 1, 2, 4, … further outliers
    assert detector.observe(327, 4.0, **FIRST).kind == "shift"
    assert not watch(detector, [4.0] * 200, start=328, **FIRST)


# --- answers ------------------------------------------------------------------------------------------------


def test_hard_data_are_judged_by_a_baseline_of_their_own():
    detector = warm()
    assert kinds(watch(detector, [9.0, 9.1] * 2 + [9.0], start=200)) == [(204, "spike", 200)]
    assert detector.acquit()
    assert detector.is_within_baseline
    assert detector.onset == 200
    asked = []
    for step in range(205, 250):
        if detector.observe(step, 9.0 + step % 2 / 10):
            asked.append(step)
            assert not detector.acquit()  # no longer the first answer to this streak
    assert asked == [205, 207, 211, 219, 235]
    assert kinds(watch(detector, [14.0] * 5, start=250)) == [(254, "spike", 200)]


def test_sorted_data_cost_a_few_questions_once():
    detector, asked = warm(), 0
    for block in range(20):
        for step, value in enumerate([*[2.0] * 280, *[2.5] * 20], 200 + 300 * block):
            if detector.observe(step, value):
                asked += 1
                detector.acquit()
    assert asked == 5  # after 5, 6, 8, 12 and 20 outliers of the first block


def test_single_outliers_make_no_hard_data():
    detector = warm()
    watch(detector, [9.0] * 7 + [2.0], start=200)  # a streak that heals
    watch(detector, ([20.0] + [2.0] * 9) * 20, start=208)
    assert kinds(watch(detector, [15.0] * 5, start=408)) == [(412, "spike", 408)]


def test_the_weights_of_hard_data_are_calm_and_those_of_a_streak_are_not():
    detector = warm()
    watch(detector, [9.0] * 4, start=200)
    assert not detector.is_within_baseline
    watch(detector, [9.0], start=204)
    detector.acquit()
    assert detector.is_within_baseline
    watch(detector, [20.0], start=205)
    assert not detector.is_within_baseline


def test_data_that_come_back_after_a_shift_are_judged_by_the_old_baseline():
    # 150 corrupted batches, then the old data again: sound weights, or weights that these have harmed.
    for level, expected in ((2.0, []), (2.6, [(370, "spike", 200)])):
        detector = warm()
        assert 327 in watch(detector, [9.0] * 150, start=200)
        assert kinds(watch(detector, healthy(100, level), start=350)) == expected
        assert detector.baseline == pytest.approx(2.0, abs=0.02)


def test_a_restore_takes_a_shift_back():
    detector = warm()
    events = watch(detector, [9.0] * 128, start=200)
    assert events[327].kind == "shift"
    assert detector.baseline == 9.0
    detector.restored(5)
    assert detector.baseline == pytest.approx(2.0, abs=0.01)


# --- a rise -------------------------------------------------------------------------------------------------


def test_a_rise_below_the_threshold_is_reason_to_ask():
    rng = np.random.default_rng(3)
    detector = warm(2.0 + 0.2 * rng.standard_normal(200))
    assert detector.threshold > 3
    events = watch(detector, 2.8 + 0.2 * rng.standard_normal(40), start=200, rises=True)
    (step, event), *_ = events.items()
    assert event.kind == "rise"
    assert 208 <= step <= 224  # the median of 16 values, looked at every 8
    assert step - 16 < event.onset <= step
    assert event.baseline == pytest.approx(2.0, abs=0.1)
    assert event.baseline < event.threshold < 2.8


def test_a_slow_rise_is_seen_though_it_gets_into_the_baseline():
    rng = np.random.default_rng(4)
    noise = 0.2 * rng.standard_normal(400)
    curve = 2.0 + np.concatenate([np.zeros(200), np.linspace(0, 2.0, 200)]) + noise
    first = next(event for event in watch(SpikeDetector(), curve, rises=True).values())
    assert first.kind == "rise"
    assert first.step < 290


def test_questions_about_a_rise_become_rare():
    rng = np.random.default_rng(5)
    curve = 2.0 + 0.3 * np.sin(np.arange(8000) / 200 * 2 * np.pi) + 0.02 * rng.standard_normal(8000)
    steps = list(watch(SpikeDetector(), curve, rises=True))
    assert 1 <= len(steps) <= 20
    assert all(b - a >= 512 for a, b in pairwise(steps[5:]))


def test_noise_makes_no_rise():
    for seed in range(20):
        assert not watch(SpikeDetector(), healthy(4000, noise=0.3, seed=seed), rises=True)


# --- the baseline can't be poisoned -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [1e30] * 127, [NAN, 9.0, INF] * 100])
def test_outliers_leave_no_trace_in_the_baseline(bad):
    detector, unharmed = warm(), warm()
    watch(detector, bad, start=200)
    for step, value in enumerate(healthy(300, seed=3), 700):
        assert detector.observe(step, value) == unharmed.observe(step, value)
        assert (detector.baseline, detector.threshold) == (unharmed.baseline, unharmed.threshold)
