"""Merging the snapshots of a LoRA run by what the adapter adds, ``ΔW = s B A``, at the adapter's own rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from merge_callback.merging import Inputs, LinearMethod, MergeMethod, Trajectory
from merge_callback.merging.low_rank import FACTOR, LowRank, nearest, total
from merge_callback.sharding import Sharding

Pair = tuple[str, str]
Parts = Callable[[Collection[str]], Mapping[str, Tensor]]
"""Gives what this rank keeps of a snapshot's tensors, flat, by their names."""


def factor_pairs(names: Iterable[str]) -> list[Pair]:
    """The names of A and B of each adapter among a module's tensors, as peft calls them."""
    known = set(names)
    factors = [found for name in known if (found := FACTOR.fullmatch(name)) and found["factor"] == "A"]
    pairs = ((found[0], f"{found[0][: found.start('factor')]}B{found['rest']}") for found in factors)
    return sorted(pair for pair in pairs if pair[1] in known)


def product_pairs(shapes: Mapping[str, Sequence[int]]) -> list[Pair]:
    """Those that are factors of a matrix by their shapes: not of grouped convolutions."""

    def fits(a: Sequence[int], b: Sequence[int]) -> bool:
        return min(len(a), len(b)) > 1 and b[1] == a[0] and set(b[2:]) <= {1}

    return [(a, b) for a, b in factor_pairs(shapes) if fits(shapes[a], shapes[b])]


@torch.no_grad()
def merge_factors(
    pairs: Sequence[Pair],
    snapshots: Sequence[Parts],
    method: MergeMethod,
    trajectory: Trajectory,
    sharding: Sharding,
) -> dict[str, Tensor]:
    """The factors whose products are nearest to the merges of the snapshots' products, of the same rank.

    The mean of N products ``B_i A_i`` has a rank of up to N·r, and what another method makes of them may have
    any. Of all matrices of rank r, the nearest is taken, in factors near the mean of the snapshots' A.
    A method that is not linear gets each dense product by itself, also if its scope is the whole model.

    Each rank merges one pair at a time, and as many pairs are under way as there are ranks; all have to call.

    Args:
        pairs: names of A and B, the same on all ranks.
        snapshots: what this rank keeps of each, oldest first.
        method: how.
        trajectory: where they lie along the run.
        sharding: which part of each tensor that is.

    Returns:
        This rank's parts of the merged factors, flat, by name.
    """
    ranks, found = sharding.ranks, dict[str, Tensor]()
    for start in range(0, len(pairs), ranks.size):
        batch = pairs[start : start + ranks.size]
        mine: list[LowRank] = []
        room: dict[str, Tensor] = {}
        for index, pair in enumerate(batch):
            a, b = (_gathered(name, snapshots, sharding) for name in pair)
            room |= {pair[0]: torch.zeros_like(a[0]), pair[1]: torch.zeros_like(b[0])}
            if index == ranks.rank:
                mine = [LowRank(q.flatten(1), p.flatten(1)) for p, q in zip(a, b, strict=True)]
        if mine:
            first, second = batch[ranks.rank]
            merged = _merged(first, mine, method, trajectory)
            room[first].copy_(merged.a.reshape(room[first].shape))
            room[second].copy_(merged.b.reshape(room[second].shape))
        found |= {name: sharding.kept[name].take(ranks.total(whole)) for name, whole in room.items()}
    return found


def _gathered(name: str, snapshots: Sequence[Parts], sharding: Sharding) -> Tensor:
    """A whole factor of every snapshot, (snapshots, …), in fp32 or fp64: it may be stored in less."""
    piece, is_split = sharding.kept[name], sharding.ranks.size > 1
    parts = [snapshot([name])[name][:] for snapshot in snapshots]
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    device = "cpu" if is_split else parts[0].device
    wholes = torch.zeros(len(parts), *piece.whole, dtype=wide, device=device)
    for part, whole in zip(parts, wholes, strict=True):
        piece.place(part, whole)
    return sharding.ranks.total(wholes)


def _merged(name: str, products: Sequence[LowRank], method: MergeMethod, trajectory: Trajectory) -> LowRank:
    rank = products[0].rank
    if len(products) == 1:
        return products[0]
    if isinstance(method, LinearMethod):
        weights = method.weights_along(trajectory)
        merged = total(products, weights, torch.float64).cut(rank)
    else:
        arranged, trajectory = method.arranged(products, trajectory)
        inputs = Inputs(name, [product.dense().view(-1) for product in arranged])
        dense = torch.empty_like(inputs.tensors[0])
        method.merge(inputs, dense, trajectory, method.survey([inputs], trajectory))
        around = torch.cat([product.a for product in products])
        merged = nearest(dense.view(products[0].shape), rank, around)
    return merged.near(torch.stack([product.a for product in products]).mean(0))
