"""Merges of arenas: one pass over all snapshots for weighted sums, tensor by tensor for any other method."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from merge_callback.merging import Inputs, MergeMethod, Shard, Trajectory
from merge_callback.reduce import one_pass
from merge_callback.sharding import Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.deltas import delta_weights, flat_tensors
from merge_callback.snapshots.layout import Group


class Sum(NamedTuple):
    """A weighted sum of snapshots.

    Args:
        weights: one normalised weight per snapshot, or 0.
        out: of the same tensors, in any float dtypes (``layout.native`` gives the model's).
        copied: names of tensors that are not averaged.
    """

    weights: Sequence[float]
    out: Arena
    copied: Collection[str] = ()


def merge_arenas(
    arenas: Sequence[Arena],
    sums: Sequence[Sum] = (),
    contrast: Sequence[float] | None = None,
    newest: int = -1,
) -> dict[str, float]:
    """Merges snapshots in several ways at once and measures a distance, reading each arena once.

    Integer and boolean tensors, and those that a sum has ``copied``, are taken from the newest snapshot.

    Args:
        arenas: of a window's snapshots from its oldest on, at least one; whole ones of one layout, or
            differences in one of its ``delta``.
        sums: the merges, each with memory of its own.
        contrast: one factor per snapshot; −1 and 1 at two of them, and 0 elsewhere, give their distance.
        newest: index of the newest snapshot that is merged.

    Returns:
        Σ (Σ contrast[i] · snapshot i)² of each floating-point tensor; empty without ``contrast``.
    """
    outs = [row.out for row in sums]
    apart = in_common(arenas).difference(*(out.layout.names for out in outs))
    squares = {name: 0.0 for name in apart if is_floating(arenas[0], name)} if contrast else {}
    for group in groups(arenas, apart, outs):
        if group.dtype.is_floating_point:
            squares |= _reduce_group(group, arenas, sums, contrast)
    for row in sums:
        _copy_named(arenas[: newest + 1 or None], row.out, row.copied)
    return squares


def merge_tensors(
    method: MergeMethod,
    chains: Sequence[Sequence[Arena]],
    out: Arena,
    copied: Collection[str],
    trajectory: Trajectory,
    sharding: Sharding | None = None,
) -> None:
    """Merges snapshots into ``out`` tensor by tensor, by any method.

    Integer and boolean tensors, and those named in ``copied``, are taken from the newest snapshot.

    Args:
        method: how.
        chains: for each snapshot, oldest first, the arenas of its window's up to and with its own.
        out: of the same tensors, in any float dtypes.
        copied: names of tensors that are not averaged.
        trajectory: where the snapshots lie along the run.
        sharding: which part of each tensor the arenas hold, if there are several ranks.
    """
    several = sharding is not None and sharding.ranks.size > 1
    targets, model = out.tensors(), []
    _copy_named(chains[-1], out, copied)
    chains, trajectory = method.arranged(chains, trajectory)
    sources = [flat_tensors(chain) for chain in chains]
    for group in out.layout.groups:
        for name in group.names:
            if name not in copied and group.dtype.is_floating_point:
                shard = Shard(sharding.kept[name], sharding.ranks) if sharding and several else None
                model.append(Inputs(name, [source[name] for source in sources], shard=shard))
    survey = method.survey(model, trajectory)
    for inputs in model:
        method.merge(inputs, targets[inputs.name].view(-1), trajectory, survey)


def in_common(arenas: Sequence[Arena]) -> frozenset[str]:
    """The tensors that snapshots have in common, in one place."""
    names = arenas[0].shared
    for arena in arenas:
        if arena.frozen is not arenas[0].frozen:
            return frozenset()
        if arena.shared is not names:
            names &= arena.shared
    return names


def groups(arenas: Sequence[Arena], apart: frozenset[str], outs: Sequence[Arena] = ()) -> Sequence[Group]:
    """What is read in one go: a group of all that one dtype has.

    If some snapshots have other tensors in common than the rest, as some have changed since, it is each
    tensor by itself.

    Args:
        arenas: of the snapshots.
        apart: names of what is not to be read.
        outs: to which merges are written.
    """
    first = arenas[0]
    others = {id(arena.layout): arena.layout for arena in (*arenas[1:], *outs)}
    # Sets of 20,000 names are compared and not joined, as either holds the GIL for a millisecond.
    if first.shared == apart and all(layout.names == first.layout.names for layout in others.values()):
        return first.layout.groups
    return [first.holder(name).layout.alone(name) for name in (first.layout.names | first.shared) - apart]


def is_floating(arena: Arena, name: str) -> bool:
    """Whether one of an arena's tensors is of floating point."""
    return arena.holder(name).layout.places[name][0].dtype.is_floating_point


def _reduce_group(
    group: Group, arenas: Sequence[Arena], sums: Sequence[Sum], contrast: Sequence[float] | None
) -> dict[str, float]:
    stored = [arena.find(group) for arena in arenas]
    # A merge takes what the newest snapshot has in common with others.
    rows = [row for row in sums if group.names[0] in row.out.layout.names]
    if not rows and not contrast:
        return {}
    squares = one_pass(
        [flat for flat, _ in stored],
        [delta_weights(stored, row.weights) for row in rows] or None,
        [row.out.find(group)[0] for row in rows] or None,
        delta_weights(stored, contrast) if contrast else None,
        group.stops,
    )
    return {} if squares is None else dict(zip(group.names, squares.tolist(), strict=True))


def _copy_named(arenas: Sequence[Arena], out: Arena, copied: Collection[str]) -> None:
    """Takes over what is not averaged: the integer and boolean tensors, and those named in ``copied``."""
    names = [name for name in copied if name in out.layout.places]
    for group in out.layout.groups:
        if not group.dtype.is_floating_point:
            names += group.names
    tensors: dict[str, Tensor] = flat_tensors(arenas, names)
    for name, tensor in tensors.items():
        out.flat(name).copy_(tensor[:])
