"""Whether checkpoints, and what is to be done with them, belong together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checks import matches_any
from merge_callback.merging import MergeMethod, Sma, Weighted, check_alike
from merge_callback.merging.merge import is_averaged
from merge_callback.offline.adapters import check_adapters
from merge_callback.offline.job import Job
from merge_callback.snapshots.capture import clean_name
from merge_callback.snapshots.layout import check_storable


def check_patterns(job: Job, given: Sequence[Checkpoint]) -> None:
    """Makes sure that every pattern of ``exclude`` matches a tensor, as the checkpoints call it.

    Raises:
        ValueError: for one that does not.
    """
    for pattern in job.exclude:
        names = (name for checkpoint in given for name in checkpoint.tensors)
        if not any(
            matches_any(name, [pattern]) or matches_any(clean_name(name), [pattern]) for name in names
        ):
            raise ValueError(
                f"--exclude {pattern!r} matches no tensor; the first is {next(iter(given[-1].tensors))!r}"
            )


def check_mergeable(job: Job, checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> None:
    """Makes sure that the checkpoints, and the options, belong together; warns of doubtful ones.

    Args:
        job: what is to be done.
        checkpoints: oldest first, with the names of the last.
        base: θ_init, if it is not the first of them.

    Raises:
        ValueError: if they do not; the tensor or the option is named.
    """
    check_weights(job.method, len(checkpoints))
    if base is not None and "task vectors" not in job.method.needs:
        raise ValueError(f"method {job.method.name!r} uses no base; leave --base out")
    _check_tensors(job, [*checkpoints, *([base] if base else [])], checkpoints[-1])
    _warn_of_order(job, checkpoints)
    _warn_of_phases(checkpoints)
    check_adapters(checkpoints)
    for name, tensor in checkpoints[-1].tensors.items():
        check_storable(name, tensor)
        if not is_averaged(tensor) and not matches_any(name, job.exclude):
            _check_equal(name, checkpoints)


def check_weights(method: MergeMethod, count: int) -> None:
    """Makes sure that there is a weight for each of ``count`` checkpoints, if weights are given.

    Raises:
        ValueError: if there is not.
    """
    if isinstance(method, Weighted) and len(method.weights) != count:
        raise ValueError(f"{len(method.weights)} weights for {count} checkpoints; give one each")


def _check_tensors(job: Job, everything: Sequence[Checkpoint], newest: Checkpoint) -> None:
    check_alike([(str(checkpoint.path), _included(checkpoint.tensors, job)) for checkpoint in everything])
    for checkpoint in everything:
        if _included(checkpoint.tied, job) != _included(newest.tied, job):
            raise ValueError(f"tied weights differ between {checkpoint.path} and {newest.path}")


def _warn_of_order(job: Job, checkpoints: Sequence[Checkpoint]) -> None:
    steps = [checkpoint.step for checkpoint in checkpoints]
    known = [step for step in steps if step is not None]
    if known != sorted(known) and not isinstance(job.method, (Sma, Weighted)):
        warnings.warn(
            f"the checkpoints' steps are {steps}: merged as given, the first as the oldest",
            stacklevel=3,
        )


def _warn_of_phases(checkpoints: Sequence[Checkpoint]) -> None:
    segments: dict[tuple[str, int | None], list[int | None]] = {}
    for checkpoint in checkpoints:
        if checkpoint.segment is not None:
            segments.setdefault(checkpoint.segment, []).append(checkpoint.step)
    if len(segments) > 1:
        told = "; ".join(f"{phase}: {', '.join(map(str, s))}" for (phase, _), s in segments.items())
        warnings.warn(
            f"the snapshots are of several phases of the learning rate ({told}), and a merge across phases "
            "is worse than one within: choose one phase with --from and --to",
            stacklevel=3,
        )


def _included(entries: Mapping[str, Any], job: Job) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if not matches_any(name, job.exclude)}


def _check_equal(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Integers cannot be averaged: they must agree, except for single counters (batches tracked, say)."""
    newest = checkpoints[-1]
    for checkpoint in checkpoints[:-1]:
        tensor = checkpoint.tensors[name]
        if tensor.numel() > 1 and not torch.equal(tensor, newest.tensors[name]):
            known = tensor.dtype in (torch.int64, torch.bool)  # others may be codes of weights
            advice = ". Use --exclude to copy it from the last checkpoint" if known else ""
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} and differs between {checkpoint.path} and "
                f"{newest.path}; integers cannot be averaged{advice}"
            )
