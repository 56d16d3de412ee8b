"""The phase detector on the learning rates that real schedulers apply, read before each optimizer step."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as sched

from merge_callback.signals.lr_phase import LRPhaseDetector, Phase, Warmup

Segment = tuple[str, int]
Rates = Sequence[Sequence[float]]
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: 0.5 * (1 + math.cos(math.pi * u)),
    "1-sqrt": lambda u: 1 - math.sqrt(u),
}


def applied(
    schedule: Callable[[Optimizer], Any], steps: int, *, epoch: int = 1, lrs: Sequence[float] = (1e-3,)
) -> list[list[float]]:
    """The rates of every group before each step, as Lightning's `on_before_optimizer_step` sees them."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer, rates = SGD(groups, lr=1e-3), []
    scheduler = schedule(optimizer)
    optimizer.step()  # once, for the schedulers that insist on it: the parameters have no gradients anyway
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns about its own call of step(epoch)
        for step in range(1, steps + 1):
            rates.append([group["lr"] for group in optimizer.param_groups])
            if step % epoch == 0:
                scheduler.step()
    return rates


def scaled(factor: Callable[[int], float]) -> Callable[[Optimizer], Any]:
    return lambda optimizer: sched.LambdaLR(optimizer, factor)


def wsd(total: int, warmup: int, decay: int, shape: str, floor: float = 0.0) -> Callable[[int], float]:
    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - (total - decay)) / decay))
        return min(1.0, step / warmup) * (floor + (1 - floor) * DECAYS[shape](progress))

    return factor


def after_warmup(warmup: int, schedule: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Any]:
    def build(optimizer: Optimizer) -> Any:
        ramp = sched.LinearLR(optimizer, 0.01, 1.0, warmup)
        return sched.SequentialLR(optimizer, [ramp, schedule(optimizer)], [warmup])

    return build


def read(rates: Iterable[Sequence[float]], total: float | None) -> list[Segment]:
    detector = LRPhaseDetector(total)
    return [(detector.observe(lrs).value, detector.since) for lrs in rates]


def timeline(rates: Rates, total: float | None = -1) -> list[Segment]:
    """The segments in order; of those that start at one step the last, which is what it turned out to be."""
    found = dict.fromkeys(read(rates, len(rates) if total == -1 else total))
    return list({since: (phase, since) for phase, since in found}.values())


def known_at(labels: list[Segment], phase: str, since: int) -> int:
    return labels.index((phase, since))


# --- warmup, stable, decay -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", DECAYS)
@pytest.mark.parametrize("total", [400, 2000])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_changes_are_dated_exactly_and_known_within_one_percent(
    shape: str, total: int, share: float, floor: float
) -> None:
    warmup, decay = total // 50, int(total * share)
    labels = read(applied(scaled(wsd(total, warmup, decay, shape, floor)), total), total)
    # The first step of the decay still has the peak rate: the first drop comes one later.
    changes = [("stable", warmup), ("decay", total - decay + 1)]
    assert list(dict.fromkeys(labels)) == [("warmup", 0), *changes]
    assert all(known_at(labels, *change) - change[1] <= total / 100 for change in changes)


def test_a_long_flat_cosine_decay_is_seen_within_one_percent() -> None:
    # The hardest case: after 1 % of the run the rate has fallen by 0.07 %.
    total = 100_000
    factor = wsd(total, 1000, 60_000, "cosine")
    labels = read(([factor(step)] for step in range(total)), total)
    assert list(dict.fromkeys(labels)) == [("warmup", 0), ("stable", 1000), ("decay", 40_001)]
    assert known_at(labels, "decay", 40_001) < 41_000


@pytest.mark.parametrize("shape", DECAYS)
@pytest.mark.parametrize(("epochs", "warmup", "decay"), [(20, 1, 5), (20, 2, 12), (100, 5, 20)])
def test_wsd_stepped_per_epoch_has_the_same_changes(shape: str, epochs: int, warmup: int, decay: int) -> None:
    length = 60
    rates = applied(scaled(wsd(epochs, warmup, decay, shape)), epochs * length, epoch=length)
    labels = read(rates, len(rates))
    changes = [("stable", warmup * length), ("decay", (epochs - decay + 1) * length)]
    assert list(dict.fromkeys(labels)) == [("warmup", 0), *changes]
    assert all(known_at(labels, *change) - change[1] <= 2 * length for change in changes)


def test_without_any_scheduler_every_step_is_stable() -> None:
    assert set(read(applied(scaled(lambda step: 1.0), 500), 500)) == {("stable", 0)}


def test_a_rate_of_zero_on_the_first_step_is_warmup() -> None:
    assert LRPhaseDetector().observe([0.0, 0.0]) is Phase.WARMUP


@pytest.mark.parametrize(("floor", "tail"), [(0.1, [("stable", 1600)]), (0.0, [])])
def test_only_a_tail_that_still_trains_is_a_new_stable_segment(floor: float, tail: list[Segment]) -> None:
    rates = applied(scaled(lambda step: wsd(1600, 40, 400, "linear", floor)(step)), 2000)
    assert timeline(rates) == [("warmup", 0), ("stable", 40), ("decay", 1201), *tail]


# --- falls without a plateau: decay where the rate falls faster than 1/t ---------------------------------

# Share u of the fall at which d ln(rate) / d ln(u) = -1. For the cosine pi u tan(pi u / 2) = 1, by bisection;
# for (1 - u)^p it is 1 / (1 + p), for exp(-a u) it is 1 / a.
SLOW_THEN_FAST = {
    "cosine": (lambda o: sched.CosineAnnealingLR(o, 4000), 0.416),
    "linear": (lambda o: sched.LinearLR(o, 1.0, 0.0, 4000), 1 / 2),
    "square": (lambda o: sched.PolynomialLR(o, 4000, 2.0), 1 / 3),
    "exponential": (lambda o: sched.ExponentialLR(o, math.exp(-5 / 4000)), 1 / 5),
}


@pytest.mark.parametrize(("schedule", "turn"), SLOW_THEN_FAST.values(), ids=SLOW_THEN_FAST)
def test_a_fall_from_the_start_turns_from_stable_to_decay(schedule: Any, turn: float) -> None:
    (first, (phase, since)) = timeline(applied(schedule, 4000))
    assert (first, phase) == (("stable", 0), "decay")
    assert since / 4000 == pytest.approx(turn, rel=0.05)  # the slope is measured every 5 % of the time


@pytest.mark.parametrize("epochs", [10, 20, 100])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_stepping_per_epoch_moves_the_turn_by_an_epoch_at_most(name: str, epochs: int) -> None:
    turn, length = SLOW_THEN_FAST[name][1], 4000 // epochs
    first, (phase, since) = timeline(applied(scaled(lambda e: DECAYS[name](e / epochs)), 4000, epoch=length))
    assert (first, phase) == (("stable", 0), "decay")
    assert since / 4000 == pytest.approx(turn, abs=1 / epochs, rel=0.05)


def test_cosine_after_warmup_is_stable_near_its_peak_then_decay() -> None:
    rates = applied(after_warmup(200, lambda o: sched.CosineAnnealingLR(o, 3800)), 4000)
    warm, stable, (phase, since) = timeline(rates)
    assert (warm, stable, phase) == (("warmup", 0), ("stable", 200), "decay")
    assert rates[since][0] / 1e-3 == pytest.approx(0.63, abs=0.03)


@pytest.mark.parametrize("epoch", [1, 40])
def test_inverse_square_root_never_decays(epoch: int) -> None:
    factor = scaled(lambda step: min(step / 5, (5 / max(step, 1)) ** 0.5))
    assert timeline(applied(factor, 4000, epoch=epoch)) == [("warmup", 0), ("stable", 5 * epoch)]


def test_one_cycle_warms_up_to_its_peak_then_anneals() -> None:
    warm, stable, (phase, since) = timeline(applied(lambda o: sched.OneCycleLR(o, 1e-3, 4000), 4000))
    assert (warm, stable, phase) == (("warmup", 0), ("stable", 1199), "decay")
    assert (since - 1199) / 2801 == pytest.approx(0.416, rel=0.05)


# --- steps, restarts, cycles -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "starts"),
    [
        (lambda o: sched.StepLR(o, 1000, 0.1), [0, 1000, 2000, 3000]),
        (lambda o: sched.StepLR(o, 500, 0.5), [0, 500, 1000, 1500, 2000, 2500, 3000, 3500]),
        (lambda o: sched.MultiStepLR(o, [2400, 3200, 3600], 0.1), [0, 2400, 3200, 3600]),
        (lambda o: sched.MultiStepLR(o, [3200, 3600, 3800], 0.2), [0, 3200, 3600, 3800]),
    ],
)
def test_every_plateau_of_a_step_decay_is_a_stable_segment(schedule: Any, starts: list[int]) -> None:
    assert timeline(applied(schedule, 4000)) == [("stable", start) for start in starts]


def test_small_drops_stay_in_their_segment() -> None:
    assert timeline(applied(lambda o: sched.MultiStepLR(o, [1000, 3000], 0.9), 4000)) == [("stable", 0)]


def test_a_deep_drop_after_a_small_one_is_still_a_step_decay() -> None:
    rates = [[1.0 if step < 1000 else 0.9 if step < 3000 else 0.09] for step in range(4000)]
    assert timeline(rates) == [("stable", 0), ("stable", 3000)]


def test_a_bump_that_comes_back_is_no_decay() -> None:
    rates = [[{1000: 1.05, 1001: 1.02}.get(step, 1.0)] for step in range(2000)]
    assert timeline(rates) == [("stable", 0)]


@pytest.mark.parametrize("factor", [0.1, 0.5])
def test_reduce_on_plateau_opens_a_segment_at_each_cut(factor: float) -> None:
    def never_better(optimizer: Optimizer) -> Any:
        scheduler = sched.ReduceLROnPlateau(optimizer, factor=factor, patience=9, threshold=0.0)
        scheduler.step(0.0)
        plain = scheduler.step
        scheduler.step = lambda: plain(1.0)  # type: ignore[method-assign,assignment]
        return scheduler

    rates = applied(never_better, 4000, epoch=100)
    cuts = [step for step in range(1, 4000) if rates[step] != rates[step - 1]]
    assert len(cuts) >= 3
    assert timeline(rates) == [("stable", start) for start in [0, *cuts]]


@pytest.mark.parametrize(("epoch", "cycle"), [(1, 1000), (50, 20), (200, 5)])
def test_each_warm_restart_is_a_new_stable_and_decay(epoch: int, cycle: int) -> None:
    rates = applied(lambda o: sched.CosineAnnealingWarmRestarts(o, cycle), 4000, epoch=epoch)
    found = timeline(rates)
    assert [phase for phase, _ in found] == ["stable", "decay"] * 4
    assert [since for _, since in found[::2]] == [0, 1000, 2000, 3000]
    assert all(350 <= since % 1000 <= 450 for _, since in found[1::2])


def test_triangular_cycles_turn_at_their_corners() -> None:
    found = timeline(applied(lambda o: sched.CyclicLR(o, 1e-4, 1e-3, 1000), 4000))
    assert [phase for phase, _ in found] == ["warmup", "stable", "decay"] * 2
    assert [since for phase, since in found if phase != "decay"] == [0, 1000, 2001, 3000]


def test_a_second_decay_is_found_after_a_restart_of_the_whole_schedule() -> None:
    cycle = [wsd(2000, 50, 400, "1-sqrt", 0.05)(step) for step in range(2000)]
    expected = [("warmup", 0), ("stable", 50), ("decay", 1601)]
    # The second cycle starts at a rate of zero, a deep drop, and rises from the step after it.
    again = [("warmup", 2001), ("stable", 2050), ("decay", 3601)]
    assert timeline(applied(scaled(lambda step: (cycle + cycle)[step % 4000]), 4000)) == expected + again


@pytest.mark.parametrize("ripple", [0.01, 0.04])
def test_ripple_does_not_flip_the_phase(ripple: float) -> None:
    noise = random.Random(0)
    rates = [[1e-3 * (1 + noise.uniform(-ripple, ripple))] for _ in range(4000)]
    assert set(read(rates, 4000)) == {("stable", 0)}


def test_rounding_noise_around_zero_is_no_warmup() -> None:
    factor = wsd(1600, 40, 400, "linear")
    rates = [[factor(step) if step < 1600 else (step % 7 - 3) * 1e-20] for step in range(2000)]
    assert timeline(rates) == [("warmup", 0), ("stable", 40), ("decay", 1201)]


def test_a_gentle_warmup_is_known_after_a_tenth_of_rise() -> None:
    labels = read(([0.5 + min(0.5, step / 1000)] for step in range(1000)), 1000)
    assert (known_at(labels, "warmup", 0), known_at(labels, "stable", 500)) == (50, 504)


# --- groups, bad numbers, state --------------------------------------------------------------------------


@pytest.mark.parametrize("lrs", [(1e-3, 1e-5), (1e-3, 0.0), (0.0, 0.02, 3e-4)])
def test_groups_of_one_shape_read_as_one_group(lrs: Sequence[float]) -> None:
    factor = scaled(wsd(2000, 100, 400, "cosine"))
    assert read(applied(factor, 2000, lrs=lrs), 2000) == read(applied(factor, 2000), 2000)


def test_the_group_with_the_parameters_decides() -> None:
    decaying, constant = wsd(2000, 100, 400, "linear"), 1.0
    detector = LRPhaseDetector(2000)
    for step in range(1900):
        detector.observe([constant, decaying(step)], weights=[10, 1_000_000])
    assert (detector.phase, detector.since) == (Phase.DECAY, 1601)
    assert detector.lr_ratio == pytest.approx(decaying(1899), abs=1e-4)  # the small group's share is 1e-5


def test_a_group_that_joins_with_a_small_rate_changes_nothing() -> None:
    rates = [[1e-3] if step < 300 else [1e-3, 5e-5] for step in range(1000)]
    assert timeline(rates) == [("stable", 0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rate_that_is_no_number_is_counted_but_not_read(bad: float) -> None:
    rates = [[wsd(2000, 100, 400, "linear")(step)] for step in range(2000)]
    for step in (50, 700, 1800):
        rates[step] = [bad]
    assert timeline(rates) == [("warmup", 0), ("stable", 100), ("decay", 1601)]


@pytest.mark.parametrize("total", [None, -1.5, math.inf])
def test_an_unknown_length_works_with_a_patience_of_100_steps(total: float | None) -> None:
    labels = read(applied(scaled(wsd(4000, 100, 400, "linear")), 4000), total)
    assert list(dict.fromkeys(labels)) == [("warmup", 0), ("stable", 100), ("decay", 3601)]
    assert known_at(labels, "stable", 100) == 199


def test_phases_are_strings_and_numbers() -> None:
    assert [(phase, phase.code) for phase in Phase] == [("warmup", 0), ("stable", 1), ("decay", 2)]


def test_lr_ratio_is_the_share_of_the_peak() -> None:
    detector = LRPhaseDetector()
    assert detector.lr_ratio == 0.0
    ratios = [detector.observe([lr, 10 * lr]) and detector.lr_ratio for lr in (0.0, 1e-4, 4e-4, 1e-4)]
    assert ratios == pytest.approx([0.0, 1.0, 1.0, 0.25])


RESUMED = {
    "wsd": scaled(wsd(600, 30, 200, "cosine", 0.1)),
    "restarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 200),
    "steps": lambda o: sched.StepLR(o, 150, 0.5),
}


@pytest.mark.parametrize("schedule", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("epoch", [1, 7])
def test_resuming_at_any_step_gives_the_labels_of_the_unbroken_run(schedule: Any, epoch: int) -> None:
    rates = applied(schedule, 600, epoch=epoch)
    expected, detector, labels = read(rates, 600), LRPhaseDetector(600), []
    for lrs in rates:
        saved = json.dumps(detector.state_dict(), allow_nan=False)
        detector = LRPhaseDetector(600)
        detector.load_state_dict(json.loads(saved))
        labels.append((detector.observe(lrs).value, detector.since))
    assert labels == expected


def test_the_state_stays_below_half_a_kilobyte() -> None:
    detector, factor = LRPhaseDetector(2000), wsd(2000, 50, 700, "cosine")
    for step in range(2000):
        detector.observe([factor(step)])
        assert len(json.dumps(detector.state_dict())) < 500


def test_a_loaded_state_is_a_copy() -> None:
    detector, twin = LRPhaseDetector(1000), LRPhaseDetector(1000)
    for step in range(700):
        detector.observe([wsd(1000, 50, 400, "cosine")(step)])
    state = detector.state_dict()
    twin.load_state_dict(state)
    twin.observe([1.0])
    assert detector.state_dict() == state


def warmups(rates: Iterable[float], total: float | None = 1000) -> list[Warmup]:
    """How the rate of each step was reached."""
    detector = LRPhaseDetector(total)
    return [detector.observe([rate]) and detector.warmup for rate in rates]


def warming_up(rates: Iterable[float]) -> list[int]:
    return [step for step, warmup in enumerate(warmups(rates)) if warmup is not Warmup.NONE]


RAMP = [i / 100 for i in range(1, 101)]


def test_a_warmup_is_over_where_the_phase_says_so():
    assert warming_up(RAMP + [1.0] * 20) == list(
        range(1, 99 + 4)
    )  # known at the fifth step without a new high


def test_a_rate_above_any_since_the_warmup_is_no_warmup():
    assert max(warming_up(RAMP + [1.0] * 100 + [1.05] * 5 + [30.0] * 5 + [1.0] * 300 + [2.0] * 300)) < 105


def test_a_rise_after_a_quarter_of_the_run_at_one_rate_is_no_warmup():
    assert warming_up([1.0] * 252 + [1000.0] * 20 + [1.0] * 100) == []
    stairs = [0.25] * 100 + [0.5] * 100 + [1.0] * 100  # a schedule stepped per epoch may begin so
    assert warming_up(stairs)[0] == 100


@pytest.mark.parametrize("top", [1.0, 0.5])
def test_a_restart_is_a_warmup_for_as_long_as_the_rate_stays_up(top):
    cosine = [top * 0.5 * (1 + math.cos(math.pi * i / 200)) for i in range(200)]
    assert [step for step in warming_up(RAMP + [1.0] * 50 + cosine + cosine) if step > 150] == [350]
    held = [top] * 100
    assert [step for step in warming_up(RAMP + cosine + held) if step > 150] == [300, 301, 302, 303]


# --- a first warmup, a return to a former rate, or a rate above any before ----------------------------------

FIRST, AGAIN, NONE = Warmup.FIRST, Warmup.AGAIN, Warmup.NONE


@pytest.mark.parametrize("total", [None, 10_000])
@pytest.mark.parametrize("times", [2, 25, 200])
def test_a_rise_from_the_first_rate_is_a_first_warmup_whatever_its_size(total, times):
    # Per-epoch stairs from 1e-6 to 1e-3 begin with a rise by 200; a mistake may look the same.
    found = warmups([1e-6] * 1200 + [times * 1e-6] * 100, total)
    assert found == [NONE] * 1200 + [FIRST] * 100


@pytest.mark.parametrize("total", [None, 10_000, 100_000])
@pytest.mark.parametrize(
    "falling",
    [
        lambda step: 0.5 * (1 + math.cos(math.pi * step / 10_000)),
        lambda step: (1 + step / 100) ** -0.5,
        lambda step: 1 - step / 10_000,
        lambda step: 0.5 ** (step // 300),
    ],
    ids=["cosine", "inverse square root", "linear", "halved"],
)
def test_above_all_rates_of_a_fall_without_a_warmup_there_is_none(total, falling):
    rates = [falling(step) for step in range(1000)]
    assert set(warmups(rates + [25.0] * 20, total)) == {NONE}
    assert FIRST not in warmups(rates + [1.0] * 20, total)  # a restart


def test_a_first_warmup_ends_where_the_rate_falls_back():
    assert warmups([1.0] * 100 + [25.0] * 40 + [1.0] * 40, None) == [NONE] * 100 + [FIRST] * 40 + [NONE] * 40


def test_a_cycle_is_a_first_warmup_then_a_return():
    rates = [rate for (rate,) in applied(lambda o: sched.CyclicLR(o, 1e-4, 1e-3, 500), 2000)]
    found = warmups(rates, None)
    assert set(found[60:500]) == {FIRST}  # the first tenth of rise may be ripple
    assert {AGAIN} <= set(found[1000:1500]) <= {AGAIN, NONE}
