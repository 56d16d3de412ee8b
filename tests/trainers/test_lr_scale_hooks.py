"""Scaled learning rates beside closures, hooks, steps and exceptions of other people."""

import pytest
import torch
from scaled_training import Training
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from merge_callback.recovery.lr_scale import LRScale

# --- what the user may do in between ----------------------------------------------------------------------


def test_a_rate_that_is_set_in_the_closure_is_the_one_that_is_scaled_and_stays():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=1.0)
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 4, 1.0)

    def closure():
        weight.grad = torch.ones(1)
        optimizer.param_groups[0]["lr"] *= 0.5

    optimizer.step(closure)
    assert (weight.item(), optimizer.param_groups[0]["lr"]) == (-0.125, 0.5)


def test_hooks_of_all_optimizers_see_the_schedule():
    weight, seen = nn.Parameter(torch.zeros(1)), []
    optimizer = SGD([weight], lr=1.0)
    handles = [
        register(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    try:
        LRScale([optimizer], lambda: 0).rewarm(0, 10, 1.0)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [1.0, 1.0]


def test_a_schedule_that_lives_in_the_optimizers_own_hooks_never_notices():
    weight, seen = nn.Parameter(torch.zeros(1)), []
    optimizer = SGD([weight], lr=1.0)

    def halve(optimizer, *_):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] *= 0.5

    optimizer.register_step_post_hook(halve)
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 4, 1.0)
    weight.grad = torch.ones(1)
    for _ in range(3):
        optimizer.step()
    assert seen == [1.0, 0.5, 0.25]
    assert weight.item() == -(1.0 + 0.5 + 0.25) / 4


def test_the_closures_result_comes_through():
    training = Training()
    training.lr.rewarm(0, 10, 1.0)
    optimizer = training.optimizers[0]
    assert optimizer.step(training.close_over(optimizer)) == 0.0
    assert optimizer.step(closure=None) is None


def test_a_group_that_is_added_later_is_scaled_too():
    training = Training(groups=1)
    training.lr.rewarm(0, 10, 1.0)
    training.step()
    added = nn.Parameter(torch.zeros(()))
    training.optimizers[0].add_param_group({"params": [added], "lr": 1.0})
    training.step()
    assert added.item() == pytest.approx(-0.2)  # fp32
    assert training.rates() == [[0.1, 1.0]]


class Inherited(Adam):
    """Steps by the step of a class whose step torch may have given hooks, too."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("how", ["keyword", "positional", "no closure"])
def test_a_step_within_a_step_is_scaled_once(how):
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    plain, inherited = Adam([weights[0]], lr=0.5), Inherited([weights[1]], lr=0.5)
    assert Adam.step.hooked
    assert Inherited.step.hooked
    lr = LRScale([plain, inherited], lambda: 0)
    lr.rewarm(0, 10, 1.0)
    for optimizer, weight in zip((plain, inherited), weights, strict=True):
        weight.grad = torch.ones(())
        arguments = {"keyword": ((), {"closure": lambda: 1}), "positional": ((lambda: 1,), {})}
        args, kwargs = arguments.get(how, ((), {}))
        optimizer.step(*args, **kwargs)
    assert weights[0].item() == weights[1].item() == pytest.approx(-0.05)  # fp32
    assert [o.param_groups[0]["lr"] for o in (plain, inherited)] == [0.5, 0.5]


class WithArguments(SGD):
    def step(self, closure, times):
        loss = closure()
        for _ in range(times):
            super().step()
        return loss


@pytest.mark.parametrize("call", [lambda o, c: o.step(c, 2), lambda o, c: o.step(c, times=2)])
def test_other_arguments_of_a_step_come_through(call):
    weight = nn.Parameter(torch.zeros(()))
    optimizer = WithArguments([weight], lr=1.0)
    weight.grad = torch.ones(())
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 0, 0.25)
    assert call(optimizer, lambda: 7) == 7
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert weight.item() < 0


def test_a_closure_that_is_called_several_times_always_sees_the_schedule():
    weight, seen = nn.Parameter(torch.ones(1)), []
    optimizer = LBFGS([weight], lr=0.5, max_iter=4)
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 10, 1.0)

    def closure():
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        seen.append(optimizer.param_groups[0]["lr"])
        return loss

    optimizer.step(closure)
    assert len(seen) > 2
    assert {*seen, optimizer.param_groups[0]["lr"]} == {0.5}


# --- exceptions -------------------------------------------------------------------------------------------


class Failing(SGD):
    fails = True

    def step(self, closure=None):
        if closure is not None:
            closure()
        if self.fails:
            raise RuntimeError("out of memory")
        return SGD.step(self)


def fail(optimizer, closure=None):
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure=closure)


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("closure", [None, lambda: 1.0])
def test_a_step_that_raises_leaves_no_scaled_rate_behind(closure, rate):
    weight = nn.Parameter(torch.zeros(()))
    optimizer = Failing([weight], lr=rate)
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 10, 1.0)
    fail(optimizer, closure)
    fail(optimizer, closure)  # nor do two
    lr.close()
    assert optimizer.param_groups[0]["lr"] == 0.5
    lr.close()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_run_that_goes_on_after_a_failed_step_is_scaled_once():
    weight = nn.Parameter(torch.zeros(()))
    optimizer = Failing([weight], lr=0.5)
    lr = LRScale([optimizer], lambda: 0)
    lr.rewarm(0, 10, 1.0)
    fail(optimizer)
    optimizer.fails, weight.grad = False, torch.ones(())
    optimizer.step()
    assert weight.item() == pytest.approx(-0.05)  # fp32
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_closure_that_raises_leaves_the_rate_alone():
    training = Training(groups=1)
    training.lr.rewarm(0, 10, 1.0)

    def closure():
        raise RuntimeError("out of memory")

    fail(training.optimizers[0], closure)
    assert training.rates() == [[0.1]]
    assert training.step()[0][0] == pytest.approx(0.01, rel=1e-12)
