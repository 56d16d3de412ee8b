"""Functional diversity: the definitions by hand, how a batch is passed, and which layers count."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from merge_callback.diversity.features import Call, features_of, layers_of
from merge_callback.diversity.functional import (
    Features,
    cosine_distance,
    functional_distances,
    kl_divergence,
)

# Distances


def test_the_distances_are_the_papers_by_hand():
    older = Features(
        torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]]),
        {"a": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([[2.0, 0.0], [0.0, 2.0]])},
    )
    newer = Features(
        torch.tensor([[[math.log(3), 0.0]], [[4.0, 3.0]]]),
        {"a": torch.tensor([[0.0, 5.0], [1.0, 0.0]]), "b": torch.tensor([[-1.0, 0.0], [0.0, 1.0]])},
    )
    found = functional_distances(older, newer)
    # (1/2)(1 + 1 − 24/25): logits that are all zero have no direction, so the first pair counts as 1.
    assert found["logits"] == pytest.approx((1 + 1 / 25) / 2, rel=1e-7)
    # p = (3/4, 1/4) against (1/2, 1/2); then σ(1) against σ(−1).
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found["probabilities"] == pytest.approx((first + math.tanh(0.5)) / 2, rel=1e-7)
    # Layer a: 1 and 0; layer b: 2 and 0.
    assert found["activations"] == pytest.approx((0.5 + 1.0) / 2, rel=1e-7)


def test_the_divergence_is_of_the_newer_from_the_older():
    newer, older = torch.tensor([math.log(3), 0.0]), torch.zeros(2)
    assert kl_divergence(newer, older) == pytest.approx(0.130812, abs=1e-6)
    assert kl_divergence(older, newer) == pytest.approx(0.143841, abs=1e-6)


def test_masked_classes_do_not_count():
    newer, older = torch.tensor([[1.0, 0.0, -math.inf]]), torch.tensor([[0.0, 1.0, -math.inf]])
    assert cosine_distance(newer, older) == pytest.approx(1.0)
    assert kl_divergence(newer, older) == pytest.approx(math.tanh(0.5))


def test_equal_features_have_no_distance():
    features = Features(torch.randn(3, 1, 7), {"a": torch.randn(3, 5), "zero": torch.zeros(3, 5)})
    assert functional_distances(features, features) == pytest.approx(
        {"logits": 0.0, "probabilities": 0.0, "activations": 0.0}, abs=1e-15
    )


def test_tiny_distances_are_not_lost_in_rounding():
    a = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    b = a + 1e-5 * torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    exact = 1 - torch.cosine_similarity(a.double(), b.double())
    assert cosine_distance(a, b) == pytest.approx(float(exact.mean()), rel=1e-3)


def test_features_of_different_layers_are_not_compared():
    logits = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"the layers differ: \['a'\]"):
        functional_distances(Features(logits, {"a": torch.ones(1, 1)}), Features(logits, {}))


def test_a_single_class_has_no_probabilities():
    features = Features(torch.ones(2, 1, 1), {})
    assert functional_distances(features, features).keys() == {"logits"}


# Features


class Language(nn.Module):
    """Embeds tokens and returns logits in one of the ways that models do."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11)
        self.wrap = wrap

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.wrap(self.head(x))


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


TOKENS = torch.arange(8).view(2, 4)


def features(model, batch):
    layers = layers_of(dict(model.named_modules()))
    return features_of(model, Call.of(model, batch), layers)


def test_the_final_token_of_each_sequence_counts():
    model = Language()
    found = features(model, {"input_ids": TOKENS})
    assert torch.equal(found.logits, model(TOKENS)[:, -1:].detach())
    assert [*found.activations] == ["blocks.0", "blocks.1"]
    x = model.blocks[0](model.embedding(TOKENS)).detach()
    assert torch.equal(found.activations["blocks.0"], x[:, -1])


@pytest.mark.parametrize("mask", [[[1, 1, 0, 0], [1, 1, 1, 1]], [[0, 1, 0, 0], [0, 0, 1, 1]]])
def test_padding_does_not_count(mask):
    model, mask = Language(), torch.tensor(mask)
    found = features(model, {"input_ids": TOKENS, "attention_mask": mask})
    expected = model(TOKENS).detach()[[0, 1], [1, 3]]
    assert torch.equal(found.logits[:, 0], expected)
    assert found.activations["blocks.1"].shape == (2, 6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"loss": logits.sum(), "logits": logits, "hidden": torch.zeros(3, 4, 500)},
        lambda logits: (logits.mean(), logits),
        lambda logits: (logits, logits.mean()),
        lambda logits: Output(logits.mean(), logits),
        lambda logits: [logits, [torch.zeros(2), torch.zeros(1)]],
    ],
    ids=["mapping", "loss first", "loss last", "output class", "nested"],
)
def test_logits_are_found_in_what_a_model_returns(wrap):
    plain, wrapped = Language(), Language(wrap)
    wrapped.load_state_dict(plain.state_dict())
    assert torch.equal(features(plain, TOKENS).logits, features(wrapped, TOKENS).logits)


def test_a_classifier_has_one_output_for_each_row():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).eval()
    x = torch.randn(5, 8)
    found = features(model, (x, torch.zeros(5)))
    assert torch.equal(found.logits[:, 0], model(x).detach())
    assert {name: tuple(tensor.shape) for name, tensor in found.activations.items()} == {
        "0": (5, 16),
        "2": (5, 4),
    }


def test_of_maps_a_part_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 7, 1))
    found = features(model, torch.randn(2, 3, 64, 64))
    assert found.logits.shape[::2] == (2, 7)
    assert found.logits.shape[1] * 7 <= 4096
    assert all(tensor.shape[0] == 2 and tensor.shape[1] <= 4096 for tensor in found.activations.values())


def test_a_model_without_floating_point_output_has_no_features():
    with pytest.raises(TypeError, match="returns a Tensor without floating-point tensors"):
        features(Language(lambda logits: logits.argmax(-1)), TOKENS)


def test_no_hook_stays():
    model = Language()
    features(model, TOKENS)
    assert not any(part._forward_hooks for part in model.modules())


# How a batch is passed


class OfBatch(nn.Module):
    def forward(self, batch): ...


class OfImage(nn.Module):
    def forward(self, x, scale=1.0): ...


class OfAny(nn.Module):
    def forward(self, *args, **kwargs): ...


class OfPair(nn.Module):
    def forward(self, source, target): ...


class Pair(NamedTuple):
    source: str
    target: str


@pytest.mark.parametrize(
    ("module", "batch", "args", "kwargs"),
    [
        (Language(), {"input_ids": 1, "labels": 2}, (), {"input_ids": 1}),
        (Language(), {"ids": 1}, ({"ids": 1},), {}),
        (OfBatch(), {"batch": 1}, ({"batch": 1},), {}),
        (OfBatch(), (1, 2), ((1, 2),), {}),
        (OfImage(), [1, 2], (1,), {}),
        (OfImage(), 1, (1,), {}),
        (OfAny(), {"a": 1, "b": 2}, (), {"a": 1, "b": 2}),
        (OfAny(), (1, 2), (1,), {}),
        (OfPair(), (1, 2, 3), (1, 2), {}),
        (OfPair(), {"source": 1}, ({"source": 1},), {}),
        (OfImage(), Pair("a", "b"), (Pair("a", "b"),), {}),
    ],
)
def test_a_batch_is_passed_as_forward_takes_it(module, batch, args, kwargs):
    assert Call.of(module, batch) == Call(args, kwargs, None)


# Layers


class Seq2Seq(nn.Module):
    """Two stacks, the second with experts, which are stacks within."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.decoder = nn.ModuleList(nn.ModuleList(nn.Linear(9, 9) for _ in range(8)) for _ in range(3))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Language(), ["blocks.0", "blocks.1"]),
        (Seq2Seq(), ["decoder.0", "decoder.1", "decoder.2"]),
        (nn.ModuleDict({"model": Language()}), ["model.blocks.0", "model.blocks.1"]),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0"]),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))), ["0.0", "0.2"]),
        (
            nn.Sequential(nn.Embedding(2, 3), nn.Sequential(*(nn.Linear(3, 3) for _ in range(2)))),
            ["1.0", "1.1"],
        ),
    ],
)
def test_the_layers_are_the_blocks_of_the_largest_stack(module, expected):
    assert [*layers_of(dict(module.named_modules()))] == expected


def test_layers_can_be_named():
    parts = dict(Language().named_modules())
    assert [*layers_of(parts, ["head", "blocks.1"])] == ["blocks.1", "head"]
    with pytest.raises(
        ValueError, match=r"'bloks.\*' matches no module of this model; names look like \['head'\]"
    ):
        layers_of(parts, ["bloks.*"])
