"""Merging the window: which snapshots, by which method, and the one pass over their arenas."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from merge_callback.diversity import RMSDiversity
from merge_callback.merging import Inputs, LinearMethod, MergeMethod, Shard, Trajectory
from merge_callback.reduce import one_pass
from merge_callback.reduce.ranges import in_ranges
from merge_callback.sharding import Sharding, overwrite
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import flat_tensors, terms
from merge_callback.snapshots.layout import Group
from merge_callback.snapshots.storage import NonFiniteSnapshotError, Snapshot
from merge_callback.snapshots.window import Window

log = logging.getLogger(__name__)


class NonFiniteMergeError(ValueError):
    """A merge that holds NaN or Inf, though its snapshots held none when they were taken."""


class HalfRestoredError(RuntimeError):
    """Live weights that are neither the run's nor restored: nothing may be trained with or saved."""


@dataclass
class Merge:
    """A merge of part of the window: its tensors in the model's dtypes, and how they came about.

    ``weights`` are the snapshots' where the method is linear, else ``None``.
    """

    arena: Arena
    method: MergeMethod
    snapshots: list[Snapshot]
    weights: list[float] | None
    copied: list[str]

    @property
    def step(self) -> int:
        """The optimizer step of the newest snapshot in it."""
        return self.snapshots[-1].step


class WindowMerger:
    """Merges a window and measures its diversity, both in one pass where both are wanted.

    Args:
        window: the snapshots.
        methods: the method of each phase, by the phase's name.
        diversity_lag: how many snapshots apart the pair lies whose distance is measured.
        exclude: patterns of names that are copied, not averaged.
        settle: waits for whoever still reads the last merge; called before its memory is used again.
    """

    def __init__(
        self,
        window: Window,
        methods: Mapping[str, MergeMethod],
        diversity_lag: int,
        exclude: Sequence[str] = (),
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self.window, self.methods, self.lag, self.exclude = window, methods, diversity_lag, exclude
        self._settle = settle
        self.sharding, self.ranks = window.store.sharding, window.ranks
        self.metric = RMSDiversity({}, sync_on_compute=False)  # the sums are everybody's already
        self.diversity: dict[str, Any] | None = None
        self._numel = {name: s.numel for name, (_, s) in window.store.whole.places.items()}
        self._merge: Merge | None = None
        self._out: Arena | None = None

    def measure(self, model: ModelTensors, merge: bool) -> None:
        """Reads the window once after an append: the newest pair's diversity and, if asked, the merge.

        Each rank reads what it keeps; of the diversity one number a tensor is summed over all ranks.
        """
        self._merge = self.diversity = None
        pair, squares, problem = self.window.pair(self.lag), None, None
        try:
            squares = self._merged(model, pair) if merge else None
            if squares is None and pair is not None:
                squares = self._distance(pair)
            if squares is not None and pair is not None:
                ignored = self._copied(model, *pair) | model.buffers
                squares = {n: squares[n] for n in self._numel if n in squares and n not in ignored}
        except Exception as error:
            problem = error
        try:
            self.ranks.agree(problem)
        except BaseException:
            self.forget()  # else the ranks that have one would not merge again with those that have none
            raise
        if squares is not None and pair is not None:
            sums = self.ranks.total(torch.tensor(list(squares.values()), dtype=torch.float64))
            self._record_diversity(dict(zip(squares, sums.tolist(), strict=True)), pair)

    def forget(self) -> None:
        """Drops the merge that was made: the window's snapshots turned out to be of another segment."""
        self._merge = None

    def constant(self, model: ModelTensors) -> set[str]:
        """Names of what is frozen, a buffer or excluded, and alike in the oldest and newest snapshot.

        All ranks have to ask.
        """
        return self._copied(model, self.window.snapshots[0], self.window.snapshots[-1])

    def current(self, model: ModelTensors) -> Merge | None:
        """The merge of the window as it is; ``None`` with fewer than two snapshots to merge."""
        if self._merge is not None and (part := self._merge.arena.frozen) and part not in self.window.held():
            self._merge = None  # its file was spoilt
        if self._merge is None:
            self._merged(model, None)
        return self._merge

    def merge_into(
        self, model: ModelTensors, snapshots: Sequence[Snapshot], method: LinearMethod
    ) -> list[float]:
        """Overwrites the live model with the merge of ``snapshots``; returns the normalised weights.

        Each rank merges what it keeps, in place, and hands it to those that hold the same. All ranks have to.

        Raises:
            ValueError: where the model's tensors are others by now; none is overwritten.
            RemoteError: where that is so on another rank.
            HalfRestoredError: where some are overwritten and others are not, on any rank.
        """

        def prepare() -> tuple[Mapping[str, Tensor], list[float], set[str]]:
            own = self.sharding.own(model.tensors)
            snapshots[-1].arena.check(own)
            weights = method.normalised_weights(positions(snapshots))
            return own, weights, self._copied(model, snapshots[0], snapshots[-1])

        own, weights, copied = self.ranks.agreed(prepare)
        arenas = self._arenas(snapshots[-1])
        try:
            self._overwrite(own, self._factors(snapshots, weights)[: len(arenas)], arenas, copied)
            self.sharding.spread(model.tensors)
        except Exception as error:
            raise HalfRestoredError(f"the live weights are overwritten in part only: {error!r}") from error
        return weights

    def _overwrite(
        self,
        own: Mapping[str, Tensor],
        factors: Sequence[float],
        arenas: Sequence[Arena],
        copied: Collection[str],
    ) -> None:
        """Merges into the live tensors; once more if that fails on a rank, since only they are written."""
        for is_last in (False, True):
            problem = None
            try:
                merge_into(factors, arenas, own, copied)
            except Exception as error:
                problem = error
            try:
                return self.ranks.agree(problem)
            except Exception as error:
                if is_last:
                    raise
                log.warning("merge: the restore failed half way and is made once more: %r", error)
                free_memory()

    def _merged(self, model: ModelTensors, pair: tuple[Snapshot, Snapshot] | None) -> dict[str, float] | None:
        """Sets the merge and returns the squared distances of ``pair``; ``None`` with nothing to merge."""
        snapshots = self.window.segment()
        if len(snapshots) < 2:
            return None
        copied = self._copied(model, snapshots[0], snapshots[-1])  # first: all ranks have a say in it
        method = self.methods[snapshots[-1].phase]
        self._settle()
        self._out = self._room(snapshots[-1].arena, copied)
        trajectory = Trajectory(positions(snapshots), [snapshot.step for snapshot in snapshots])
        weights = None
        if isinstance(method, LinearMethod):
            weights = method.normalised_weights(trajectory.positions)
            squares = merge_arenas(
                self._factors(snapshots, weights),
                self._arenas(),
                self._out,
                copied,
                self._factors(pair, (-1.0, 1.0)) if pair else None,
                self.window.snapshots.index(snapshots[-1]),
            )
        else:
            chains = [self._arenas(snapshot) for snapshot in snapshots]
            merge_tensors(method, chains, self._out, copied, trajectory, self.sharding)
            squares = self._distance(pair) if pair else {}
        self._check_finite(self._out, snapshots)
        self._merge = Merge(self._out, method, snapshots, weights, sorted(copied))
        return squares

    def _room(self, newest: Arena, copied: Collection[str]) -> Arena:
        """Room for the merge. What the newest snapshot gives, out of what it has in common, stays there."""
        shared = newest.shared.intersection(copied)
        if self._out is None or self._out.shared != shared:
            whole = self.window.store.layout
            layout = whole.only(whole.names - shared) if shared else whole
            self._out = Arena.empty(layout.native, newest.buffer.device)
        return self._out.reused().sharing(newest.frozen, shared)

    def _check_finite(self, merged: Arena, snapshots: Sequence[Snapshot]) -> None:
        # A map shows what its file holds by now, and anybody may write to that.
        try:
            self.window.store.check_finite(merged)
            if merged.frozen is not None:
                self.window.store.check_finite(merged.frozen.arena)
        except NonFiniteSnapshotError as error:
            steps = ", ".join(str(snapshot.step) for snapshot in snapshots)
            raise NonFiniteMergeError(f"in the merge of the snapshots of steps {steps} {error}") from None

    def _distance(self, pair: tuple[Snapshot, Snapshot]) -> dict[str, float]:
        return merge_arenas(None, self._arenas(), contrast=self._factors(pair, (-1.0, 1.0)))

    def _arenas(self, last: Snapshot | None = None) -> list[Arena]:
        """Those of the window's snapshots from the oldest on, up to ``last``: it may build on all of them."""
        snapshots = self.window.snapshots
        return [s.arena for s in snapshots[: snapshots.index(last) + 1 if last else None]]

    def _factors(self, snapshots: Sequence[Snapshot], factors: Sequence[float]) -> list[float]:
        """One factor for each of the window's snapshots: 0 for those that none was given for."""
        given = {snapshot.step: factor for snapshot, factor in zip(snapshots, factors, strict=True)}
        return [given.get(snapshot.step, 0.0) for snapshot in self.window.snapshots]

    def _copied(self, model: ModelTensors, oldest: Snapshot, newest: Snapshot) -> set[str]:
        """Names of the tensors that are taken from the newest snapshot: the excluded and the constant ones.

        Frozen parameters and buffers that do not change keep their bits: the mean of equal values is not
        always that value in floating point, and a mask of infinities has none.
        """
        alike = _in_common([oldest.arena, newest.arena])
        still = [n for n in self._numel if n in model.frozen or n in model.buffers]
        asked = [name for name in still if name not in alike]
        before, after = (flat_tensors(self._arenas(snapshot), asked) for snapshot in (oldest, newest))
        changed = torch.tensor([n not in alike and not torch.equal(before[n], after[n]) for n in still])
        if still:  # a part may be constant where the whole is not
            self.ranks.total(changed := changed.int())
        constant = {name for name, some in zip(still, changed.tolist(), strict=True) if not some}
        return constant | model.matching(self.exclude)

    def _record_diversity(self, squares: Mapping[str, float], pair: tuple[Snapshot, Snapshot]) -> None:
        if set(squares) != set(self.metric.names):  # the first pair, or parameters were (un)frozen
            first = self.metric.first
            numel = {name: n for name, n in self._numel.items() if name in squares}
            self.metric = RMSDiversity(numel, sync_on_compute=False)
            self.metric.first = first
        self.metric.reset()
        self.metric.update(squares)
        older, newer = pair
        self.diversity = {
            "rms": float(self.metric.compute()),
            "change_percent": self.metric.change(),
            "lag": self.lag,
            "steps": [older.step, newer.step],
            "tokens": [older.tokens, newer.tokens],
        }


def free_memory() -> None:
    """Gives back what nobody uses, before something is tried again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def positions(snapshots: Sequence[Snapshot]) -> list[float]:
    """Where snapshots lie along the run: their tokens; their steps where tokens are not counted."""
    tokens = [float(s.tokens) for s in snapshots if s.tokens is not None]
    if len(tokens) == len(snapshots) and all(b > a for a, b in pairwise(tokens)):
        return tokens
    return [float(snapshot.step) for snapshot in snapshots]


def merge_arenas(
    weights: Sequence[float] | None,
    arenas: Sequence[Arena],
    out: Arena | None = None,
    copied: Collection[str] = (),
    contrast: Sequence[float] | None = None,
    newest: int = -1,
) -> dict[str, float]:
    """Merges snapshots into ``out`` and measures a distance, reading each arena once.

    Integer and boolean tensors, and those named in ``copied``, are taken from the newest snapshot.

    Args:
        weights: one normalised weight a snapshot, or 0; ``None``: measure only.
        arenas: of a window's snapshots from its oldest on, at least one; whole ones of one layout, or
            differences in one of its ``delta``.
        out: of the same tensors, in any float dtypes (``layout.native`` gives the model's).
        copied: names of tensors that are not averaged.
        contrast: one factor a snapshot; −1 and 1 at two of them, and 0 elsewhere, give their distance.
        newest: index of the newest snapshot that is merged.

    Returns:
        Σ (Σ contrast[i] · snapshot i)² of each floating-point tensor; empty without ``contrast``.
    """
    apart = _in_common(arenas) - (out.layout.names if out is not None else frozenset())
    squares = dict.fromkeys((n for n in apart if _is_floating(arenas[0], n)), 0.0) if contrast else {}
    for group in _groups(arenas, apart, out):
        if group.dtype.is_floating_point:
            squares |= _reduce_group(group, arenas, weights, out, contrast)
    if out is not None:
        _copy_named(arenas[: newest + 1 or None], out, copied)
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
        sharding: which part of each tensor the arenas hold, where there are several ranks.
    """
    several = sharding is not None and sharding.ranks.size > 1
    sources, targets = [flat_tensors(chain) for chain in chains], out.tensors()
    model = []
    _copy_named(chains[-1], out, copied)
    for group in out.layout.groups:
        for name in (segment.name for segment in group.segments):
            if name not in copied and group.dtype.is_floating_point:
                shard = Shard(sharding.kept[name], sharding.ranks) if sharding and several else None
                model.append(Inputs(name, [source[name] for source in sources], shard=shard))
    survey = method.survey(model, trajectory)
    for inputs in model:
        method.merge(inputs, targets[inputs.name].view(-1), trajectory, survey)


def merge_into(
    weights: Sequence[float],
    arenas: Sequence[Arena],
    tensors: Mapping[str, Tensor],
    copied: Collection[str] = (),
) -> None:
    """Merges snapshots straight into live tensors, in place: each is written once, and there is no buffer.

    On a CPU each thread takes those that begin in its part of the snapshots.

    Args:
        weights: one normalised weight a snapshot, or 0.
        arenas: of a window's snapshots from its oldest on.
        tensors: by name, in any dtypes and memory formats, on any device.
        copied: names of tensors that are taken from the newest snapshot, as integer ones always are.
    """
    newest = flat_tensors(arenas, [n for n in tensors if n in copied or not _is_floating(arenas[-1], n)])
    apart = _in_common(arenas).intersection(copied)
    for name, kept in arenas[-1].shared_tensors().items():
        if name in apart:
            overwrite(tensors[name], kept)
    for group in _groups(arenas, apart):
        _merge_group_into(group, *terms(arenas, group, weights), tensors, copied, newest)


def _in_common(arenas: Sequence[Arena]) -> frozenset[str]:
    """The tensors that snapshots have in common, in one place."""
    if any(arena.frozen is not arenas[0].frozen for arena in arenas):
        return frozenset()
    return frozenset.intersection(*(arena.shared for arena in arenas))


def _groups(arenas: Sequence[Arena], apart: Collection[str], out: Arena | None = None) -> Iterator[Group]:
    """What is read in one go: a group of all that one dtype has.

    Where some snapshots have other tensors in common than the rest, in which others have changed since, it is
    tensor by tensor.

    Args:
        arenas: of the snapshots.
        apart: names of what is not to be read.
        out: where the merge is written to.
    """
    layouts = [arena.layout for arena in (*arenas, *([] if out is None else [out]))]
    names = arenas[0].layout.names | arenas[0].shared
    alike = all(layout.names == layouts[0].names for layout in layouts)
    if alike and names == layouts[0].names.union(apart):
        yield from layouts[0].groups
        return
    for name in names.difference(apart):
        yield _holder(arenas[0], name).layout.alone(name)


def _holder(arena: Arena, name: str) -> Arena:
    return arena.frozen.arena if arena.frozen is not None and name in arena.shared else arena


def _is_floating(arena: Arena, name: str) -> bool:
    return _holder(arena, name).layout.places[name][0].dtype.is_floating_point


def _merge_group_into(
    group: Group,
    flats: Sequence[Tensor],
    factors: Sequence[float],
    tensors: Mapping[str, Tensor],
    copied: Collection[str],
    newest: Mapping[str, Tensor],
) -> None:
    def merge(start: int, stop: int) -> None:
        for segment in group.segments:
            if not start <= segment.start < stop:
                continue
            sources = [flat[segment.start : segment.stop] for flat in flats]
            tensor = tensors[segment.name]
            if segment.name in copied or not group.dtype.is_floating_point:
                overwrite(tensor, newest[segment.name].view(segment.shape))
            elif _is_flat(tensor, sources[0].device):
                one_pass(sources, factors, tensor.view(-1))
            else:
                merged = torch.empty_like(sources[0], dtype=tensor.dtype)
                one_pass(sources, factors, merged)
                overwrite(tensor, merged.view(segment.shape))

    in_ranges(group.numel, tensors[group.segments[0].name].device, merge)


def _is_flat(tensor: Tensor, device: torch.device) -> bool:
    """Whether a live tensor can be written to as flat memory."""
    return tensor.is_contiguous() and tensor.device == device and not tensor.is_inference()


def _reduce_group(
    group: Group,
    arenas: Sequence[Arena],
    weights: Sequence[float] | None,
    out: Arena | None,
    contrast: Sequence[float] | None,
) -> dict[str, float]:
    sources, _ = terms(arenas, group, [0.0] * len(arenas))
    if out is not None and group.segments[0].name not in out.layout.names:
        out = None  # it takes what the newest snapshot has in common with others
    squares = one_pass(
        sources,
        terms(arenas, group, weights)[1] if weights and out is not None else None,
        None if out is None else out.find(group)[0],
        terms(arenas, group, contrast)[1] if contrast else None,
        group.stops,
    )
    return {} if squares is None else dict(zip(group.names, squares.tolist(), strict=True))


def _copy_named(arenas: Sequence[Arena], out: Arena, copied: Collection[str]) -> None:
    """Takes over what is not averaged: the integer and boolean tensors, and those named in ``copied``."""
    names = [name for name in copied if name in out.layout.places]
    names += [n for g in out.layout.groups if not g.dtype.is_floating_point for n in g.names]
    for name, tensor in flat_tensors(arenas, names).items():
        out.flat(out.layout.alone(name)).copy_(tensor[:])
