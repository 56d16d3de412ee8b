"""The spike detector on whole curves: poisoned, healthy, diverging, and resumed at any step."""

import json
import math

import numpy as np
import pytest
from detector_curves import healthy, kinds, warm, watch

from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_detector import SpikeDetector

NAN, INF = math.nan, math.inf


# --- poisoned ---------------------------------------------------------------------------------------------


def olmo_outliers(values):
    """OLMo-core's skip rule: beyond six standard deviations of the last 128 values, all of them."""
    found = []
    for i, value in enumerate(values):
        seen = np.asarray(values[max(0, i - 128) : i])
        if len(seen) >= 64:
            with np.errstate(invalid="ignore"):
                normal = value - seen.mean() <= 6 * seen.std(ddof=1)
            if not normal:
                found.append(i)
    return found


def test_one_nan_blinds_the_mean_and_deviation_for_a_window_but_not_this_detector():
    curve = [*healthy(200), NAN, *healthy(300, seed=4)]
    # The rule this one replaces: the NaN, and then every step for as long as it stays among the last 128.
    assert olmo_outliers(curve) == list(range(200, 329))
    detector = SpikeDetector()
    outliers = []
    for step, value in enumerate(curve):
        detector.observe(step, value)
        outliers += [step] if detector.onset is not None else []
    assert outliers == [200]


# --- healthy curves ---------------------------------------------------------------------------------------


def falling(n, rng):
    return 2 + 8 / np.sqrt(1 + np.arange(n) / 50) + 0.02 * rng.standard_normal(n)


CURVES = {
    "heavy tails": lambda n, rng: 3 + 0.05 * rng.standard_t(3, n),
    "heavier tails, negative": lambda n, rng: -3 + 0.5 * rng.standard_t(3, n),
    "around zero": lambda n, rng: 0.1 * rng.standard_t(3, n),
    "falling": falling,
    "constant": lambda n, rng: np.full(n, 0.7),
    "rounding noise": lambda n, rng: np.full(n, 1 / 3) * (1 + 1e-16 * rng.standard_normal(n)),
    "huge": lambda n, rng: 1e37 * (1 + 0.1 * rng.standard_normal(n)),
    "slow rise": lambda n, rng: 2 * 1.0002 ** np.arange(n) + 0.02 * rng.standard_normal(n),
    "drop at each decay": lambda n, rng: 4 * 0.8 ** (np.arange(n) // 400) + 0.001 * rng.standard_normal(n),
    "to zero": lambda n, rng: np.exp(-np.arange(n) / 200) * (1 + 0.1 * rng.standard_normal(n)),
}


DEFAULT = ["heavy tails", "drop at each decay"]


@pytest.mark.parametrize(
    "curve",
    [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in CURVES if name not in DEFAULT)],
)
def test_healthy_curves_are_never_reported(curve):
    n = 20_000 if "tails" in curve else 3000
    for seed in range(2):
        assert not watch(SpikeDetector(), CURVES[curve](n, np.random.default_rng(seed)))


def test_a_divergence_after_a_falling_curve_is_found_within_patience():
    rng = np.random.default_rng(6)
    curve = np.concatenate([falling(2000, rng), [4.0, 5.0, 6.0, 7.0, 7.0, 7.0]])
    assert kinds(watch(SpikeDetector(), curve)) == [(2004, "spike", 2000)]


# --- resume -----------------------------------------------------------------------------------------------


def rough_curve(n, rng):
    """Calm, outliers, NaNs, infinities, skipped steps, warm-ups, shifts and restores, in random order."""
    moods = {"calm": (2.0, 0.0), "outliers": (9.0, 0.0), "nan": (2.0, 0.3), "worse": (20.0, 0.05)}
    steps = []
    while len(steps) < n:
        level, broken = moods[rng.choice(list(moods), p=[0.5, 0.2, 0.1, 0.2])]
        skipped, warmup = bool(rng.random() < 0.1), rng.choice(list(Warmup), p=[0.8, 0.1, 0.1])
        for _ in range(int(rng.choice([3, 6, 40, 140]))):
            bad = rng.choice([NAN, INF, -INF])
            value = bad if rng.random() < broken else level + 0.02 * rng.standard_normal()
            steps.append((float(value), warmup, skipped, bool(rng.random() < 0.02)))
    return steps[:n]


def act(detector, step, value, warmup, skipped, restore):
    event = detector.observe(step, value, warmup, skipped, broken=step % 3 == 0)
    if restore:
        detector.restored(5)
    elif event and event.kind == "spike" and step % 2:
        detector.acquit()
    # repr, since NaN is not equal to itself
    return repr((event, detector.onset, detector.baseline, detector.threshold))


@pytest.mark.parametrize("length", [400, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_resume_at_any_step_goes_on_exactly(length):
    steps = rough_curve(length, np.random.default_rng(7))
    unbroken, resumed, reported = SpikeDetector(), SpikeDetector(), 0
    for step, given in enumerate(steps):
        expected = act(unbroken, step, *given)
        reported += "SpikeEvent" in expected
        assert act(resumed, step, *given) == expected
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = SpikeDetector()
        resumed.load_state_dict(state)
        assert repr(resumed.state_dict()) == repr(unbroken.state_dict())
    assert reported > length / 75  # the curve was rough indeed


def test_a_state_is_a_copy():
    detector = warm()
    watch(detector, [9.0] * 2, start=200)
    state = detector.state_dict()
    kept = json.dumps(state)
    other = SpikeDetector()
    other.load_state_dict(state)
    for one in (detector, other):
        watch(one, [9.0] * 4 + [2.0] * 10, start=202)
        assert json.dumps(state) == kept
