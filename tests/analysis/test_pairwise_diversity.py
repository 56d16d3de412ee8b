"""The distances of N checkpoints: against the definition, the callback's metric and one another."""

import itertools
import math

import numpy as np
import pytest
import torch

from merge_callback.analysis.layer_groups import layer_groups
from merge_callback.analysis.pairwise import changes, consecutive, pairwise_distances
from merge_callback.analysis.tensor_blocks import side_by_side
from merge_callback.diversity import rms_diversity

SHAPES = {
    "embed.weight": (11, 4),
    "layers.0.w": (30, 40),
    "layers.0.b": (7,),
    "layers.1.w": (3, 5, 2),
    "s": (),
}


def checkpoints(count=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    start, found = draw(1.0), []
    for _ in range(count):
        start = {name: t + d for (name, t), d in zip(start.items(), draw(0.01).values(), strict=True)}
        found.append({name: t.to(dtype) for name, t in start.items()})
    return found


def by_definition(a, b):
    """√(mean (a − b)²) of each tensor ("Practical Guidelines", App. C.2, eq. 4), in fp64 numpy."""
    return {
        name: math.sqrt(np.mean((a[name].double().numpy() - b[name].double().numpy()) ** 2)) for name in a
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_pair_has_the_papers_distance(dtype):
    models = checkpoints(dtype=dtype)
    found = pairwise_distances(models)
    for i, j in itertools.permutations(range(len(models)), 2):
        expected = by_definition(models[i], models[j])
        # Both sum fp64 squares of exact differences, in different orders: 1e3 elements, a few ulp.
        assert {n: m[i, j].item() for n, m in found.per_tensor.items()} == pytest.approx(expected, rel=1e-14)
        mean = sum(expected.values()) / len(expected)
        assert found.model()[i, j].item() == pytest.approx(mean, rel=1e-14)


def test_the_callbacks_metric_gives_the_same_value():
    models = checkpoints()
    # The metric forms differences and squares in fp32: 2^-24 each.
    expected = rms_diversity(models[1], models[3])
    assert pairwise_distances(models).model()[1, 3].item() == pytest.approx(expected, rel=1e-6)


def test_distances_worked_by_hand():
    a = {"x": torch.zeros(4), "y": torch.zeros(4)}
    b = {"x": torch.full((4,), 3.0), "y": torch.tensor([0.0, 4.0, 0.0, 0.0])}
    found = pairwise_distances([a, b, a])
    assert found.per_tensor["x"].tolist() == [[0, 3, 0], [3, 0, 3], [0, 3, 0]]
    assert found.per_tensor["y"][0, 1] == 2
    assert found.model()[0, 1] == 2.5


def test_equal_checkpoints_are_exactly_0_apart_however_far_from_the_others():
    first, second = checkpoints(2)
    far = {name: t + 1000 for name, t in first.items()}
    matrix = pairwise_distances([far, first, second, {n: t.clone() for n, t in first.items()}]).model()
    assert matrix[1, 3] == matrix[3, 1] == 0
    assert (matrix.diagonal() == 0).all()
    assert (matrix[0, 1:] > 999).all()


def test_the_block_size_changes_rounding_only():
    models = checkpoints()
    whole = pairwise_distances(models).model()
    for block in (1, 7, 64, 1200):
        assert torch.allclose(pairwise_distances(models, block=block).model(), whole, rtol=1e-14, atol=0)


def test_a_block_is_all_the_memory_a_tensor_takes():
    tensors = [torch.zeros(1000, 10), torch.ones(10, 1000).T]
    blocks = list(side_by_side(tensors, block=64))
    assert {block.untyped_storage().nbytes() for block in blocks} == {2 * 64 * 8}
    assert len({block.data_ptr() for block in blocks}) == 1
    assert sum(block.shape[1] for block in blocks) == 10_000


def test_torch_has_its_threads_back_afterwards_also_after_an_error():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        pairwise_distances(checkpoints(2))
        with pytest.raises(ValueError):
            pairwise_distances(checkpoints(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_transposed_tensors_are_compared_element_by_element():
    a = torch.arange(12.0).reshape(3, 4)
    transposed = a.T.contiguous().T  # the same numbers, in another order in memory
    found = pairwise_distances([{"w": a}, {"w": transposed}, {"w": transposed + 1}], block=5).model()
    assert found.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_tensors_that_are_no_floats_do_not_count():
    a = {"w": torch.zeros(3), "steps": torch.tensor(1)}
    b = {"w": torch.ones(3), "steps": torch.tensor(9)}
    assert list(pairwise_distances([a, b]).per_tensor) == ["w"]


def test_checkpoints_of_two_precisions_can_be_compared():
    a = checkpoints(1)[0]
    rounded = {name: t.bfloat16() for name, t in a.items()}
    expected = by_definition(a, rounded)["layers.0.w"]
    found = pairwise_distances([a, rounded]).per_tensor["layers.0.w"][0, 1].item()
    assert found == pytest.approx(expected, rel=1e-14)
    assert found > 0


def test_a_layers_value_is_the_mean_over_its_tensors():
    models = checkpoints()
    found, expected = pairwise_distances(models).by_layer(), by_definition(models[0], models[2])
    assert list(found) == ["embed", "layers.0", "layers.1", "s"]
    mean = (expected["layers.0.w"] + expected["layers.0.b"]) / 2
    assert found["layers.0"][0, 2].item() == pytest.approx(mean, rel=1e-14)
    assert found["s"][0, 2].item() == pytest.approx(expected["s"], rel=1e-14)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.self_attn.q.weight", "model.layers.3"),
        ("model.layers.3.experts.5.up.weight", "model.layers.3"),
        ("model.layers.11.norm.bias", "model.layers.11"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
        ("h.3.mlp.weight", "h.3"),
        ("scale", "scale"),
        ("0.weight", "0"),
    ],
)
def test_a_tensor_belongs_to_the_layer_its_name_says(name, group):
    # The layer beside it tells that the model keeps its layers in `model`.
    assert layer_groups(["model.layers.0.weight", name])[group][-1] == name


def test_layers_come_in_the_order_of_their_numbers():
    alphabetical = ["embed.w", "head.w", "layers.0.w", "layers.10.w", "layers.2.w", "norm.w"]
    assert list(layer_groups(alphabetical)) == ["embed", "head", "layers.0", "layers.2", "layers.10", "norm"]
    of_the_module = ["embed.w", "h.0.w", "h.1.w", "norm.w", "head.w"]
    assert list(layer_groups(of_the_module)) == ["embed", "h.0", "h.1", "norm", "head"]


def test_the_curve_compares_checkpoints_a_lag_apart():
    matrix = torch.tensor([[abs(i - j) * 10.0 + max(i, j) for j in range(4)] for i in range(4)])
    assert consecutive(matrix) == [11, 12, 13]
    assert consecutive(matrix, lag=2) == [22, 23]
    assert consecutive(matrix, lag=3) == [33]


def test_changes_are_percentages_of_the_first_value():
    assert changes([2.0, 1.0, 3.0]) == [0, -50, 50]
    assert all(map(math.isnan, changes([0.0, 1.0])))


@pytest.mark.parametrize("lag", [0, 4, -1])
def test_a_lag_no_two_checkpoints_have_is_refused(lag):
    with pytest.raises(ValueError, match=rf"lag={lag} must lie in 1 … 3"):
        consecutive(torch.zeros(4, 4), lag)


def test_a_tensor_that_one_checkpoint_lacks_is_named():
    whole, part = {"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": torch.zeros(1)}
    with pytest.raises(ValueError, match="'b' is in checkpoint 1 but not in checkpoint 3"):
        pairwise_distances([whole, whole, part])
    with pytest.raises(ValueError, match=r"'b' is in y\.ckpt but not in x\.ckpt"):
        pairwise_distances([part, whole], labels=["x.ckpt", "y.ckpt"])


def test_what_cannot_be_compared_is_refused():
    one = {"a": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"'a': shape \(2,\) in checkpoint 1, but \(1, 2\) in checkpoint 2"):
        pairwise_distances([one, {"a": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match=r"'a' is torch.float32 in checkpoint 1, but torch.int64"):
        pairwise_distances([one, {"a": torch.zeros(2, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="at least two checkpoints, got 1"):
        pairwise_distances([one])
    with pytest.raises(ValueError, match="no floating-point tensor"):
        pairwise_distances([{"n": torch.tensor(1)}] * 2)
