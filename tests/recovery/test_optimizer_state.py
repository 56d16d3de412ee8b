"""Set back in place, every optimizer goes on as a fresh one would, bit for bit."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
    lr_scheduler,
)

from merge_callback.recovery.optimizer_state import is_finite, is_known, reset, scale

VARIANTS = {
    "SGD": (SGD, {}),
    "SGD momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "SGD fused": (SGD, {"momentum": 0.9, "fused": True}),
    "Adam": (Adam, {}),
    "Adam amsgrad": (Adam, {"amsgrad": True, "maximize": True}),
    "Adam foreach": (Adam, {"foreach": True, "amsgrad": True}),
    "Adam fused": (Adam, {"fused": True, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "AdamW fused": (AdamW, {"fused": True}),
    "AdamW tensor lr": (AdamW, {"lr": torch.tensor(0.01)}),
    "NAdam": (NAdam, {}),
    "NAdam foreach": (NAdam, {"foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (RAdam, {"maximize": True}),
    "RAdam foreach": (RAdam, {"foreach": True}),
    "Adamax": (Adamax, {}),
    "Adamax foreach": (Adamax, {"foreach": True}),
    "Adagrad": (Adagrad, {"lr_decay": 0.1}),
    "Adagrad from 0.5": (Adagrad, {"initial_accumulator_value": 0.5, "foreach": True}),
    "Adagrad fused": (Adagrad, {"fused": True, "initial_accumulator_value": 0.5}),
    "Adadelta": (Adadelta, {}),
    "Adadelta foreach": (Adadelta, {"foreach": True, "maximize": True}),
    "RMSprop": (RMSprop, {}),
    "RMSprop centered": (RMSprop, {"centered": True, "momentum": 0.9}),
    "RMSprop foreach": (RMSprop, {"centered": True, "momentum": 0.9, "foreach": True}),
    "Adafactor": (Adafactor, {}),
    "Adafactor foreach": (Adafactor, {"foreach": True, "maximize": True}),
}
if hasattr(torch.optim, "Muon"):
    VARIANTS["Muon"] = (torch.optim.Muon, {})


def parameters(kind):
    torch.manual_seed(0)
    shapes = [(5, 4), (4, 4)] + ([] if kind.__name__ == "Muon" else [(4,), ()])  # Muon takes matrices only
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def take_steps(optimizer, seed, steps=1, times=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = times * torch.randn(p.shape, generator=generator)
        optimizer.step()


def fresh_twin(optimizer, kind, options):
    """An optimizer that begins, on the same weights, with what this one has come to."""
    copies = [nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    return kind(copies, **options), copies


def state_tensors(optimizer):
    return {
        (i, name): value
        for i, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_after_a_reset_the_updates_are_those_of_a_fresh_optimizer(variant):
    kind, options = VARIANTS[variant]
    weights = parameters(kind)
    optimizer = kind(weights, **options)
    assert is_known(optimizer)
    take_steps(optimizer, seed=1, steps=7)
    where = {key: value.data_ptr() for key, value in state_tensors(optimizer).items()}
    reset(optimizer)
    assert {key: value.data_ptr() for key, value in state_tensors(optimizer).items()} == where  # in place
    fresh, copies = fresh_twin(optimizer, kind, options)
    for seed in (2, 3, 4):
        for one in (optimizer, fresh):
            take_steps(one, seed)
        assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
    ours, theirs = state_tensors(optimizer), state_tensors(fresh)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reset_leaves_nothing_of_a_nan(variant, bad):
    kind, options = VARIANTS[variant]
    optimizer = kind(parameters(kind), **options)
    take_steps(optimizer, seed=1, steps=2)
    assert is_finite(optimizer)
    tensors = state_tensors(optimizer)
    for key, value in tensors.items():
        kept = value.clone()
        value.view(-1)[-1] = bad
        assert not is_finite(optimizer), key
        value.copy_(kept)
    for value in tensors.values():
        value.fill_(bad)
    reset(optimizer)
    assert is_finite(optimizer)
    fresh, _ = fresh_twin(optimizer, kind, options)
    for one in (optimizer, fresh):
        take_steps(one, seed=3)
    ours, theirs = state_tensors(optimizer), state_tensors(fresh)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_with_dampening_the_first_update_after_a_reset_is_dampened_too():
    # torch takes the very first gradient whole; the buffer that is there after a reset dampens it.
    weights = parameters(SGD)
    optimizer = SGD(weights, lr=1.0, momentum=0.9, dampening=0.75)
    take_steps(optimizer, seed=1, steps=3)
    reset(optimizer)
    before = [w.detach().clone() for w in weights]
    take_steps(optimizer, seed=2)
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old - 0.25 * weight.grad)  # rounding only


def test_a_reset_before_the_first_step_and_of_groups_that_never_stepped():
    used, unused = parameters(Adam)[:2]
    optimizer = Adam([{"params": [used]}, {"params": [unused]}])
    reset(optimizer)
    used.grad = torch.ones_like(used)
    optimizer.step()
    reset(optimizer)
    assert list(optimizer.state) == [used]
    assert is_finite(optimizer)


def test_every_group_of_adagrad_starts_from_the_default_as_in_torch():
    first, second = parameters(Adagrad)[:2]
    groups = [{"params": [first]}, {"params": [second], "initial_accumulator_value": 0.5}]
    optimizer = Adagrad(groups, initial_accumulator_value=0.25)
    fresh = [optimizer.state[p]["sum"].clone() for p in (first, second)]
    take_steps(optimizer, seed=1)
    reset(optimizer)
    assert all(torch.equal(optimizer.state[p]["sum"], f) for p, f in zip((first, second), fresh, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, in Adagrad
@pytest.mark.parametrize("kind", [SparseAdam, Adagrad, functools.partial(SGD, momentum=0.9)])
def test_optimizers_of_sparse_gradients_are_reset_alike(kind):
    def step(embedding, optimizer, tokens):
        optimizer.zero_grad()
        embedding(torch.tensor(tokens)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    embedding = nn.Embedding(8, 3, sparse=True)
    optimizer = kind(embedding.parameters(), lr=0.01)
    for tokens in ([1, 1, 2], [3, 1]):
        step(embedding, optimizer, tokens)
    assert is_known(optimizer)
    assert is_finite(optimizer)
    reset(optimizer)
    twin = nn.Embedding(8, 3, sparse=True, _weight=embedding.weight.detach().clone())
    fresh = kind(twin.parameters(), lr=0.01)
    for tokens in ([1, 4], [2, 3, 3]):
        step(embedding, optimizer, tokens)
        step(twin, fresh, tokens)
        assert torch.equal(embedding.weight, twin.weight)


def test_a_step_count_that_is_a_number_as_in_old_checkpoints_is_reset():
    optimizer = Adam([nn.Parameter(torch.ones(2))])
    take_steps(optimizer, seed=1)
    (state,) = optimizer.state.values()
    state["step"] = 7
    reset(optimizer)
    assert state["step"] == 0
    assert type(state["step"]) is int


# --- scale ------------------------------------------------------------------------------------------------


MOMENTS = {  # what the gradients have gone into; all else is as it was
    "SGD momentum": {"momentum_buffer"},
    "Adam amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "AdamW": {"exp_avg", "exp_avg_sq"},
    "NAdam": {"exp_avg", "exp_avg_sq"},
    "RAdam": {"exp_avg", "exp_avg_sq"},
    "Adamax": {"exp_avg", "exp_inf"},
    "Adagrad": {"sum"},
    "Adadelta": {"square_avg"},
    "RMSprop centered": {"square_avg", "grad_avg"},
    "Adafactor": {"row_var", "col_var", "variance"},
    "Muon": {"momentum_buffer"},
}


@pytest.mark.parametrize("variant", [v for v in MOMENTS if v in VARIANTS])
@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_scaled_moments_are_those_of_gradients_that_were_as_much_larger(variant, factor):
    kind, options = VARIANTS[variant]
    options = {**options, "weight_decay": 0.0, "lr": 1e-12}  # the weights stay: all there is are gradients
    optimizer, twin = (kind(parameters(kind), **options) for _ in range(2))
    take_steps(optimizer, seed=1, steps=5)
    take_steps(twin, seed=1, steps=5, times=factor)
    before = {key: value.clone() for key, value in state_tensors(optimizer).items()}
    scale(optimizer, factor)
    for key, value in state_tensors(optimizer).items():
        if key[1] in MOMENTS[variant]:
            # Powers of two scale exactly; Adamax's and Adafactor's epsilons, about 1e-8 of it, don't scale.
            torch.testing.assert_close(value, state_tensors(twin)[key], rtol=1e-6, atol=1e-7)
            assert not torch.equal(value, before[key])
        else:
            assert torch.equal(value, before[key])


# --- what is known ----------------------------------------------------------------------------------------


class SameStep(AdamW):
    pass


class OwnStep(Adam):
    def step(self, closure=None):
        return super().step(closure)


class Foreign(Optimizer):
    def step(self, closure=None):
        return None


def test_what_keeps_no_moments_or_has_a_step_of_its_own_is_not_known():
    weights = [nn.Parameter(torch.ones(2))]
    for kind in (LBFGS, Rprop, ASGD, OwnStep):
        assert not is_known(kind(weights)), kind
        assert not is_known(kind(weights)), kind  # nor once torch has wrapped the class's step
    assert not is_known(Foreign(weights, {"lr": 0.1}))
    assert not is_known(object())
    assert not is_known(None)


def test_a_subclass_that_leaves_the_step_alone_is_known():
    optimizer = SameStep([nn.Parameter(torch.ones(2))])
    assert is_known(optimizer)
    take_steps(optimizer, seed=1)
    reset(optimizer)
    assert all(not bool(t.any()) for t in state_tensors(optimizer).values())


@pytest.mark.parametrize("kind", [SGD, AdamW, SameStep])
def test_a_scheduler_that_wraps_the_step_hides_nothing(kind):
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 5)]
    take_steps(optimizer, seed=1)
    for scheduler in schedulers:
        scheduler.step()
    assert is_known(optimizer)
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    assert is_known(optimizer)
    handle.remove()


@pytest.mark.parametrize("name", ["shadow", "sum", "step_size"])
def test_state_that_is_not_known_is_refused_before_anything_is_touched(name):
    optimizer = Adam(parameters(Adam))
    take_steps(optimizer, seed=1)
    list(optimizer.state.values())[-1][name] = torch.ones(2)
    before = {key: value.clone() for key, value in state_tensors(optimizer).items()}
    for change in (reset, lambda o: scale(o, 0.5)):
        with pytest.raises(ValueError, match=f"Adam keeps .*{name}.*not known"):
            change(optimizer)
    assert all(torch.equal(before[key], value) for key, value in state_tensors(optimizer).items())


def test_an_optimizer_that_is_not_known_is_refused():
    optimizer = Rprop([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="Rprop is not known"):
        reset(optimizer)
