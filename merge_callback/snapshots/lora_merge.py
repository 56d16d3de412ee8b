"""Merging the snapshots of a LoRA run by what the adapter adds, ``ΔW = s B A``, at the adapter's own rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from merge_callback.merging.low_rank import FACTOR, LowRank, total


def factor_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of A and B of each adapter among a module's tensors, as peft calls them."""
    known = set(names)
    factors = [found for name in known if (found := FACTOR.fullmatch(name)) and found["factor"] == "A"]
    pairs = ((found[0], f"{found[0][: found.start('factor')]}B{found['rest']}") for found in factors)
    return sorted(pair for pair in pairs if pair[1] in known)


@torch.no_grad()
def merge_factors(
    snapshots: Sequence[Callable[[Collection[str]], Mapping[str, Tensor]]],
    weights: Sequence[float],
    out: Mapping[str, Tensor],
    copied: Collection[str],
) -> int:
    """Overwrites the factors of a linear merge with the nearest ones to the mean of their products.

    The mean of N products ``B_i A_i`` has a rank of up to N·r. Of all matrices of rank r, the nearest to it
    is written, in balanced factors. The mean of B times the mean of A is one of those matrices, too.

    Args:
        snapshots: what gives the tensors of each by their names, flat or not; oldest first.
        weights: of each.
        out: the merge, in which all else stays as it is.
        copied: names of what is taken from the newest snapshot: with one of them, a pair is left alone.

    Returns:
        The number of pairs.
    """
    count = 0
    for first, second in factor_pairs(out):
        a, b = out[first], out[second]
        rank = a.shape[0]
        if first in copied or second in copied:
            continue
        if min(a.dim(), b.dim()) < 2 or b.shape[1] != rank or b[0, 0].numel() != 1:
            continue  # of a grouped convolution, or no factors
        count += 1
        given = (snapshot((first, second)) for snapshot in snapshots)
        products = [LowRank(_wide(g[second], b), _wide(g[first], a)) for g in given]
        mean = total(products, weights, torch.float64).cut(rank)
        b.copy_(mean.b.reshape(b.shape))
        a.copy_(mean.a.reshape(a.shape))
    return count


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    """A factor as a matrix, in fp32 or fp64: it may be stored in a narrower dtype, or as a difference."""
    flat = tensor[:]
    return flat.to(torch.promote_types(flat.dtype, torch.float32)).reshape(like.shape).flatten(1)
