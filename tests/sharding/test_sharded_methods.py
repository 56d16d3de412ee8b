"""Every method gives the same bits whether one process has a tensor or several share it out."""

import pytest
import torch
from thread_ranks import Threads, columns, ranges, rows, taken

from merge_callback.merging import Inputs, Shard, Trajectory, resolve_method

METHODS = [
    ("sma", {}),
    ("ema", {}),
    ("task_arithmetic", {}),
    ("meta", {}),
    ("dropout", {}),
    ("ties", {}),
    ("ties", {"density": 0.1}),
    ("ties", {"density": 0.35, "scope": "global"}),
    ("dare", {}),
    ("dare", {"ties": True, "density": 0.5}),
    ("noise", {}),
    ("slerp", {}),
    ("slerp", {"scope": "global"}),
]
ROUNDED = {"noise", "slerp"}  # their global sums are added in another order


def snapshots(kind: str, shapes) -> dict[str, list[torch.Tensor]]:
    """Four snapshots of two tensors. Coarse ones differ by few distinct amounts: most thresholds are ties."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in shapes.items():
        start = torch.randn(shape, generator=generator)
        steps = [torch.randn(shape, generator=generator) * 0.01 for _ in range(3)]
        if kind == "coarse":
            steps = [(step * 200).round() / 256 for step in steps]
            start = (start * 8).round() / 8
        found[name] = [start, *(start + sum(steps[: i + 1]) for i in range(3))]
    return found


def merge_all(method, tensors, trajectory, pieces=None, ranks=None):
    """Merges every tensor, or a rank's pieces of them."""
    model = []
    for name, found in tensors.items():
        shard = Shard(pieces[name], ranks) if pieces else None
        flats = [taken(pieces[name], t) if pieces else t.reshape(-1) for t in found]
        model.append(Inputs(name, flats, shard=shard))
    survey = method.survey(model, trajectory)
    out = {}
    for inputs in model:
        out[inputs.name] = torch.empty_like(inputs.tensors[0])
        method.merge(inputs, out[inputs.name], trajectory, survey)
    return out


@pytest.mark.parametrize("split", [rows, columns, ranges])
@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.filterwarnings("ignore:.*negative weights")
def test_shares_of_a_tensor_merge_as_the_whole(name, options, kind, split):
    shapes = {"a": (67, 130), "b": (5, 3), "c": (3, 40, 7)}
    tensors = snapshots(kind, shapes)
    method, trajectory = resolve_method(name, **options), Trajectory([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    expected = merge_all(method, tensors, trajectory)
    ranks = Threads(3)
    pieces = {n: split(shape, 3) for n, shape in shapes.items()}
    found = ranks.run(
        lambda rank: merge_all(method, tensors, trajectory, {n: p[rank] for n, p in pieces.items()}, ranks)
    )
    for n, shape in shapes.items():
        whole = torch.full(shape, float("nan"))
        for rank in range(3):
            pieces[n][rank].place(found[rank][n], whole)
        if name in ROUNDED:
            # Weights that differ in the last bits of fp64 change a sum by one rounding of fp32 at most.
            torch.testing.assert_close(whole, expected[n].view(shape), rtol=2e-7, atol=1e-9)
        else:
            assert torch.equal(whole, expected[n].view(shape)), n


def test_few_messages_are_exchanged_for_a_large_tensor_of_ties():
    shape, ranks = (1000, 600), Threads(2)
    tensors = snapshots("coarse", {"a": shape})
    method, trajectory = resolve_method("ties", density=0.3), Trajectory.even(4)
    pieces = columns(shape, 2)
    ranks.run(lambda rank: merge_all(method, tensors, trajectory, {"a": pieces[rank]}, ranks))
    # Size, sample, one or two counts, what is between, its ties; where they end: two or three stretches.
    assert ranks.messages <= 12


def test_many_tensors_of_ties_take_no_more_messages_than_one():
    shapes, ranks = {f"t{i}": (50 + i, 60) for i in range(30)}, Threads(2)
    tensors = snapshots("fine", shapes)
    method, trajectory = resolve_method("ties"), Trajectory.even(4)
    pieces = {n: columns(shape, 2) for n, shape in shapes.items()}
    ranks.run(
        lambda rank: merge_all(method, tensors, trajectory, {n: p[rank] for n, p in pieces.items()}, ranks)
    )
    assert ranks.messages <= 12


def test_a_large_tensor_is_narrowed_down_before_anything_is_told():
    size, ranks = 12_000_000, Threads(2)
    generator = torch.Generator().manual_seed(3)
    start = torch.zeros(size)
    tensors = {"a": [start, torch.randn(size, generator=generator)]}
    told = []
    exchange = ranks.exchange

    def counting(value):
        told.append(_elements(value))
        return exchange(value)

    ranks.exchange = counting
    method, trajectory = resolve_method("ties", density=0.8), Trajectory.even(2)
    expected = merge_all(method, tensors, trajectory)["a"]
    pieces = ranges((size,), 2)
    found = ranks.run(lambda rank: merge_all(method, tensors, trajectory, {"a": pieces[rank]}, ranks)["a"])
    assert torch.equal(torch.cat(found), expected)
    assert max(told) <= 1 << 17


def _elements(value) -> int:
    """Numbers in a message."""
    if isinstance(value, dict):
        return sum(map(_elements, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_elements, value))
    return int(getattr(value, "size", 1))
