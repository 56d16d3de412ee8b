"""Layouts, arenas, and which tensors of a module a snapshot holds."""

import pytest
import torch
from torch import nn

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors, clean_name
from merge_callback.snapshots.layout import Layout


def mixed_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, 3, generator=generator).bfloat16(),
        "weight": torch.randn(5, 7, generator=generator),
        "count": torch.tensor(7),
        "precise": torch.randn(3, generator=generator, dtype=torch.float64),
        "bias": torch.randn(3, generator=generator),
        "empty": torch.empty(0, 4),
    }


def test_what_goes_into_an_arena_comes_out_bit_for_bit():
    tensors = mixed_tensors()
    arena = Arena.empty(Layout.of(tensors))
    arena.copy_from(tensors)
    restored = {name: torch.zeros_like(t) for name, t in tensors.items()}
    arena.copy_to(restored)
    assert all(torch.equal(restored[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("float_dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_every_tensor_is_aligned_and_no_byte_is_wasted(float_dtype):
    tensors = mixed_tensors()
    layout = Layout.of(tensors, float_dtype)
    arena = Arena.empty(layout)
    for name, view in arena.tensors().items():
        assert view.data_ptr() % view.itemsize == 0, name
    sizes = {n: (float_dtype or t.dtype) if t.is_floating_point() else t.dtype for n, t in tensors.items()}
    assert layout.nbytes == sum(t.numel() * sizes[n].itemsize for n, t in tensors.items())


def test_snapshot_dtype_changes_floats_only_and_native_undoes_it():
    tensors = mixed_tensors()
    layout = Layout.of(tensors, torch.bfloat16)
    stored = Arena.empty(layout).tensors()
    assert {n: t.dtype for n, t in stored.items() if not t.is_floating_point()} == {
        "flag": torch.bool,
        "count": torch.int64,
    }
    assert all(t.dtype == torch.bfloat16 for t in stored.values() if t.is_floating_point())
    native = Arena.empty(layout.native).tensors()
    assert {n: t.dtype for n, t in native.items()} == {n: t.dtype for n, t in tensors.items()}
    assert layout.native.hash == Layout.of(tensors).hash


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(weight=torch.zeros(7, 5)),
        lambda t: t.update(weight=t["weight"].half()),
        lambda t: t.update(new=t.pop("weight")),
        lambda t: t.update(weight=t.pop("weight")),
    ],
    ids=["shape", "dtype", "name", "order"],
)
def test_the_hash_tells_layouts_apart(change):
    tensors = mixed_tensors()
    before = Layout.of(tensors).hash
    change(tensors)
    assert Layout.of(tensors).hash != before


def test_nan_and_inf_are_named():
    tensors = mixed_tensors()
    arena = Arena.empty(Layout.of(tensors))
    arena.copy_from(tensors)
    assert arena.non_finite() == []
    arena.tensors()["bias"][1] = float("nan")
    arena.tensors()["half"][2, 2] = float("-inf")
    assert sorted(arena.non_finite()) == ["bias", "half"]


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [("w", torch.zeros(2, dtype=torch.complex128), "complex128"), ("__metadata__", torch.zeros(2), "rename")],
)
def test_what_a_file_cannot_hold_is_refused(name, tensor, named):
    with pytest.raises(ValueError, match=named):
        Layout.of({name: tensor})


def test_a_tensor_of_another_shape_is_refused_by_its_name():
    tensors = mixed_tensors()
    arena = Arena.empty(Layout.of(tensors))
    for broken, found in (
        (tensors | {"bias": torch.zeros(1)}, r"\(1,\)"),
        ({n: t for n, t in tensors.items() if n != "bias"}, "gone"),
    ):
        with pytest.raises(ValueError, match=rf"'bias' is {found}, expected shape \(3,\)"):
            arena.copy_from(broken)


class OneByOne(torch.Tensor):
    """Knows no operation on lists, as tensors of other libraries do."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "_foreach" in str(function):
            raise TypeError(f"no implementation of {function} for this kind")
        return super().__torch_dispatch__(function, types, args, kwargs or {})


def test_tensors_that_know_no_operation_on_lists_are_copied_one_by_one():
    tensors = mixed_tensors()
    arena = Arena.empty(Layout.of(tensors))
    arena.copy_from(tensors | {"weight": tensors["weight"].as_subclass(OneByOne)})
    assert all(torch.equal(arena.tensor(name), tensor) for name, tensor in tensors.items())


def test_spans_are_the_tensors_one_after_the_other():
    tensors = mixed_tensors()
    arena = Arena.empty(Layout.of(tensors))
    arena.copy_from(tensors)
    stored = list(arena.layout.shapes)
    assert len(arena.spans(stored)) == 1
    for names in (stored[::-1], ["weight", "bias", "flag"], ["empty"]):
        found = torch.cat([arena.bytes_of(*span) for span in arena.spans(names)])
        assert found.tolist() == [
            byte for name in names for byte in tensors[name].reshape(-1).view(torch.uint8).tolist()
        ]


def test_a_reused_arena_lies_in_the_same_memory_and_shares_nothing():
    arena = Arena.empty(Layout.of(tensors := mixed_tensors()))
    arena.own_tensors()
    reused = arena.sharing(None, frozenset()).reused()
    reused.copy_from(tensors)
    assert torch.equal(arena.tensor("weight"), tensors["weight"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.head.bias.requires_grad_(False)
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.shared = self.norm


def test_a_module_is_captured_once_with_its_shared_names():
    model = Tied()
    found = ModelTensors.of(model)
    assert set(found.tensors) | set(found.tied) == set(model.state_dict())
    assert found.tied["head.weight"] == "embedding.weight"
    assert found.tied["shared.weight"] == "norm.weight"
    assert found.frozen == {"head.bias"}
    assert [t.data_ptr() for t in found.transient] == [model.cache.data_ptr()]


def test_compiled_modules_are_captured_under_their_own_names():
    plain = Tied()
    assert list(ModelTensors.of(torch.compile(plain)).tensors) == list(ModelTensors.of(plain).tensors)
    assert clean_name("a._orig_mod.b") == "a.b"
    assert clean_name("module.weight") == "module.weight"  # a layer may well be called so


def test_a_model_without_values_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"'weight'.*materialise"):
        ModelTensors.of(nn.Linear(2, 2))
