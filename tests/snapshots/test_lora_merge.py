"""Factors of LoRA adapters are merged by their products, whichever rank keeps which part of them."""

from functools import partial

import pytest
import torch
from thread_ranks import Threads, columns, ranges, rows, taken

from merge_callback.merging import Trajectory, resolve_method
from merge_callback.merging.low_rank import LowRank, relative_error, total
from merge_callback.sharding import Piece, Sharding
from merge_callback.snapshots.lora_merge import factor_pairs, merge_factors, product_pairs

SHAPES = {
    "x.lora_A.default.weight": (4, 10),
    "x.lora_B.default.weight": (12, 4),
    "y.lora_A.default.weight": (2, 3, 3, 3),  # of a convolution
    "y.lora_B.default.weight": (5, 2, 1, 1),
    "z.lora_embedding_A.default": (4, 9),
    "z.lora_embedding_B.default": (3, 4),  # of a lower rank than 4
}
PAIRS = product_pairs(SHAPES)


def drawn(count=4):
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moved = [
        {name: t + 0.1 * i * torch.randn(t.shape, generator=generator) for name, t in first.items()}
        for i in range(1, count)
    ]
    return [first, *moved]


def merged(method, states, pieces, ranks=None):
    """The parts that one rank gets."""
    sharding = Sharding(states[0], {name: Piece.all_of(shape) for name, shape in SHAPES.items()})
    sharding.kept = pieces
    sharding.ranks = ranks or sharding.ranks

    def parts(state, names):
        return {name: taken(pieces[name], state[name]) for name in names}

    snapshots = [partial(parts, state) for state in states]
    even = Trajectory.even(len(states))
    return merge_factors(PAIRS, snapshots, resolve_method(method), even, sharding)


def alone(method, states):
    found = merged(method, states, {name: Piece.all_of(shape) for name, shape in SHAPES.items()})
    return {name: flat.view(SHAPES[name]) for name, flat in found.items()}


def test_each_pair_is_the_nearest_to_the_mean_of_its_products():
    states = drawn()
    found = alone("sma", states)
    for a, b in PAIRS:
        products = [LowRank(s[b].flatten(1), s[a].flatten(1)) for s in states]
        expected = total(products, [0.25] * 4, torch.float64)
        best = expected.cut(products[0].rank)
        stored = LowRank(found[b].flatten(1), found[a].flatten(1))
        assert relative_error(stored, best) < 1e-6
        assert relative_error(stored, expected) == pytest.approx(relative_error(best, expected), abs=1e-6)


@pytest.mark.parametrize("split", [rows, columns, ranges])
@pytest.mark.parametrize("method", ["sma", "ties"])
def test_ranks_that_share_the_factors_out_get_the_same_bits(method, split):
    states, ranks = drawn(), Threads(2)
    expected = alone(method, states)
    pieces = {name: split(shape, 2) for name, shape in SHAPES.items()}

    def on(rank):
        own = {name: found[rank] for name, found in pieces.items()}
        return own, merged(method, states, own, ranks)

    for own, found in ranks.run(on):
        assert found.keys() == SHAPES.keys()
        for name, part in found.items():
            assert torch.equal(part, taken(own[name], expected[name])), name


def test_one_snapshot_keeps_its_factors():
    (state,) = drawn(1)
    found = alone("sma", [state])
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_pairs_are_found_by_peft_s_names_and_shapes():
    a, b = "net.2.lora_A.default.weight", "net.2.lora_B.default.weight"
    embedding = ("x.lora_embedding_A.one", "x.lora_embedding_B.one")
    assert factor_pairs([a, b, *embedding, "y.lora_A.weight", "lora_A", "z.A.weight"]) == [(a, b), embedding]
    assert product_pairs({a: (2, 5), b: (4, 2)}) == [(a, b)]
    grouped = {a: (2, 5, 3, 3), b: (4, 1, 1, 1)}
    assert product_pairs(grouped) == product_pairs({a: (5,), b: (4,)}) == []
