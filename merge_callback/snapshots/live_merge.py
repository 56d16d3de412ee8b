"""Merging snapshots straight into the live model: each tensor is written once, and there is no buffer."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from merge_callback.reduce import one_pass
from merge_callback.reduce.ranges import in_ranges
from merge_callback.sharding import Ranks, overwrite
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.arena_merge import groups, in_common, is_floating
from merge_callback.snapshots.deltas import delta_weights, flat_tensors
from merge_callback.snapshots.layout import Group
from merge_callback.snapshots.staging import Fill, copying, send

log = logging.getLogger(__name__)


class HalfRestoredError(RuntimeError):
    """Live weights that are neither the run's nor restored: nothing may be trained with or saved."""


def merge_into_all(
    ranks: Ranks,
    weights: Sequence[float],
    arenas: Sequence[Arena],
    tensors: Mapping[str, Tensor],
    copied: Collection[str],
    known: Mapping[str, Tensor],
) -> None:
    """As ``merge_into``, on all ranks; once more if that fails on one, since only live tensors are written.

    Raises:
        Exception: what failed on this rank the second time.
        RemoteError: if it failed on another rank.
    """
    for is_last in (False, True):
        try:
            return ranks.agreed(partial(merge_into, weights, arenas, tensors, copied, known))
        except Exception as error:
            if is_last:
                raise
            log.warning("merge: the restore failed half way and is made once more: %r", error)
            free_memory()


def merge_into(
    weights: Sequence[float],
    arenas: Sequence[Arena],
    tensors: Mapping[str, Tensor],
    copied: Collection[str] = (),
    known: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Merges snapshots straight into live tensors, in place.

    On a CPU each thread takes those that begin in its part of the snapshots.

    Args:
        weights: one normalised weight per snapshot, or 0.
        arenas: of a window's snapshots from its oldest on.
        tensors: by name, in any dtypes and memory formats, on any device.
        copied: names of tensors that are taken from the newest snapshot, as integer ones always are.
        known: merges of other tensors that were made already, flat.
    """
    newest = flat_tensors(arenas, [n for n in tensors if n in copied or not is_floating(arenas[-1], n)])
    given = {**newest, **known}
    apart = in_common(arenas).intersection(copied)
    for name, kept in arenas[-1].shared_tensors().items():
        if name in apart:
            overwrite(tensors[name], kept)
    for group in groups(arenas, apart):
        stored = [arena.find(group) for arena in arenas]
        flats = [flat for flat, _ in stored]
        _merge_group_into(group, flats, delta_weights(stored, weights), tensors, given)


def free_memory() -> None:
    """Gives back what nobody uses, before something is tried again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _merge_group_into(
    group: Group,
    flats: Sequence[Tensor],
    factors: Sequence[float],
    tensors: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> None:
    def merge(start: int, stop: int) -> None:
        sent: list[tuple[Tensor, Fill]] = []
        for segment in group.segments:
            if not start <= segment.start < stop:
                continue
            sources = [flat[segment.start : segment.stop] for flat in flats]
            tensor, known = tensors[segment.name], given.get(segment.name)
            if tensor.is_cuda and not (sources[0] if known is None else known).is_cuda:
                sent.append((tensor, copying(known) if known is not None else _merging(sources, factors)))
            elif known is not None:
                overwrite(tensor, known.view(segment.shape))
            elif _is_flat(tensor, sources[0].device):
                one_pass(sources, factors, tensor.view(-1))
            else:
                merged = torch.empty_like(sources[0], dtype=tensor.dtype)
                one_pass(sources, factors, merged)
                overwrite(tensor, merged.view(segment.shape))
        if sent:
            send(sent)

    in_ranges(group.numel, tensors[group.names[0]].device, merge)


def _merging(sources: Sequence[Tensor], factors: Sequence[float]) -> Fill:
    """Has a tensor on a GPU overwritten with a merge of what lies in host memory."""

    def fill(part: Tensor, start: int, stop: int) -> None:
        one_pass([source[start:stop] for source in sources], factors, part)

    return fill


def _is_flat(tensor: Tensor, device: torch.device) -> bool:
    """Whether a live tensor can be written to as flat memory."""
    return tensor.is_contiguous() and tensor.device == device and not tensor.is_inference()
