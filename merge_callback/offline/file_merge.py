"""One merge of checkpoint files that belong together, tensor by tensor."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.merge_record import versions
from merge_callback.checks import matches_any
from merge_callback.merging import Inputs, LinearMethod, Trajectory
from merge_callback.merging.merge import flat_numbers, is_averaged
from merge_callback.merging.power_iteration import recompute, vectors_of
from merge_callback.offline.alignment import aligned, published_name
from merge_callback.offline.compatibility import check_mergeable, check_patterns
from merge_callback.offline.job import Job
from merge_callback.offline.output import ModelFiles
from merge_callback.offline.peers import Peers
from merge_callback.offline.shared_merge import Merge, gathered, send_share
from merge_callback.offline.workers import each, numbers
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.frozen import same_bytes

_FEW = 4096  # elements, which tell most tensors that differ


class FileMerge:
    """One merge of files that were found to belong together."""

    def __init__(self, job: Job, checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> None:
        given = [*([] if base is None else [base]), *checkpoints]
        check_patterns(job, given)
        same = aligned(given, job.naming.strip or "", job.exclude)
        self.job, self.checkpoints, self.base = job, same[-len(checkpoints) :], base and same[0]
        self.newest = checkpoints[-1]
        self.trajectory = trajectory_of(checkpoints)
        self.arranged, self.places = job.method.arranged(self.checkpoints, self.trajectory)
        check_mergeable(job, self.checkpoints, self.base)
        # What Lightning loads must have the names of the module as it is, with its wrappers.
        as_it_is = job.kind == "lightning" and not job.naming.strip
        self._plain_name = str if as_it_is else published_name(given, job.naming.strip or "")
        job.naming.check(
            [name for checkpoint in reversed(given) for name in checkpoint.tensors],
            [self.published(name) for name in (*self.newest.tensors, *self.newest.tied)],
        )
        self.recomputed = {
            name: names
            for name, names in vectors_of(self.newest.tensors).items()
            if not any(n in self.newest.copied or matches_any(n, job.exclude) for n in (name, names[0]))
        }
        self.copied = {
            name
            for name, tensor in self.newest.tensors.items()
            if not is_averaged(tensor) or name in self.newest.copied or matches_any(name, job.exclude)
        } - self.recomputed.keys()
        self._constant = numbers(self.newest.tensors)  # 1: not finite, and the same everywhere

    def published(self, name: str) -> str:
        """A tensor's name in the output."""
        return self.job.naming.prefix + self._plain_name(name)

    def outputs(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to write, on the meta device, and the further names of shared ones."""
        published = self.published
        tensors = {
            published(name): torch.empty(tensor.shape, dtype=self.dtype_of(tensor), device="meta")
            for name, tensor in self.newest.tensors.items()
        }
        return tensors, {published(alias): published(kept) for alias, kept in self.newest.tied.items()}

    def run(self, files: ModelFiles, peers: Peers) -> None:
        """Merges tensor by tensor, in the order of the files."""
        names = {self.published(name): name for name in self.newest.tensors}
        total = len(self.checkpoints) * sum(t.nbytes for t in self.newest.tensors.values())
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=not self.job.progress)
        with bar, closing(self._merged(files.tensors, peers)) as merged:
            for published in merged:
                files.done(published)
                bar.update(len(self.checkpoints) * self.newest.tensors[names[published]].nbytes)

    def help(self, order: Sequence[str], peers: Peers) -> None:
        """Merges this process's part of the tensors for rank 0, which has them in that order."""
        outs, _ = self.outputs()
        with peers.group():
            send_share(self._one(), outs, {name: outs[name].nbytes for name in order}, peers)

    def _merged(self, outs: Mapping[str, Tensor], peers: Peers) -> Generator[str, None, None]:
        """The names in the output, in their order, each as its tensor is merged."""
        merge, sizes = self._one(), {published: tensor.nbytes for published, tensor in outs.items()}
        if peers.count == 1:
            yield from each(lambda published: merge(published, outs[published]), sizes, self.job.workers)
            return
        names = {self.published(name): name for name in self.newest.tensors}
        with peers.group(), closing(gathered(merge, outs, sizes, peers)) as merged:
            for published, is_constant in merged:
                if is_constant:
                    self._constant[names[published]].fill_(1)
                yield published

    def _one(self) -> Merge:
        """Merges one tensor by its name in the output."""
        names, survey = {self.published(name): name for name in self.newest.tensors}, self.survey()

        def merge(published: str, out: Tensor) -> bool:
            self.merge(names[published], out, survey)
            return bool(self._constant[names[published]])

        return merge

    def survey(self) -> Any:
        """What the method has to know of the whole model before it merges a tensor of it."""
        return self.job.method.survey(_Model(self), self.places)

    def is_summed(self, name: str) -> bool:
        """Whether a linear method forms a sum of a tensor: it isn't copied, nor the same everywhere."""
        special = name in self.copied or name in self.recomputed
        return not special and not _are_same(self.inputs(name))

    @property
    def not_finite(self) -> set[str]:
        """What holds NaN or Inf, the same in all checkpoints, and is copied therefore: buffers and masks."""
        return {name for name, is_constant in self._constant.items() if is_constant}

    def is_constant(self, inputs: Inputs) -> bool:
        """Whether a tensor is not finite, but has the same bits everywhere.

        Raises:
            ValueError: if it is not finite, and differs.
        """
        sources = [*self.arranged, *([self.base] if self.base else [])]
        tensors = [*inputs.tensors, *([inputs.base] if inputs.base is not None else [])]
        spoilt = [s for s, tensor in zip(sources, tensors, strict=True) if not all_finite(tensor)]
        if not spoilt:
            return False
        if len(spoilt) == len(tensors) and all(same_bytes(tensors[0], other) for other in tensors[1:]):
            self._constant[inputs.name].fill_(1)
            return True
        raise ValueError(
            f"tensor {inputs.name!r} of {spoilt[0].path} holds NaN or Inf; leave that checkpoint "
            "out, or copy the tensor with --exclude"
        )

    def inputs(self, name: str) -> Inputs:
        """One tensor of all checkpoints, in the order that the method takes them."""
        tensors = [flat_numbers(checkpoint.tensors[name]) for checkpoint in self.arranged]
        return Inputs(name, tensors, None if self.base is None else flat_numbers(self.base.tensors[name]))

    def record(self) -> dict[str, Any]:
        """The provenance."""
        method = self.job.method
        linear = isinstance(method, LinearMethod) and self.base is None
        state = {name for checkpoint in self.checkpoints for name in checkpoint.training_state}
        return {
            **common_record(self.job, self.checkpoints, self.base, self.trajectory),
            "weights": method.weights_along(self.trajectory) if linear else None,  # type: ignore[attr-defined]
            "copied": sorted(self.copied.union(self.not_finite)),
            **({"not_finite": sorted(self.not_finite)} if self.not_finite else {}),
            **({"recomputed": sorted(self.recomputed)} if self.recomputed else {}),
            **({"training_state": sorted(state)} if state else {}),
            "stripped_prefix": self.job.naming.strip or "",
            "prefix": self.job.naming.prefix,
        }

    def merge(self, name: str, out: Tensor, survey: Any = None) -> None:
        """Writes one tensor's merge, or copies it.

        Args:
            name: as the last checkpoint calls it.
            out: of its shape, contiguous.
            survey: what the method's has found.

        Raises:
            ValueError: for values that are not finite; the tensor is named.
        """
        if name in self.copied:
            out.copy_(self.newest.tensors[name])
            return
        if name in self.recomputed:
            self._merge_vectors(name, out, survey)
            return
        inputs = self.inputs(name)
        linear = isinstance(self.job.method, LinearMethod)
        # What did not train stays as it is, to the last bit. A linear sum shows what is not finite.
        if _are_same(inputs) if linear else self.is_constant(inputs):
            out.copy_(self.newest.tensors[name])
        else:
            self.job.method.merge(inputs, flat_numbers(out), self.places, survey)
        if not all_finite(out):
            if not self.is_constant(inputs):
                raise ValueError(
                    f"tensor {inputs.name!r}: the merge does not fit {out.dtype}; choose a wider --dtype"
                )
            out.copy_(self.newest.tensors[name])

    def _merge_vectors(self, name: str, out: Tensor, survey: Any) -> None:
        """Finds a singular vector of spectral norm again, for the merged weight; each of a pair by itself."""
        weight, *vectors = self.recomputed[name]
        own = {
            n: self.newest.tensors[n].to(self.dtype_of(self.newest.tensors[n]), copy=True) for n in vectors
        }
        merged = self.newest.tensors[weight]
        own[weight] = torch.empty(merged.shape, dtype=self.dtype_of(merged))
        self.merge(weight, own[weight], survey)
        recompute([self.recomputed[name]], own.__getitem__)
        out.copy_(own[name])

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype that a tensor of the last checkpoint has in the merge."""
        if not tensor.is_floating_point():
            return tensor.dtype
        return self.job.dtype or self.newest.dtypes.get(tensor.dtype, tensor.dtype)


class _Model:
    """Every tensor that is merged, to be read as often as a method wants."""

    def __init__(self, merging: FileMerge) -> None:
        self.merging = merging

    def __iter__(self) -> Iterator[Inputs]:
        for name in self.merging.newest.tensors:
            if name not in self.merging.copied and name not in self.merging.recomputed:
                inputs = self.merging.inputs(name)
                if not self.merging.is_constant(inputs):
                    yield inputs


def _are_same(inputs: Inputs) -> bool:
    """Whether a tensor is the same everywhere, also in the base."""
    first, *others = [*inputs.tensors, *([] if inputs.base is None else [inputs.base])]
    return all(torch.equal(first[:_FEW], other[:_FEW]) for other in others) and all(
        torch.equal(first, other) for other in others
    )


def trajectory_of(checkpoints: Sequence[Checkpoint]) -> Trajectory:
    """Where the checkpoints lie along their run: their tokens, else their steps, else evenly spaced."""
    even = Trajectory.even(len(checkpoints))
    steps = _ascending([checkpoint.step for checkpoint in checkpoints])
    tokens = _ascending([checkpoint.tokens for checkpoint in checkpoints])
    return Trajectory(tokens or steps or even.positions, steps or even.steps)


def _ascending(numbers: Sequence[int | None]) -> list[int] | None:
    known = [number for number in numbers if number is not None]
    ascending = len(known) == len(numbers) and all(a < b for a, b in pairwise(known))
    return known if ascending else None


def common_record(
    job: Job, checkpoints: Sequence[Checkpoint], base: Checkpoint | None, trajectory: Trajectory
) -> dict[str, Any]:
    """What the record of every merge of files says, of models and of adapters."""
    method = job.method
    return {
        "format": 1,
        "method": {"name": method.name, "options": method.options(), "reference": method.reference},
        "inputs": [_described(checkpoint) for checkpoint in checkpoints],
        "base": None if base is None else _described(base),
        "positions": list(trajectory.positions),
        "step": checkpoints[-1].step,
        "tokens": checkpoints[-1].tokens,
        **job.provenance,
        "versions": versions(),
    }


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    files = {path.name: path.stat().st_size for path in checkpoint.files}
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "files": files,
    }
