"""The names of the tensors that a run publishes."""

import pytest
import safetensors.torch
import torch
from published_runs import fit, published_steps, record
from safetensors.torch import load_file
from tiny_run import Tiny
from torch import nn

from merge_callback import load_merge
from merge_callback.publish import export
from merge_callback.publish.emission import ModelFiles


class Inner(nn.Module):
    """A model in its own right, with an output that is tied to its input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Wrapping(Tiny):
    """A LightningModule around a model."""

    def __init__(self):
        super().__init__()
        del self.embed, self.norm, self.head
        self.model = Inner()

    def loss(self, batch):
        ids = batch["input_ids"]
        return nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def test_a_stripped_prefix_lets_the_inner_model_load_the_merge(tmp_path):
    fit(tmp_path, module=Wrapping, strip_prefix="model.")

    Inner().load_state_dict(load_merge(tmp_path / "merges/latest"), strict=True)
    assert record(tmp_path / "merges/latest")["stripped_prefix"] == "model."


def test_how_a_model_lies_in_its_files_is_worked_out_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(export, "ModelFiles", lambda *args: made.append(args) or ModelFiles(*args))
    fit(tmp_path)
    assert len(published_steps(tmp_path)) > 1
    assert len(made) == 1


@pytest.mark.parametrize("size", ["5GB", 1], ids=["whole", "shards"])
def test_a_tied_tensor_is_stored_once_and_loaded_under_all_its_names(tmp_path, size):
    fit(tmp_path, module=Wrapping, max_shard_size=size)

    path = tmp_path / "merges/latest"
    stored = [name for file in path.glob("*.safetensors") for name in load_file(file)]
    assert sorted(stored) == ["model.embed.weight", "model.norm.bias", "model.norm.weight"]
    assert record(path)["tied"] == {"model.head.weight": "model.embed.weight"}
    loaded = load_merge(path)
    assert torch.equal(loaded["model.head.weight"], loaded["model.embed.weight"])
    Wrapping().load_state_dict(loaded, strict=True)


def test_safetensors_own_loader_finds_the_tied_names(tmp_path):
    fit(tmp_path, module=Wrapping, strip_prefix="model.")

    model = Inner()
    missing, unexpected = safetensors.torch.load_model(model, tmp_path / "merges/latest/model.safetensors")

    assert not missing
    assert not unexpected
    with safetensors.safe_open(tmp_path / "merges/latest/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    assert torch.equal(model.head.weight, load_merge(tmp_path / "merges/latest")["embed.weight"])


def test_a_prefix_that_no_name_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"strip_prefix='net\.'.*embed.weight"):
        fit(tmp_path, strip_prefix="net.")


def test_a_prefix_whose_removal_makes_two_names_one_is_refused(tmp_path):
    class Clash(Wrapping):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)  # `model.norm.weight` and `norm.weight`

    with pytest.raises(ValueError, match=r"strip_prefix='model\.'.*norm\.(weight|bias)"):
        fit(tmp_path, module=Clash, strip_prefix="model.")


def test_a_parameter_may_be_called_as_the_metadata_is(tmp_path):
    class Named(Tiny):
        def __init__(self):
            super().__init__()
            self.pt = nn.Parameter(torch.ones(2))
            self.format = nn.Parameter(torch.ones(3))
            self.step = nn.Parameter(torch.ones(3))

    fit(tmp_path, module=Named)

    assert load_merge(tmp_path / "merges/latest").keys() == Named().state_dict().keys()


def test_a_tensor_that_is_called_pt_brings_no_other_along(tmp_path):
    class Named(Tiny):
        def __init__(self):
            super().__init__()
            self.pt = nn.Parameter(torch.ones(2))

    fit(tmp_path, module=Named)

    assert load_merge(tmp_path / "merges/latest").keys() == Named().state_dict().keys()
