"""What each step weighs in a running average, and averages of other widths made out of stored ones."""

import math

import pytest
import torch

from merge_callback import PowerEma, RunningEma, RunningWsm, SmaSince
from merge_callback.merging import Wsm
from merge_callback.merging.posthoc import Profile, inner_product, solve
from merge_callback.merging.running import gamma_of, resolve_running

STEPS = 400


def weights(average, steps=STEPS):
    """What each step up to ``steps`` weighs in an average of them."""
    updates, at = [], None
    for step in range(1, steps + 1):
        if average.is_due(at, step):
            updates.append((step, average.beta(average.begins if at is None else at, step)))
            at = step
    found, left = torch.zeros(steps, dtype=torch.float64), 1.0
    for step, beta in reversed(updates):
        found[step - 1], left = left * (1 - beta), left * beta
    return found


# arXiv 2312.02696, below eq. 4: σ_rel of .05 and .10 are γ of 16.97 and 6.94
@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponent_of_a_width_is_the_papers(sigma, gamma):
    assert gamma_of(sigma) == pytest.approx(gamma, abs=0.005)
    exact = gamma_of(sigma)
    assert math.sqrt((exact + 1) / ((exact + 2) ** 2 * (exact + 3))) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.10, 0.2])
def test_a_width_is_the_standard_deviation_of_the_profile(sigma):
    found = weights(PowerEma(sigma), 4000)
    times = torch.arange(1, 4001, dtype=torch.float64) / 4000
    mean = (found * times).sum()
    assert float(found.sum()) == pytest.approx(1)
    assert float((found * (times - mean) ** 2).sum().sqrt()) == pytest.approx(sigma, rel=2e-3)


@pytest.mark.parametrize("every", [1, 7])
def test_the_mean_since_a_step_weighs_all_later_ones_alike(every):
    found = weights(SmaSince(step=100, every_n_steps=every))
    assert not found[:100].any()
    used = found[found > 0]
    assert float(used.sum()) == pytest.approx(1)
    if every == 1:
        assert len(used) == 300
        torch.testing.assert_close(used, torch.full_like(used, 1 / 300))


@pytest.mark.parametrize("decay", ["1-sqrt", "linear", "cosine"])
def test_streaming_wsm_weighs_as_the_wsm_of_all_snapshots_does(decay):
    expected = Wsm(decay=decay).normalised_weights([*range(101, 201)])
    found = weights(RunningWsm(horizon=200, start=100, decay=decay))
    torch.testing.assert_close(found[100:200], torch.tensor(expected, dtype=torch.float64))
    assert not found[:100].any()
    assert not found[200:].any()


def test_a_steps_weight_halves_within_the_half_life():
    found = weights(RunningEma(decay=0.5 ** (1 / 20)))
    assert float(found[379] / found[399]) == pytest.approx(0.5)
    growing = RunningEma(half_life=0.05)
    left = math.prod(growing.beta(step - 1, step) for step in range(3801, 4001))
    assert left == pytest.approx(0.5, rel=0.03)  # the half-life is 190 steps at first, and 200 in the end


def test_updates_may_be_left_out():
    """What is skipped counts for the next one: mass, and so the profile, stays where it was."""
    every, some = weights(PowerEma(0.1)), weights(PowerEma(0.1, every_n_steps=8))
    assert float(some.sum()) == pytest.approx(1)
    # the first update is that of step 1, and then 8, 16, …
    torch.testing.assert_close(some.cumsum(0)[7::8], every.cumsum(0)[7::8])


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: PowerEma(0.3), "sigma=0.3 must lie between 0 and 0.289"),
        (lambda: PowerEma(0.1, every_n_steps=0), "every_n_steps=0"),
        (lambda: RunningEma(), "give one"),
        (lambda: RunningEma(half_life=0.05, decay=0.9), "give one"),
        (lambda: RunningEma(decay=1.0), "decay=1.0"),
        (lambda: RunningEma(half_life=-1.0), "half_life=-1.0"),
        (lambda: SmaSince(step=-1), "step=-1"),
        (lambda: RunningWsm(horizon=5, start=5), "horizon=5 must lie after start=5"),
        (lambda: RunningWsm(horizon=5, decay="cubic"), "decay='cubic'"),
        (lambda: resolve_running(["mean"]), "'mean' is no running average"),
        (lambda: resolve_running(["wsm"]), "'wsm' needs options"),
        (lambda: resolve_running([PowerEma(0.1), PowerEma(0.1)]), "twice"),
        (lambda: resolve_running({"a/b": PowerEma(0.1)}), "'a/b' is no name"),
        (lambda: resolve_running(3), "must be a list"),
    ],
)
def test_what_makes_no_sense_is_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_averages_have_names():
    averages = [PowerEma(0.05), RunningEma(half_life=0.05), SmaSince(step=10), RunningWsm(horizon=30)]
    assert [*resolve_running(averages)] == [
        "power_ema-0.05",
        "ema-half-life-0.05",
        "sma_since-10",
        "wsm-0-30",
    ]
    assert [*resolve_running({"long": PowerEma(0.2)})] == ["long"]
    assert resolve_running("power_ema") == {"power_ema-0.05": PowerEma(0.05)}


# --- any width afterwards -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "sigmas"), [((300, 300), (0.05, 0.1)), ((200, 300), (0.1, 0.05))])
def test_inner_products_are_the_integrals(steps, sigmas):
    one, other = (Profile(step, sigma) for step, sigma in zip(steps, sigmas, strict=True))
    times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * min(steps)
    values = [(p.gamma + 1) * (times / p.step) ** p.gamma / p.step for p in (one, other)]
    integral = float((values[0] * values[1]).mean()) * min(steps)
    assert inner_product(one, other) == pytest.approx(integral, rel=1e-6)
    assert inner_product(one, other) == inner_product(other, one)


def stored(every=20, steps=STEPS, sigmas=(0.05, 0.1)):
    return [Profile(step, sigma) for step in range(every, steps + 1, every) for sigma in sigmas]


def made(solution, profiles):
    """What each step weighs in the sum of stored averages."""
    parts = zip(solution.weights, profiles, strict=True)
    total = torch.zeros(STEPS, dtype=torch.float64)
    for weight, profile in parts:
        total[: profile.step] += weight * weights(PowerEma(profile.sigma), profile.step)
    return total


@pytest.mark.parametrize("wanted", [Profile(400, 0.05), Profile(400, 0.1), Profile(300, 0.1)])
def test_what_was_stored_is_found_exactly(wanted):
    solution = solve(stored(), wanted)
    assert solution.residual < 1e-6
    expected = torch.zeros(STEPS, dtype=torch.float64)
    expected[: wanted.step] = weights(PowerEma(wanted.sigma), wanted.step)
    torch.testing.assert_close(made(solution, stored()), expected, rtol=0, atol=1e-6)


def test_a_width_between_comes_close_and_says_how_close():
    trajectory = torch.cumsum(torch.randn(STEPS, generator=torch.Generator().manual_seed(0)), 0).double()
    for sigma in (0.06, 0.08, 0.12, 0.15):
        profiles = stored()
        solution = solve(profiles, Profile(STEPS, sigma))
        tracked = weights(PowerEma(sigma))
        error = float((made(solution, profiles) - tracked) @ trajectory)
        assert abs(error) < 0.02 * abs(float(tracked @ trajectory) - float(trajectory[-1]))
        assert solution.residual < 0.01
        assert sum(solution.weights) == pytest.approx(1)


def test_fewer_copies_leave_a_larger_residual():
    wanted = Profile(STEPS, 0.15)
    residuals = [solve(stored(every), wanted).residual for every in (20, 50, 100, 400)]
    assert residuals == sorted(residuals)
    assert residuals[-1] > 0.2
