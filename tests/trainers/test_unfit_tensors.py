"""Tensors that no snapshot can hold are refused by name when fit begins, or left out if that is asked for."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from training_runs import Classifier, assert_same_bits, emissions, loader, seed, train, weights_of

from merge_callback import CheckpointMergeCallback, load_merge


class Codes(torch.Tensor):
    """Eight-bit weights with a scale, as torchao's: a subclass that computes with other tensors inside."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def plain(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = pytree.tree_map_only(Codes, Codes.plain, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


class Params4bit(nn.Parameter):
    """As bitsandbytes': codes whose scales are an attribute."""


class Named(nn.Parameter):
    """A parameter that only has a name."""


def codes() -> nn.Parameter:
    return nn.Parameter(Codes(torch.ones(2, 3, dtype=torch.int8), torch.tensor(0.5)), requires_grad=False)


def four_bits() -> nn.Parameter:
    return torch.Tensor._make_subclass(Params4bit, torch.ones(6, 1, dtype=torch.uint8), False)


KINDS = {
    "class": (codes, "of the class Codes"),
    "parameter of codes": (four_bits, "of the class Params4bit, whose torch.uint8 codes"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
    "complex128": (lambda: torch.ones(3, dtype=torch.complex128), "dtype torch.complex128"),
    "uint16": (lambda: torch.ones(3, dtype=torch.uint16), "dtype torch.uint16"),
}


class Holding(Classifier):
    """Something is frozen in it that is no plain tensor."""

    def __init__(self, make) -> None:
        super().__init__()
        self.base = nn.Module()
        tensor = make()
        if isinstance(tensor, nn.Parameter):
            self.base.weight = tensor
        else:
            self.base.register_buffer("weight", tensor)


def merging(folder, **options) -> CheckpointMergeCallback:
    return CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=folder / "merges", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_snapshot_can_hold_is_refused_when_fit_begins(kind, tmp_path):
    make, said = KINDS[kind]
    steps = []
    module = Holding(make)
    module.on_train_batch_end = lambda *_: steps.append(1)
    with pytest.raises(ValueError, match=rf"'base\.weight' .*{said}.*exclude=\['base\.weight'\]"):
        train(module, merging(tmp_path), data=loader())
    assert not steps


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_left_out_if_excluded_and_the_run_is_the_same(kind, tmp_path, caplog):
    def trained(*callbacks):
        seed()
        module = Holding(KINDS[kind][0])
        train(module, *callbacks, data=loader(), val=loader(16), val_check_interval=4)
        return weights_of(module.net)

    with caplog.at_level("INFO"):
        merged = trained(merging(tmp_path, exclude=["base.*"]))
    assert_same_bits(merged, trained())
    assert len([r for r in caplog.records if "'base.weight': it " in r.getMessage()]) == 1
    found = load_merge(tmp_path / "merges" / "latest")
    assert found.keys() == {f"net.{name}" for name in merged}
    if kind == "nested":
        return  # load_state_dict does not know nested tensors
    fresh = Holding(KINDS[kind][0])
    fresh.load_state_dict({**fresh.state_dict(), **found})


def test_many_of_them_are_told_of_in_one_line_with_one_pattern(tmp_path):
    module = Classifier()
    module.base = nn.Sequential(*(nn.Module() for _ in range(3)))
    for part in module.base:
        part.weight = four_bits()
    with pytest.raises(
        ValueError, match=r"'base\.0\.weight' \(and 2 more\) .*exclude=\['base\.\*\.weight'\]"
    ):
        train(module, merging(tmp_path), data=loader())


def test_what_trains_is_refused_though_it_is_excluded(tmp_path):
    module = Holding(lambda: nn.Parameter(torch.ones(3, dtype=torch.complex128)))
    with pytest.raises(ValueError, match=r"'base\.weight' has dtype torch.complex128.* it trains"):
        train(module, merging(tmp_path, exclude=["base.*"]), data=loader())


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"scale": 1.0}

    def set_extra_state(self, state):
        pass


class Packing(nn.Linear):
    """Saves in its own way what is no tensor of the module, as quantised layers do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = torch.ones(2)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}packed")
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize(
    ("layer", "name"), [(Stateful, "net.0._extra_state"), (Packing, "net.0.packed"), (nn.Linear, "")]
)
def test_what_merges_lack_is_told_with_the_line_that_loads_them(layer, name, tmp_path, caplog):
    module = Classifier()
    module.net[0] = layer(8, 16)
    with caplog.at_level("INFO"):
        train(module, merging(tmp_path), data=loader())
    told = [r.getMessage() for r in caplog.records if "merges lack" in r.getMessage()]
    assert [name in line for line in told] == [True] * bool(name)
    module.load_state_dict({**module.state_dict(), **load_merge(tmp_path / "merges" / "latest")})


@pytest.mark.parametrize("kind", [Named, Params4bit], ids=lambda kind: kind.__name__)
def test_a_subclass_with_values_of_its_own_is_merged_like_any_parameter(kind, tmp_path):
    seed()
    module = Classifier()
    module.net[0].weight = torch.Tensor._make_subclass(kind, module.net[0].weight.data, True)
    train(module, merging(tmp_path), data=loader())
    assert len(emissions(tmp_path / "merges")) == 3
    Classifier().load_state_dict(load_merge(tmp_path / "merges" / "latest"))
