"""Many merges of the same checkpoints, each one scored: linear ones in one read of the files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.merging import LinearMethod
from merge_callback.merging.merge import flat_numbers
from merge_callback.offline.alignment import aligned
from merge_callback.offline.candidates import Candidate, Search
from merge_callback.offline.file_merge import FileMerge
from merge_callback.offline.job import Job
from merge_callback.offline.merge_files import with_prefix
from merge_callback.offline.peers import Peers
from merge_callback.offline.sweep_results import SweepResults, fingerprint, key_of
from merge_callback.reduce import one_pass
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.storage import available_memory

Evaluate = Callable[[dict[str, Tensor]], Mapping[str, Any]]
"""Scores a state dict, whose tensors are its own: metrics by name, as numbers or tensors of one element."""


@dataclass(frozen=True)
class Objective:
    """What is to be best.

    Args:
        lower: whether lower is better for a metric; raises ``ValueError`` if that is not known.
        metric: its name; default: the only one.
    """

    lower: Callable[[str], bool]
    metric: str | None = None

    def of(self, metrics: Mapping[str, Any]) -> str:
        """The metric's name among those that were found.

        Raises:
            ValueError: if it is not there, or there are several and none was named.
        """
        names = ", ".join(metrics)
        if self.metric is None and len(metrics) > 1:
            raise ValueError(f"there are several metrics ({names}): say with --select which is to be best")
        found = next(iter(metrics)) if self.metric is None else self.metric
        if found not in metrics:
            raise ValueError(f"--select {found}: the evaluation gives {names}")
        return found

    def score(self, metrics: Mapping[str, Any]) -> float:
        """The metric's value, its sign changed if lower is better; minus infinity for NaN."""
        name = self.of(metrics)
        value = float(metrics[name])
        value = -value if self.lower(name) else value
        return -math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Scored:
    """A candidate with its metrics."""

    candidate: Candidate
    metrics: Mapping[str, float]
    score: float


class Sweep:
    """Merges candidates and has them evaluated, and remembers what was found.

    Args:
        job: the checkpoints, and how merges of them are named and cast; its method is not used.
        evaluate: scores a state dict.
        about: what the scores depend on besides: which evaluation it is.
        objective: what is to be best.
        results: of this sweep, and of the one it goes on with.
        peers: the processes that share the candidates.

    Raises:
        ValueError, OSError: as ``merge_files``.
    """

    def __init__(
        self,
        job: Job,
        evaluate: Evaluate,
        about: object,
        objective: Objective,
        results: SweepResults,
        peers: Peers,
    ) -> None:
        self._evaluate, self.objective = evaluate, objective
        self._results, self._peers = results, peers
        opened = [open_checkpoint(path, results.folder, job.state_key) for path in job.checkpoints]
        job = with_prefix(job, opened[-1])
        self.files = [path for source in opened for path in (*source.files, *source.extras)]
        self._prints = [fingerprint(checkpoint) for checkpoint in opened]
        self._checkpoints = aligned(opened, job.naming.strip or "", job.exclude)
        self.job = job
        self._about = (about, str(job.dtype), list(job.exclude), job.naming.strip, job.naming.prefix)
        self._found: dict[str, Scored] = {}
        known: dict[str, Any] = {}
        for one in peers.exchange(results.known):
            known |= one
        self._known = known

    def run(self, candidates: Sequence[Candidate], searches: Sequence[Search]) -> list[Scored]:
        """Scores candidates, and those that the searches ask for; returns all of them, in that order.

        Raises:
            ValueError: for what can't be merged or scored.
            OSError: if the results can't be kept.
        """
        with tqdm(unit="merge", disable=not self.job.progress or self._peers.rank > 0, delay=1) as bar:
            wanted = list(candidates)
            asked = {search: next(search) for search in searches}
            while wanted or asked:
                wanted += [candidate for some in asked.values() for candidate in some]
                self._score(wanted, bar)
                wanted, answered, asked = [], asked, {}
                for search, some in answered.items():
                    try:
                        asked[search] = search.send([self._found[one.name].score for one in some])
                    except StopIteration:
                        continue
        return [*self._found.values()]

    def _score(self, wanted: Sequence[Candidate], bar: Any) -> None:
        """Finds the scores of those that have none yet, shared out over the processes."""
        new = {one.name: one for one in wanted if one.name not in self._found}
        keys = {name: self._key(one) for name, one in new.items()}
        unknown = [name for name in new if keys[name] not in self._known]
        bar.total = (bar.total or 0) + len(unknown)
        bar.refresh()
        mine: dict[str, Any] = {}
        try:
            for candidate, state in self._merged([new[name] for name in self._peers.share(unknown)]):
                begun = time.monotonic()
                metrics = _checked(self._evaluate(state), candidate.name)
                self.objective.score(metrics)  # refuses what can't be ranked before more is computed
                mine[keys[candidate.name]] = entry = {
                    "candidate": candidate.name,
                    "method": {"name": candidate.method.name, "options": candidate.method.options()},
                    "inputs": [str(self.job.checkpoints[i]) for i in candidate.inputs],
                    "metrics": metrics,
                    "seconds": round(time.monotonic() - begun, 3),
                }
                self._results.add(keys[candidate.name], entry)
                bar.update(self._peers.count)
        except BaseException as error:
            if self._peers.count > 1 and isinstance(error, Exception):
                self._peers.tell({"failed": f"rank {self._peers.rank}: {error}"})
            raise
        for found in self._peers.exchange({"found": {k: self._results.known[k] for k in mine}}):
            if "failed" in found:
                raise OSError(f"another process of this command has failed: {found['failed']}")
            self._known |= found["found"]
        for name, candidate in new.items():
            metrics = {metric: float(v) for metric, v in self._known[keys[name]]["metrics"].items()}
            self._found[name] = Scored(candidate, metrics, self.objective.score(metrics))

    def _key(self, candidate: Candidate) -> str:
        method = candidate.method
        chosen = [(self._prints[i], self._checkpoints[i]) for i in candidate.inputs]
        inputs = [(of_files, checkpoint.step, checkpoint.tokens) for of_files, checkpoint in chosen]
        return key_of(method.name, method.options(), inputs, self._about)

    def _merged(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, dict[str, Tensor]]]:
        """The state dict of each; linear ones together, as many as the memory has room for."""
        linear = [c for c in candidates if isinstance(c.method, LinearMethod)]
        size = sum(tensor.nbytes for tensor in self._checkpoints[-1].tensors.values())
        while linear:
            most = max(1, int(available_memory() / 2 / self._peers.count // max(1, size)))
            group, linear = linear[:most], linear[most:]
            together = [self._merge_of(candidate) for candidate in group]
            outs = _sums(self._checkpoints, [c.inputs for c in group], together)
            for candidate, merge in zip(group, together, strict=True):
                yield candidate, _state(merge, outs.pop(0))
        for candidate in candidates:
            if not isinstance(candidate.method, LinearMethod):
                yield candidate, self._alone(candidate)

    def _merge_of(self, candidate: Candidate) -> FileMerge:
        chosen = [self._checkpoints[i] for i in candidate.inputs]
        paths = [checkpoint.path for checkpoint in chosen]
        return FileMerge(replace(self.job, checkpoints=paths, method=candidate.method), chosen, None)

    @torch.no_grad()
    def _alone(self, candidate: Candidate) -> dict[str, Tensor]:
        merge = self._merge_of(candidate)
        out, survey = _empty(merge), merge.survey()
        for name, tensor in out.items():
            merge.merge(name, tensor, survey)
        return _state(merge, out)


@torch.no_grad()
def _sums(
    checkpoints: Sequence[Checkpoint], inputs: Sequence[Sequence[int]], merges: Sequence[FileMerge]
) -> list[dict[str, Tensor]]:
    """The tensors of several linear merges, each checkpoint's read once."""
    outs = [_empty(merge) for merge in merges]
    rows = [_row(merge, of, len(checkpoints)) for merge, of in zip(merges, inputs, strict=True)]
    used = sorted({i for of in inputs for i in of})
    for name in outs[0]:
        targets = [(merge, out[name], row) for merge, out, row in zip(merges, outs, rows, strict=True)]
        summed = []
        for merge, out, row in targets:
            if merge.is_summed(name):
                summed.append((merge, out, row))
            else:
                merge.merge(name, out)
        if not summed:
            continue
        one_pass(
            [flat_numbers(checkpoints[i].tensors[name]) for i in used],
            [[row[i] for i in used] for *_, row in summed],
            [flat_numbers(out) for _, out, _ in summed],
        )
        for merge, out, _ in summed:
            if not all_finite(out):
                merge.merge(name, out)  # which tells why, or copies it
    return outs


def _row(merge: FileMerge, inputs: Sequence[int], count: int) -> list[float]:
    """What multiplies each of all checkpoints in a linear merge of some."""
    assert isinstance(merge.job.method, LinearMethod)
    row = [0.0] * count
    for i, weight in zip(inputs, merge.job.method.weights_along(merge.trajectory), strict=True):
        row[i] = weight
    return row


def _empty(merge: FileMerge) -> dict[str, Tensor]:
    return {n: torch.empty(t.shape, dtype=merge.dtype_of(t)) for n, t in merge.newest.tensors.items()}


def _state(merge: FileMerge, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A merge by the names that it is published with, also those of shared tensors."""
    tied = {alias: tensors[kept] for alias, kept in merge.newest.tied.items()}
    return {merge.published(name): tensor for name, tensor in {**tensors, **tied}.items()}


def _checked(metrics: object, name: str) -> dict[str, float]:
    """The metrics that an evaluation has returned, as numbers.

    Raises:
        ValueError: if they are anything else.
    """
    if not isinstance(metrics, Mapping) or not metrics:
        kind = "no metrics" if isinstance(metrics, Mapping) else f"a {type(metrics).__name__}"
        raise ValueError(f"the evaluation of {name} returned {kind}, expected metrics by name")
    found = {}
    for metric, value in metrics.items():
        try:
            found[str(metric)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"the evaluation of {name} returned {value!r:.80} for {metric!r}, expected a number"
            ) from None
    return found
