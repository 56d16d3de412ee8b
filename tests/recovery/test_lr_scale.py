"""Scaled learning rates: each update is smaller, and no scheduler, hook or closure ever notices."""

import json
from itertools import product

import pytest
import torch
from scaled_training import Training
from slow_cases import mostly_slow
from torch import nn
from torch.optim import SGD, lr_scheduler

from merge_callback.recovery.lr_scale import LRScale

STEPS = 24


def chained(o):
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ExponentialLR(o, 0.9),
            lr_scheduler.ConstantLR(o, 0.5, 10),
            lr_scheduler.StepLR(o, 3, 0.7),
        ]
    )


def sequential(o):
    ramp, cosine = lr_scheduler.LinearLR(o, 0.1, 1.0, 6), lr_scheduler.CosineAnnealingLR(o, 12)
    return lr_scheduler.SequentialLR(o, [ramp, cosine, lr_scheduler.ExponentialLR(o, 0.8)], [6, 16])


SCHEDULES = {
    "none": None,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 9], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 12),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 15),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "CyclicLR momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=8),
}


def run(training, rewarm_at=None, steps=STEPS, lasting=0.5, ramp=10, how="keyword"):
    """The schedule's rates and the updates of each step, and the factor of each."""
    rates, moves, factors = [], [], []
    for step in range(steps):
        if step == rewarm_at:
            training.lr.rewarm(training.steps, ramp, lasting)
        factors.append(training.lr.factor(training.steps))
        rates.append(
            (
                training.rates(),
                [[dict(g, params=0, lr=0) for g in o.param_groups] for o in training.optimizers],
            )
        )
        moves.append(training.step(how))
    return rates, moves, factors


@pytest.mark.parametrize(
    ("tensor_lr", "how", "schedule"),
    # All schedules, with a rate that is a float; the tensor, and the other calls, with every third of them.
    mostly_slow(
        product([False, True], ["keyword", "positional", "no closure"], SCHEDULES),
        daily=[*range(len(SCHEDULES)), *range(len(SCHEDULES), 6 * len(SCHEDULES), 3)],
    ),
)
def test_the_schedule_is_bitwise_that_of_a_run_without_and_the_update_is_scaled(schedule, tensor_lr, how):
    momentum = {"momentum": 0.9} if schedule in ("CyclicLR momentum", "OneCycleLR") else {}
    plain, scaled = (Training(SCHEDULES[schedule], tensor_lr=tensor_lr, **momentum) for _ in range(2))
    (rates, moves, _), (kept, smaller, factors) = run(plain, how=how), run(scaled, rewarm_at=5, how=how)
    assert kept == rates  # momentum and all else that is cycled, too
    assert scaled.seen == plain.seen  # what the closure saw
    assert factors == [1.0] * 5 + [0.5 * min(1.0, n / 10) for n in range(1, STEPS - 4)]
    for normal, small, factor in zip(moves, smaller, factors, strict=True):
        # The update is the difference of two weights: what is lost is their rounding, some 1e-16 of about 1.
        expected = factor * torch.tensor(normal, dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(small, dtype=torch.float64), expected, rtol=1e-12, atol=1e-14)


def test_the_ramp_is_linear_from_the_step_after_and_ends_at_the_lasting_factor():
    training = Training()
    training.lr.rewarm(100, 4, 0.5)
    assert [training.lr.factor(step) for step in range(100, 107)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]


def test_without_a_re_warm_up_the_lasting_factor_holds_at_once():
    training = Training(groups=1)
    training.lr.rewarm(0, 0, 0.25)
    assert [training.step()[0][0] for _ in range(3)] == pytest.approx([0.025] * 3, rel=1e-12)
    training.lr.rewarm(3, 0, 1.0)
    assert training.step()[0][0] == pytest.approx(0.1, rel=1e-12)
    assert training.hooks() == 0


def test_hooks_are_there_only_while_there_is_something_to_scale():
    training = Training(optimizers=2)
    run(training, steps=2)
    assert training.hooks() == 0
    training.lr.rewarm(training.steps, 6, 1.0)
    counts = []
    for _ in range(5):
        counts.append(training.hooks())
        training.step()
    assert counts == [4, 4, 4, 0, 0]  # two optimizers: six steps are three times both


def test_a_lasting_factor_keeps_them():
    training = Training()
    run(training, rewarm_at=0, steps=20, lasting=0.5)
    assert training.hooks() == 2
    training.lr.close()
    assert training.hooks() == 0


def test_a_second_re_warm_up_begins_again_with_one_set_of_hooks():
    training = Training(groups=1)
    training.lr.rewarm(0, 10, 1.0)
    first = [training.step()[0][0] for _ in range(3)]
    training.lr.rewarm(3, 2, 0.5)
    assert training.hooks() == 2
    second = [training.step()[0][0] for _ in range(3)]
    assert first + second == pytest.approx([0.01, 0.02, 0.03, 0.025, 0.05, 0.05], rel=1e-12)


def test_one_tensor_shared_by_several_groups_is_scaled_once():
    rate = torch.tensor(0.5)
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = SGD([{"params": [w], "lr": rate} for w in weights])
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 4, 1.0)
    for w in weights:
        w.grad = torch.ones(1)
    optimizer.step()
    assert [w.item() for w in weights] == [-0.125] * 3
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert rate.item() == 0.5


# --- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lasting", [1.0, 0.5])
def test_a_resume_at_any_step_goes_on_exactly(lasting):
    unbroken, resumed = (Training(SCHEDULES["CosineAnnealingLR"]) for _ in range(2))
    for step in range(STEPS):
        if step == 4:
            for training in (unbroken, resumed):
                training.lr.rewarm(step, 10, lasting)
        assert resumed.step() == unbroken.step()
        state = json.loads(json.dumps(resumed.lr.state_dict()))
        resumed.lr.close()
        resumed.lr = LRScale(resumed.optimizers, lambda: resumed.steps)
        resumed.lr.load_state_dict(state)
        assert resumed.lr.state_dict() == unbroken.lr.state_dict()
        assert resumed.hooks() == unbroken.hooks()
