"""Resets or scales an optimizer's state in place, after its weights were replaced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import (
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
    SparseAdam,
)

from merge_callback.recovery.schedule_free import is_schedule_free
from merge_callback.sharding import local
from merge_callback.snapshots.arena import all_finite

_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "step": 0}

_MOMENTS: dict[type[Optimizer], dict[str, int]] = {
    SGD: {"momentum_buffer": 1},
    Adam: _ADAM,
    AdamW: _ADAM,
    NAdam: {**_ADAM, "mu_product": 0},
    RAdam: _ADAM,
    SparseAdam: _ADAM,
    Adamax: {"exp_avg": 1, "exp_inf": 1, "step": 0},
    Adagrad: {"sum": 2, "step": 0},
    Adadelta: {"square_avg": 2, "acc_delta": 0, "step": 0},
    RMSprop: {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0, "step": 0},
    Adafactor: {"row_var": 2, "col_var": 2, "variance": 2, "step": 0},
}
"""Every entry of an optimizer's state, with the power of the gradient that it is proportional to."""

if hasattr(torch.optim, "Muon"):
    _MOMENTS[torch.optim.Muon] = {"momentum_buffer": 1}


_SCHEDULE_FREE = {"z": 0, "exp_avg_sq": 2}
_SCHEDULE_FREE_COUNTERS = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}


def is_known(optimizer: object) -> bool:
    """Whether this optimizer's state can be reset: its ``step`` is that of a known class in ``torch.optim``.

    Classes whose state is not a set of moments are not known (LBFGS, Rprop, ASGD).
    """
    return _moments(optimizer) is not None


@torch.no_grad()
def reset(optimizer: Optimizer) -> None:
    """Sets all state, including ``step``, to its initial values, in place.

    In place, because clearing ``optimizer.state`` is unsafe together with distributed checkpointing. With
    ``step``, because Adam's bias correction would otherwise make the first update (1−β1)/√(1−β2) times a
    normal one: 3.2 times at β2 = .999.

    Raises:
        ValueError: if there is state that this kind of optimizer does not have.
    """
    _scale(optimizer, 0.0)


@torch.no_grad()
def scale(optimizer: Optimizer, factor: float) -> None:
    """Shrinks the moments in place as if all gradients so far had been ``factor`` times as large.

    First moments are multiplied by ``factor``, second ones by its square; ``step`` stays.

    Raises:
        ValueError: if there is state that this kind of optimizer does not have.
    """
    _scale(optimizer, factor)


def is_finite(optimizer: Optimizer) -> bool:
    """Whether all of an optimizer's state is finite; of sharded state, this rank's part."""
    values = (v for state in optimizer.state.values() for v in state.values())
    tensors = [local(v) for v in values if isinstance(v, Tensor)]
    dense = (t.coalesce().values() if t.is_sparse else t for t in tensors)
    return all(map(all_finite, dense))


def _moments(optimizer: object) -> Mapping[str, int] | None:
    # Compares the function, not the class: a subclass with its own step() may keep anything as state.
    step = inspect.unwrap(type(optimizer).step) if isinstance(optimizer, Optimizer) else None
    if is_schedule_free(optimizer) and getattr(step, "__module__", "").startswith("schedulefree."):
        return _SCHEDULE_FREE
    return next((found for kind, found in _MOMENTS.items() if inspect.unwrap(kind.step) is step), None)


def _scale(optimizer: Optimizer, factor: float) -> None:
    """Scales all moments; a factor of 0 sets everything to its initial values."""
    powers = _moments(optimizer)
    if powers is None:
        raise ValueError(f"the state of {type(optimizer).__name__} is not known")
    entries = [
        (state, name, _initial(optimizer, name), powers.get(name))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter)) is not None
        for name in state
    ]
    if strange := sorted({name for _, name, _, power in entries if power is None}):
        raise ValueError(f"{type(optimizer).__name__} keeps {strange}, which is not known")
    if factor == 0 and powers is _SCHEDULE_FREE:
        for group in optimizer.param_groups:
            group.update({name: value for name, value in _SCHEDULE_FREE_COUNTERS.items() if name in group})
    for state, name, initial, power in entries:
        value = state[name]
        if name == "z" and powers is _SCHEDULE_FREE:
            continue  # no moment: it is set to the restored weights
        if factor == 0 and isinstance(value, Tensor):
            value.fill_(initial) if initial else value.zero_()  # a sparse one (SGD's) only takes zeros
        elif factor == 0 and value is not None:
            state[name] = type(value)(initial)
        elif power and isinstance(value, Tensor):
            value.mul_(factor**power)


def _initial(optimizer: Optimizer, name: str) -> float:
    if name == "mu_product":  # a product of momenta
        return 1.0
    # Adagrad's, which uses the default even if a group names another value.
    return float(optimizer.defaults.get("initial_accumulator_value", 0.0)) if name == "sum" else 0.0
