"""Running averages of the live weights: in one copy each, on the rank's own part of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_callback.merging.running import PowerEma, RunningAverage
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.live_sources import LiveSources, averaged_layout, lerp
from merge_callback.snapshots.merge import Merge
from merge_callback.snapshots.running_files import RunningFiles
from merge_callback.snapshots.staging import ToHost
from merge_callback.snapshots.window import Window

log = logging.getLogger(__name__)

_RATIO = 1.07
_REACH = 8
MOST_OLDER = math.ceil(math.log(_REACH) / math.log(_RATIO))
"""How many stored copies of a power-function average are kept at most, besides the newest."""


@dataclass
class Running:
    """One running average: its profile, the step of its last update and, from the first one on, values."""

    average: RunningAverage
    at: int | None = None
    arena: Arena | None = None
    is_torn: bool = False  # an update of it was interrupted


@dataclass
class Stored:
    """A copy of a running average as it was after a step; ``file`` is empty until it is written."""

    name: str
    step: int
    arena: Arena
    file: str = ""


class RunningAverages:
    """The running averages of a run, updated after its steps.

    They are kept in fp32 (of fp64 tensors in fp64), of every floating-point tensor that is not left out, in a
    flat arena each, beside the live weights. On CUDA the updates run on a stream of their own: whoever
    is going to write to the live weights calls ``wait`` first, which makes the device wait, not the host.
    A forward pass, which may write to buffers, does not: if there are any, training's stream waits at once.

    Copies go to the window's folder with every snapshot and every checkpoint: a resumed run goes on from
    them, and a restored one goes back to them.

    Args:
        averages: by name.
        tensors: the live ones, or this rank's shards of them.
        left_out: names of those that are not averaged.
        window: the run's window.
        device: of the live model.
    """

    def __init__(
        self,
        averages: Mapping[str, RunningAverage],
        tensors: Mapping[str, Tensor],
        left_out: Collection[str],
        window: Window,
        device: torch.device,
    ) -> None:
        self.by_name = {name: Running(average) for name, average in averages.items()}
        self.window, self.sharding, self.ranks = window, window.store.sharding, window.ranks
        self.layout = averaged_layout(self.sharding, tensors, left_out)
        self._hash = window.store.whole.only(self.layout.names).hash
        self.files = RunningFiles(window.folder, averages, self.sharding, window.store.session, ToHost())
        self._have_buffers = not self.layout.names.isdisjoint(window.store.check_finite.buffers)
        self._device, self._size = device, window.size
        self._sources = LiveSources(self.sharding, self.layout)
        self._places: dict[str, Arena] = {}  # of the copies, by name
        self._copies: dict[str, Stored] = {}
        self._copied_at: int | None = None
        self._out: Arena | None = None
        self._made: Merge | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._is_under_way = False
        self._has_ended = False

    @property
    def nbytes(self) -> int:
        """Bytes of one average on this rank."""
        return self.layout.nbytes

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the copies in files on all ranks at most, without those that older checkpoints need."""
        if self.files.folder is None:
            return 0
        whole = self.window.store.whole.only(self.layout.names).groups
        size = sum(group.numel * (8 if group.dtype == torch.float64 else 4) for group in whole)
        averages = (running.average for running in self.by_name.values())
        counts = (MOST_OLDER if isinstance(average, PowerEma) else 0 for average in averages)
        return size * sum(self._size + count + 2 for count in counts)  # 2: those of the last checkpoints

    def is_due(self, step: int) -> bool:
        """Whether an update is due after a step."""
        return not self._has_ended and any(
            running.average.is_due(running.at, step) for running in self.by_name.values()
        )

    @torch.no_grad()
    def update(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Updates the averages that are due after a step. Nothing waits for the device.

        Args:
            step: optimizer steps taken so far.
            tensors: the live ones (or this rank's shards), which are only read. If they are the same as
                before, the same mapping.
        """
        sources = self._sources.of(tensors)
        with self._on_own_stream():
            for running in self.by_name.values():
                if not running.average.is_due(running.at, step):
                    continue
                if (beta := self._beta(running, step)) < 1:
                    running.is_torn = True  # should a signal come between here and the end
                    self._blend(running, sources, beta)
                    running.is_torn = False
                running.at = step
        if self._have_buffers:
            self.wait()

    def end(self) -> None:
        """Makes no more updates on this rank; the averages are not sound any more."""
        self._has_ended = True
        for running in self.by_name.values():
            running.is_torn = True

    def wait(self) -> None:
        """Has the device finish the updates before what it is told next."""
        if self._is_under_way:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._is_under_way = False

    def copies(self, step: int) -> list[Stored]:
        """Copies of all averages as they are now, to be stored; they stay until the next ones are made.

        One that there is no memory for is left out, which is logged.

        Args:
            step: of the snapshot that is being taken.
        """
        self._settle()
        self._copied_at = step
        for name, running in self.by_name.items():
            self._copies.pop(name, None)
            if running.arena is not None and running.at is not None and not running.is_torn:
                try:
                    self._copies[name] = Stored(name, running.at, self._copy(name, running.arena))
                except (RuntimeError, MemoryError) as error:
                    log.warning("merge: no copy of running average %s at step %s: %s", name, step, error)
        return [*self._copies.values()]

    def store(self, copies: Sequence[Stored]) -> None:
        """Writes copies that were made with a snapshot, and lets go of those that nothing needs any more.

        A failure is logged: what is stored stays.
        """
        for copy in copies:
            problem: object = ""
            try:
                if copy.arena.non_finite():
                    problem = "it is not finite"
                elif not self.files.file(copy.name, copy.step):
                    self.files.write(copy.name, copy.step, copy.arena)
            except (OSError, RuntimeError, MemoryError) as error:
                problem = error
            if problem:
                log.warning("merge: running average %s of step %s: %s", copy.name, copy.step, problem)
        for name, running in self.by_name.items():
            has_older = isinstance(running.average, PowerEma)
            self.files.thin(name, self._size, _RATIO if has_older else None, _REACH)

    @property
    def names(self) -> list[str]:
        """Of those that there are as of the window's newest snapshot, to be validated and published."""
        snapshots = self.window.snapshots
        if not snapshots or snapshots[-1].step != self._copied_at:
            return []
        return [name for name, r in self.by_name.items() if r.average.begins < snapshots[-1].step]

    @torch.no_grad()
    def candidate(self, model: ModelTensors, name: str) -> Merge:
        """An average as of the newest snapshot, in the model's dtypes; see ``engine.candidates.Source``.

        What is not averaged is the snapshot's.

        Raises:
            ValueError: if this rank has none, or it is not finite.
        """
        if (copy := self._copies.get(name)) is None or copy.arena.non_finite():
            raise ValueError(f"the running average {name} is not finite, or its updates have ended")
        snapshots = self.window.snapshots
        if self._made is not None:
            self._made.wait()
        out = self._room(snapshots[-1].arena)
        rest = [tensor for tensor in out.layout.shapes if tensor not in self.layout.names]
        for tensor, values in flat_tensors([s.arena for s in snapshots], rest).items():
            out.flat(tensor).copy_(values[:])
        for tensor, averaged in copy.arena.own_tensors().items():
            out.tensor(tensor).copy_(averaged)
        copied = sorted(self.window.store.layout.names - self.layout.names)
        average = self.by_name[name].average
        self._made = Merge(out, average, [snapshots[-1]], None, copied, name=name)
        return self._made

    def state_dict(self, to_keep: bool = True) -> dict[str, Any]:
        """Everything as primitives; the values are written to files, which it names.

        Talks to no other rank.

        Args:
            to_keep: whether it is a checkpoint's, so that the present values have to be written.
        """
        self._settle()
        return {
            "averages": {
                name: self._state_of(name, running, to_keep) for name, running in self.by_name.items()
            },
            "stored": self.files.state_dict(),
            "layout": self._hash,
        }

    def load_state_dict(self, state: Mapping[str, Any], folder: str, step: int) -> list[str]:
        """Goes on from a ``state_dict``. All ranks call it.

        Args:
            state: of the checkpoint.
            folder: the window's, then.
            step: the checkpoint's number of optimizer steps.

        Returns:
            One line for each average that does not go on as if there had been no break.
        """
        averages = state.get("averages", {}) if state.get("layout") == self._hash else {}
        same = {
            name: running
            for name, running in self.by_name.items()
            if name in averages and averages[name]["average"] == running.average.record()
        }
        stored = {name: steps for name, steps in state.get("stored", {}).items() if name in same}
        self.files.load_state_dict(stored, folder, step)
        lines = [
            f"running average {name} is new, or has other options or tensors now: it begins after step {step}"
            for name in self.by_name
            if name not in same
        ]
        for name, running in same.items():
            at, file = averages[name]["at"], averages[name]["file"]
            problem = "an update of it was interrupted" if at is None else ""
            if problem or (problem := self._load(name, running, [(at, file)])):
                earlier = self.files.up_to(name, step)
                if at is None and not earlier:
                    continue  # it had not begun
                is_lost = self._load(name, running, earlier)
                then = f"begins after step {step}" if is_lost else f"goes on from step {running.at}"
                lines.append(f"running average {name} {then}: {problem}")
        return lines

    def roll_back(self, step: int, now: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what was averaged since a snapshot, as a restored run does not go on from there.

        Each average is what was stored with that snapshot, or with one before. If nothing was, it begins with
        the restored weights. The steps since then count as those of the restored weights. All ranks call it.

        Args:
            step: of the newest snapshot that was restored.
            now: optimizer steps taken so far.
            tensors: the live ones, restored.
        """
        self._settle()
        for name, running in self.by_name.items():
            self.files.drop_newer(name, step)
            has_begun = running.arena is not None
            if self._load(name, running, self.files.up_to(name, step)) and has_begun:
                self._begin(running, self._sources.of(tensors))
                running.at = now
                log.warning("merge: running average %s begins again with the restored weights", name)

    def _beta(self, running: Running, step: int) -> float:
        average = running.average
        if running.at is None or running.is_torn:
            return 0.0  # it begins with what it gets now
        return average.beta(max(average.begins, running.at), step)

    def _blend(self, running: Running, sources: list[Tensor], beta: float) -> None:
        if running.arena is None or beta == 0:
            self._begin(running, sources)
            return
        targets, weight = [*running.arena.own_tensors().values()], 1 - beta
        if running.arena.buffer.device.type == self._device.type:
            lerp(targets, sources, weight, self._sources.are_wide)
            return
        for target, source in zip(targets, sources, strict=True):  # through the device's memory and back
            there = target.to(self._device, non_blocking=True)
            lerp([there], [source], weight, self._sources.are_wide)
            target.copy_(there, non_blocking=True)

    def _begin(self, running: Running, sources: list[Tensor]) -> None:
        self._arena(running).copy_from(dict(zip(self.layout.shapes, sources, strict=True)))

    def _arena(self, running: Running) -> Arena:
        if running.arena is None:
            running.arena = self._empty(running.average.offload)
        return running.arena

    def _empty(self, offload: bool = False) -> Arena:
        if self._stream is None or not offload:
            return Arena.empty(self.layout, self._device)
        with torch.inference_mode(False):
            pinned = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        return Arena(self.layout, pinned)

    def _copy(self, name: str, arena: Arena) -> Arena:
        if name not in self._places:
            try:
                self._places[name] = Arena.empty(self.layout, arena.buffer.device)
            except torch.OutOfMemoryError:
                self._places[name] = Arena.empty(self.layout)
        self._places[name].buffer.copy_(arena.buffer)
        return self._places[name]

    def _room(self, newest: Arena) -> Arena:
        """Room for an average in the model's dtypes; what snapshots have in common stays where it is."""
        shared = newest.shared - self.layout.names
        if self._out is None or self._out.shared != shared:
            whole = self.window.store.layout
            layout = whole.only(whole.names - shared) if shared else whole
            self._out = Arena.empty(layout.native, newest.buffer.device)
        return self._out.reused().sharing(newest.frozen, shared)

    def _on_own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else _OwnStream(self, self._stream)

    def _settle(self) -> None:
        """Waits until the averages may be read from, or written to, outside of their stream."""
        self.wait()
        if self._stream is not None and any(running.average.offload for running in self.by_name.values()):
            self._done.synchronize()

    def _state_of(self, name: str, running: Running, to_keep: bool) -> dict[str, Any]:
        at = None if running.is_torn else running.at
        file = self.files.file(name, at) if at is not None else ""
        if at is not None and running.arena is not None and not file and to_keep:
            try:
                file = self.files.write(name, at, running.arena, of_checkpoint=True)
            except (OSError, RuntimeError, MemoryError) as error:
                log.warning("merge: running average %s is not in this checkpoint: %s", name, error)
        return {"average": running.average.record(), "at": at, "file": file}

    def _load(self, name: str, running: Running, stored: Sequence[tuple[int, str]]) -> str:
        """Loads the newest of some stored copies that all ranks can read; says what is wrong if none is."""
        problem, running.at, running.is_torn = "none was stored", None, False
        everywhere = set[tuple[int, str]].intersection(*map(set, self.ranks.exchange([*stored])))
        for step, file in sorted(everywhere, reverse=True):
            problem = ""
            try:
                self.files.load(file, self._arena(running))
            except (CorruptFileError, OSError) as error:
                problem = str(error) or repr(error)
            problem = next(filter(None, self.ranks.exchange(problem)), "")
            if not problem:
                running.at = step
                break
        return problem


class _OwnStream:
    """In this context the device works on the averages' own stream, after all that it was told before."""

    def __init__(self, averages: RunningAverages, stream: torch.cuda.Stream) -> None:
        self._averages, self._stream = averages, stream
        self._context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._averages._done.record(self._stream)
        self._averages._is_under_way = True
        self._context.__exit__(*error)
