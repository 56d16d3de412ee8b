"""That a module's tensors are found once, and found again whenever it holds others."""

import pytest
import torch
from torch import nn

from merge_callback.snapshots.capture import LiveModel, ModelTensors


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=i < 1) for i in range(3))
        self.head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("mask", torch.ones(3))


def new_parameter():
    return nn.Parameter(torch.randn(3, 3))


def bias_instead_of_none(model):
    model.layers[1].bias = nn.Parameter(torch.zeros(3))


def another_instead_of_none(model):
    del model.layers[1]._parameters["bias"]
    model.layers[1].gain = nn.Parameter(torch.zeros(3))


def rename(model):
    weight = model.layers[1].weight
    del model.layers[1].weight
    model.layers[1].kernel = weight


def move_to_the_next_module(model):
    model.layers[2]._parameters |= model.layers[1]._parameters
    model.layers[1]._parameters.clear()


def rebind(model):
    model.layers[1].__dict__["_parameters"] = {"weight": new_parameter()}


def turn(model):
    model.layers[0].weight.data = torch.randn(3, 5).T


CHANGES = {
    "a parameter is replaced": lambda m: setattr(m.layers[0], "weight", new_parameter()),
    "a parameter is replaced behind the module's back": lambda m: m.layers[0]._parameters.update(
        weight=new_parameter()
    ),
    "what holds the parameters is replaced": rebind,
    "a parameter is added": lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "a parameter is removed": lambda m: delattr(m.layers[0], "bias"),
    "a parameter is renamed": rename,
    "a parameter is moved": move_to_the_next_module,
    "a bias is added": bias_instead_of_none,
    "one comes for none": another_instead_of_none,
    "data is replaced": lambda m: setattr(m.layers[0].weight, "data", torch.randn(3, 3)),
    "the shape changes": turn,
    **(
        IN_PLACE := {
            "data of another shape comes": lambda m: setattr(m.layers[0].weight, "data", torch.randn(5, 3)),
            "data of another dtype comes": lambda m: setattr(
                m.layers[0].bias, "data", torch.randn(3).double()
            ),
            "the whole module is converted": lambda m: m.to(torch.bfloat16),
            "a tensor is set to another": lambda m: torch.no_grad()(m.layers[0].weight.set_)(
                torch.randn(6, 3)
            ),
            "a buffer grows": lambda m: m.mask.resize_(7),
            "a buffer loses a dimension": lambda m: m.head[1].running_mean.squeeze_().resize_(()),
        }
    ),
    "two parameters change places": lambda m: torch.utils.swap_tensors(
        m.layers[0].weight, m.layers[1].weight
    ),
    "a parameter is tied": lambda m: setattr(m.head[0], "weight", m.layers[0].weight),
    "a parameter is frozen": lambda m: m.layers[0].weight.requires_grad_(False),
    "a module is added": lambda m: m.layers.append(nn.Linear(2, 2)),
    "a module is removed": lambda m: m.layers.__delitem__(1),
    "a module is replaced": lambda m: m.head.__setitem__(0, nn.Linear(3, 3)),
    "a buffer is replaced": lambda m: setattr(m, "mask", torch.zeros(3)),
    "a buffer is no longer saved": lambda m: m.register_buffer("mask", m.mask, persistent=False),
}


def described(model):
    places = {n: (t.data_ptr(), t.shape, t.stride(), t.dtype) for n, t in model.tensors.items()}
    return list(places), places, model.tied, model.frozen, model.buffers


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_look_sees_what_a_walk_sees(change):
    module = Model()
    live = LiveModel(module)
    before = live.tensors()
    frozen = set(before.frozen)
    change(module)
    found, looked = ModelTensors.of(module), live.tensors()
    assert described(looked) == described(found)
    assert looked.names == found.names
    assert before.frozen == frozen  # it may be in use in the background


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_a_look_at_tensors_of_other_shapes_or_dtypes_gives_another_object(change):
    module = Model()
    live = LiveModel(module)
    before = live.tensors()
    change(module)
    assert live.tensors() is not before
    assert live.tensors() is live.tensors()


def test_a_module_that_is_what_it_was_is_not_walked_again(monkeypatch):
    module = Model()
    live = LiveModel(module)
    before = live.tensors()
    with torch.no_grad():
        module.layers[0].weight.add_(1)
    monkeypatch.setattr(ModelTensors, "of", None)
    assert live.tensors() is before
    assert torch.equal(before.tensors["layers.0.weight"], module.layers[0].weight)


def test_what_can_not_be_found_is_not_taken_for_what_was_there():
    module = Model()
    live = LiveModel(module)
    live.tensors()
    module.meta = nn.Linear(3, 3, device="meta")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'meta.weight'.*materialise"):
            live.tensors()
    del module.meta
    assert described(live.tensors()) == described(ModelTensors.of(module))


def test_a_lazy_parameter_is_found_once_it_has_a_shape():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    live = LiveModel(module)
    assert [*live.tensors().tensors] == ["0.weight", "0.bias"]
    module(torch.ones(1, 2))
    assert described(live.tensors()) == described(ModelTensors.of(module))
    assert live.tensors() is live.tensors()


def test_a_module_of_torchscript_is_walked_each_time():
    module = Model()
    module.scripted = torch.jit.script(nn.Linear(2, 2))
    live = LiveModel(module)
    live.tensors()
    module.head[0] = nn.Linear(3, 3)
    assert described(live.tensors())[1:] == described(ModelTensors.of(module))[1:]
