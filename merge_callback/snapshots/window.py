"""The rolling window of the last N snapshots."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.frozen import FrozenPart
from merge_callback.snapshots.safetensors_file import (
    CorruptFileError,
    arena_header,
    difference,
)
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.storage import DifferenceError, Snapshot, SnapshotStore
from merge_callback.snapshots.window_folder import WindowFolder

log = logging.getLogger(__name__)

_ALTERED = "is not what was written to it"


class Window:
    """The last ``size`` snapshots of a run, oldest first.

    With a folder, every snapshot is one safetensors file in it, named in ``manifest.json``. A file is
    removed once neither the window nor one of the last two checkpoints of the trainer needs it: so a run
    that is killed, even while it saves, finds the window of the checkpoint it resumes from.

    Args:
        size: N.
        store: captures, loads and releases snapshots.
        run_id: of the run; a folder that holds another run's window is moved aside, never written over.
    """

    def __init__(self, size: int, store: SnapshotStore, run_id: str) -> None:
        self.size, self.store = size, store
        self.ranks = store.ranks
        self._latest = -1  # the last step a snapshot was begun at
        self._parts: dict[str, FrozenPart | Exception] = {}  # of the window that is restored, by their files
        self._needed = ""  # the file of what is frozen that the snapshot needs which is being written
        self.snapshots: list[Snapshot] = []
        self.folder = WindowFolder(store.folder, run_id, store.session, keeps=self.ranks.is_first)

    def __len__(self) -> int:
        return len(self.snapshots)

    def capture(
        self, tensors: Mapping[str, Tensor], frozen: Collection[str] = (), step: int = 0
    ) -> Arena | Exception:
        """A copy of what this rank keeps of ``tensors``, or why there is none. Talks to no other rank.

        Args:
            tensors: the live ones.
            frozen: names of those that take no gradient now.
            step: of the snapshot.
        """
        try:
            return self.store.capture(tensors, frozen, step)
        except (ValueError, RuntimeError, MemoryError) as error:
            return error

    def add(self, snapshot: Snapshot, captured: Arena | Exception) -> None:
        """Takes in what every rank has captured as the newest snapshot, and drops the oldest beyond ``size``.

        May be done in another thread than the capture, if nobody else uses the window until then.

        Raises:
            NonFiniteSnapshotError: where a tensor holds NaN or Inf; the window is unchanged.
            ValueError, RuntimeError, MemoryError: where ``captured`` is one; the window is unchanged.
            RemoteError: where another rank could not capture its part; the window is unchanged.
            OSError: where a file can't be written; in memory the snapshot is admitted all the same. Or where
                the window is full and can't let the oldest go.
        """
        self._latest = max(self._latest, snapshot.step)
        self._make_room(captured)
        arena = self._agreed(snapshot, captured)
        try:
            self._write(snapshot, arena)
        finally:
            self._needed = ""
            self._admit(snapshot, arena)
        self._commit()

    def relabel(self, phase: str, since: int) -> None:
        """Puts the snapshots taken after step ``since`` into this segment: a change shows only later."""
        for snapshot in self.snapshots:
            if snapshot.lr_step > since:
                snapshot.phase, snapshot.since = phase, since

    def segment(self) -> list[Snapshot]:
        """The snapshots to merge: the newest two or more of one segment, none of the warm-up or a spike.

        The first snapshot of a decay has nothing to be merged with; until the second one comes, the merge
        is the last one of the stable phase.
        """
        for snapshots in self._segments():
            if len(snapshots) > 1 and snapshots[0].phase != "warmup":
                return snapshots[-self.size :]  # there may be one more, which could not go yet
        return []

    def before_spike(self, last_step: int) -> list[Snapshot]:
        """The snapshots up to ``last_step`` fit to restore: of one segment, oldest first.

        None that was taken while the loss was an outlier. Of the warm-up, during which the weights move too
        far for a mean, the newest one alone, and only where there is nothing else.
        """
        segments = list(self._segments(last_step))
        settled = next((snapshots for snapshots in segments if snapshots[0].phase != "warmup"), [])
        return settled or [snapshots[-1] for snapshots in segments[:1]]

    def _segments(self, last_step: float = float("inf")) -> Iterator[list[Snapshot]]:
        """The clean snapshots up to ``last_step`` by segment, the newest segment first, each oldest first."""
        clean = [s for s in reversed(self.snapshots) if s.step <= last_step and not s.in_spike]
        for _, group in groupby(clean, key=lambda s: (s.phase, s.since)):
            yield list(group)[::-1]

    def mark_in_spike(self, before: int, step: int) -> bool:
        """Notes that the loss of an optimizer step was an outlier; says whether a snapshot was taken there.

        That loss is of the weights before the step, so it tells against the snapshot taken then, too.

        Args:
            before: the count of optimizer steps before it.
            step: the count after it.
        """
        marked = [s for s in self.snapshots if before <= s.step <= step and not s.in_spike]
        for snapshot in marked:
            snapshot.in_spike = True
        return bool(marked)

    def clear_in_spike(self, onset: int) -> None:
        """Takes back what was noted from step ``onset`` on: it was no spike, the data changed."""
        for snapshot in self.snapshots:
            snapshot.in_spike &= snapshot.step < onset - 1

    def drop_newer(self, step: int) -> None:
        """Drops the snapshots taken after ``step``: the run goes on from earlier weights.

        Their files stay for as long as one of the trainer's last two checkpoints needs them.

        Raises:
            OSError: where the manifest can't be written. The window is right all the same.
        """
        while self.snapshots and self.snapshots[-1].step > step:
            self.store.release(self.snapshots.pop())
        self._commit()

    def pair(self, lag: int) -> tuple[Snapshot, Snapshot] | None:
        """The newest snapshot and the one ``lag`` before it, if both come after the warm-up."""
        if len(self.snapshots) <= lag or self.snapshots[-1 - lag].phase == "warmup":
            return None
        return self.snapshots[-1 - lag], self.snapshots[-1]

    def state_dict(self, to_keep: bool = True) -> dict[str, Any]:
        """The window as primitives: its snapshots' records.

        Args:
            to_keep: whether it is a checkpoint's, which needs the files from now on.
        """
        saved = self.folder.saved_with([file for s in self.snapshots for file in (s.file, s.frozen) if file])
        if to_keep:
            self.folder.saved = saved
            with suppress(OSError):  # only a later resume from an older checkpoint would miss it
                self._write_manifest()
        return {
            "folder": str(self.store.folder.absolute()) if self.store.folder else "",
            "layout": self.store.whole.hash,
            "codec": self.store.codec,
            "still": sorted(self.store.whole.still),
            "snapshots": [s.record() for s in self.snapshots],
            "saved": [list(files) for files in saved],
            "moved": sorted(self.store.moved),
        }

    def layout_difference(self, state: Mapping[str, Any]) -> str:
        """How the model of a ``state_dict`` differs from this one, in one line; empty where it does not."""
        layout, codec = self.store.whole, state.get("codec", "")
        if not state["snapshots"]:
            return ""
        if codec != self.store.codec:
            return f"snapshot_codec={codec or None!r} there and {self.store.codec or None!r} here"
        if state["layout"] == layout.hash:
            return ""
        for record in state["snapshots"]:
            with suppress(OSError, CorruptFileError, StopIteration):
                found: dict[str, Any] = {}
                for file in (record["file"], *filter(None, [record.get("frozen")])):
                    found = read_header(next(self.folder.find(file, state["folder"]))).entries | found
                expected = arena_header(layout)
                for entry in (*found.values(), *expected.values()):  # what is kept once lies elsewhere
                    entry.pop("data_offsets", None)
                return (
                    _other_dtype(found, expected) or difference(found, expected) or "the order of the tensors"
                )
        return "their layouts have different hashes"

    def restore(self, state: Mapping[str, Any], last_step: int) -> list[str]:
        """Takes the snapshots of a ``state_dict`` back, up to optimizer step ``last_step``.

        Every file is verified. One that is missing, truncated or altered is left out.

        Returns:
            One line for each snapshot left out: which and why.
        """
        self.snapshots, problems = [], []
        self.store.moved = set(state.get("moved", ()))
        self._parts = {}
        for record in state["snapshots"]:
            if record["step"] > last_step:
                continue
            if problem := self._restore_one(Snapshot(**record), state["folder"]):
                problems.append(f"snapshot of step {record['step']}: {problem}")
        if self.snapshots and (part := self.snapshots[-1].arena.frozen):
            part.names = self.snapshots[-1].arena.shared
            self.store.frozen = part
        self._drop_oldest()
        self.folder.resume(state["saved"])
        self._commit()
        return problems

    def drop_damaged(self) -> list[str]:
        """Drops snapshots whose mapped file is not, byte for byte, what was written, and what builds on them.

        Reads all of the window: before its weights go into the live model, or once a merge showed that
        something is wrong.

        Returns:
            One line for each.
        """
        return self._drop(self._is_altered, _ALTERED, self.held())

    def drop_cut(self) -> list[str]:
        """Drops snapshots whose mapped file was cut: reading past its end would kill the process.

        Returns:
            One line for each.
        """
        return self._drop(self.store.is_cut, "was cut", self.held())

    def _warned(self, lost: list[str]) -> bool:
        for line in lost:
            log.warning("merge: left out of the window: %s", line)
        return bool(lost)

    def _drop(
        self,
        is_damaged: Callable[[Snapshot | FrozenPart], bool],
        what: str,
        among: Sequence[Snapshot | FrozenPart],
    ) -> list[str]:
        if self.store.storage != "disk" or self.store.folder is None:
            return []
        damaged = {stored.file for stored in among if is_damaged(stored)}
        damaged = set().union(*self.ranks.exchange(damaged))
        if self.store.frozen and self.store.frozen.file in damaged:
            self.store.frozen = None  # the next snapshot has all that is frozen with it
        lost: dict[int, str] = {}
        for snapshot in self.snapshots:  # oldest first: a loss takes all that builds on it along
            part = snapshot.arena.frozen
            if part is not None and part.file in damaged:
                lost[snapshot.step] = f"{part.file}, which it has in common with others,"
            elif snapshot.file in damaged or snapshot.difference_to in lost:
                lost[snapshot.step] = f"{snapshot.file}, or what it builds on,"
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.step not in lost]
        return [f"snapshot of step {step}: {file} {what}" for step, file in lost.items()]

    def held(self) -> list[Snapshot | FrozenPart]:
        """The snapshots, and what they have in common."""
        parts = [*(snapshot.arena.frozen for snapshot in self.snapshots), self.store.frozen]
        return [*self.snapshots, *dict.fromkeys(part for part in parts if part is not None)]

    def _is_altered(self, snapshot: Snapshot | FrozenPart) -> bool:
        try:
            return not self.store.is_as_written(snapshot)
        except FileNotFoundError:  # a removed file stays readable through its map
            return False
        except (CorruptFileError, OSError):
            return True

    def _make_room(self, captured: Arena | Exception) -> None:
        """Lets a snapshot go that could not go before: else the window would grow as long as that is so.

        Raises:
            OSError: where it still can't.
        """
        self._drop_oldest()
        if len(self) > self.size:
            if isinstance(captured, Arena):
                self.store.give_back(captured)
            raise OSError(f"the window is full: the snapshot of step {self.snapshots[0].step} can't go yet")

    def _agreed(self, snapshot: Snapshot, captured: Arena | Exception) -> Arena:
        """What this rank has captured, as it is to be kept, if every rank has got hold of its part."""
        problem = captured if isinstance(captured, Exception) else None
        if isinstance(captured, Arena):
            try:
                self.store.check_finite(captured)
                if captured.frozen is not None and not captured.frozen.is_placed:
                    self.store.check_finite(captured.frozen.arena)
            except (ValueError, RuntimeError) as error:
                problem = error
        try:
            self.ranks.agree(problem)
            assert isinstance(captured, Arena)
            captured = self._agreed_in_common(captured)
            if self.store.can_build_on(self.snapshots):
                captured = self.store.at_home(captured)
                return self._difference(snapshot, captured) or captured
        except BaseException:
            if isinstance(captured, Arena):
                self.store.give_back(captured)
            raise
        return captured

    def _agreed_in_common(self, captured: Arena) -> Arena:
        """A captured snapshot that has the same tensors in common with others as that of every rank.

        Raises:
            ValueError: where the file of those tensors is not what was written to it.
        """
        part, captured_with = self.store.frozen, captured.frozen
        is_lost = captured_with is not None and captured_with.file != "" and captured_with is not part
        told = self.ranks.exchange((_digest(captured.shared), bool(part and part.has_moved), is_lost))
        if part is not None and any(has_moved for _, has_moved, _ in told):
            part.has_moved = False  # or is it the file that changed, which they were compared with?
            self._warned(self._drop(self._is_altered, _ALTERED, [part]))
            is_lost = self.store.frozen is None
        if is_lost or any(lost for *_, lost in told):
            raise ValueError(f"what is frozen was compared with a file that {_ALTERED}")
        if len({digest for digest, *_ in told}) == 1:
            return captured
        everywhere = frozenset.intersection(*self.ranks.exchange(captured.shared))
        self.store.moved |= captured.shared - everywhere
        return self.store.sharing_only(captured, everywhere)

    def _difference(self, snapshot: Snapshot, captured: Arena) -> Arena | None:
        """A captured snapshot as the difference to the one before, which then is all that is kept of it.

        Returns:
            ``None`` where the one before turned out to be no longer what was written to its file.

        Raises:
            DifferenceError: where this rank's, or another's, can't be stored.
        """
        problem, difference = None, None
        try:
            difference = self.store.encoded(snapshot, captured, self.snapshots)
        except (ValueError, RuntimeError) as error:
            problem = error
        try:
            self.ranks.agree(problem)
        except Exception:
            snapshot.difference_to = None
            if difference is not None:
                self.store.give_back(difference)
            told = self.ranks.exchange(isinstance(problem, DifferenceError))
            if not (any(told) and self._warned(self.drop_damaged())):
                raise
            return None
        self.store.give_back(captured)
        return difference

    def _admit(self, snapshot: Snapshot, arena: Arena) -> None:
        """Takes a captured snapshot in as the newest one, and lets the oldest beyond ``size`` go.

        Raises:
            RuntimeError: where this rank, or another, can't keep it; the window is unchanged.
        """
        if self._keep(snapshot, arena):
            self.snapshots.append(snapshot)
            self.store.frozen = snapshot.arena.frozen
            self._drop_oldest()

    def _keep(self, snapshot: Snapshot, arena: Arena) -> bool:
        """Gives a snapshot its place in every rank's storage; says whether it has one.

        Raises:
            RuntimeError: where this rank, or another, can't.
        """
        kept, problem = False, None
        try:
            kept = self.store.keep(snapshot, arena)
        except (OSError, ValueError, RuntimeError) as error:
            problem = RuntimeError(f"{error!r} in mapping the new file")
        self.ranks.agree(problem)
        return kept

    def _drop_oldest(self) -> None:
        """Lets the snapshots beyond ``size`` go; what is the difference to one of them is made whole first.

        Where a file can't be written for that, the window stays one longer, until one can.
        """
        while len(self.snapshots) > self.size:
            if self.snapshots[1].difference_to is not None:
                # Once they are summed up and written anew, nothing tells any more that one was altered.
                if self._warned(self._drop(self._is_altered, _ALTERED, self.snapshots[:2])):
                    continue
                try:
                    self._make_whole(self.snapshots[1])
                except (OSError, RuntimeError, MemoryError) as error:
                    log.warning("merge: the window keeps a snapshot more than %s: %s", self.size, error)
                    return
            self.store.release(self.snapshots.pop(0))

    def _make_whole(self, snapshot: Snapshot) -> None:
        """Keeps the second snapshot, the difference to the first one, as it is; in memory if it must.

        Raises:
            OSError: where the window lies on disk and the file can't be written; nothing has changed.
            RuntimeError, MemoryError: where there is no memory for it, likewise.
        """
        arena, problem = None, None
        try:
            arena = self.store.decoded(self.snapshots[:2])
        except (RuntimeError, MemoryError) as error:
            problem = error
        self.ranks.agree(problem)
        assert arena is not None
        whole = replace(snapshot, file="", checksum="", difference_to=None)
        try:
            self._write(whole, arena)
        except OSError as error:
            if self.store.storage == "disk":
                self.store.give_back(arena)
                raise
            log.warning("merge: the snapshot of step %s is in memory only: %s", snapshot.step, error)
        self._keep(whole, arena)
        self.store.release(snapshot)
        vars(snapshot).update(vars(whole))

    def _restore_one(self, snapshot: Snapshot, recorded_folder: str) -> str:
        """Takes one snapshot back; returns what is wrong with it, on this rank or another."""
        problem, arena = "", None
        try:
            self._check_known(snapshot)
            arena = self._load(snapshot, recorded_folder)
        except (CorruptFileError, OSError) as error:
            problem = str(error) or type(error).__name__
        told = self.ranks.exchange((problem, arena is not None))
        if problems := [text for text, _ in told if text]:
            if not problem:
                self.store.give_back(arena) if arena is not None else self.store.release(snapshot)
            return problems[0]
        if not any(anew for _, anew in told):
            self.snapshots.append(snapshot)
            return ""
        if arena is None:  # this rank's file would do, but another rank keeps something else by now
            arena = self.store.taken_out(snapshot)
        try:  # shared out over other ranks than before: it needs new files
            self._write(snapshot, arena)
        except OSError as error:
            problem = str(error)
        finally:
            self._admit(snapshot, arena)
        return problem

    def _frozen_part(self, snapshot: Snapshot, recorded_folder: str) -> FrozenPart | None:
        """What a snapshot has in common with others, from the first sound file; read once for all of them."""
        if not snapshot.frozen:
            return None
        if snapshot.frozen not in self._parts:
            self._parts[snapshot.frozen] = self._load_frozen(snapshot, recorded_folder)
        if isinstance(part := self._parts[snapshot.frozen], Exception):
            raise part
        return part

    def _load_frozen(self, snapshot: Snapshot, recorded_folder: str) -> FrozenPart | Exception:
        problem: Exception = FileNotFoundError(f"{Path(recorded_folder) / snapshot.frozen} is gone")
        own, alone = self.folder.path, self.ranks.size == 1
        for path in self.folder.find(snapshot.frozen, recorded_folder):
            try:
                strange = own is not None and path.parent != own
                if strange and alone:
                    path = self.folder.take_over(path)
                return self.store.load_frozen(snapshot, path, alone or not strange)
            except (CorruptFileError, OSError) as error:
                problem = error
        return problem

    def _check_known(self, snapshot: Snapshot) -> None:
        before = self.snapshots[-1].step if self.snapshots else None
        if snapshot.difference_to not in (None, before):
            raise CorruptFileError(
                f"it is kept as the difference to that of step {snapshot.difference_to}, which is lost"
            )

    def _load(self, snapshot: Snapshot, recorded_folder: str) -> Arena | None:
        """Loads a snapshot from the first sound file of its name, taking it over into the own folder.

        Returns:
            The arena of one that was shared out over other ranks, and so has no file of this rank's.
        """
        problem: Exception = FileNotFoundError(f"{Path(recorded_folder) / snapshot.file} is gone")
        if not snapshot.file:
            problem = FileNotFoundError("it lived in memory only and ended with its process")
        own, part = self.folder.path, self._frozen_part(snapshot, recorded_folder)
        for path in self.folder.find(snapshot.file, recorded_folder):
            try:
                strange = own is not None and path.parent != own
                alike = not (strange and self.ranks.size > 1) and (part is None or part.file)
                if not alike or not self.store.is_shared_out_alike(snapshot, path):
                    return self.store.reshard(snapshot, path, part)
                if strange:
                    path = self.folder.take_over(path)
                self.store.load(snapshot, path, part)
                return None
            except (CorruptFileError, OSError) as error:
                problem = error
        raise problem

    def _write(self, snapshot: Snapshot, arena: Arena) -> None:
        """Writes a snapshot's file, after that of what it has in common with others, where there is none.

        Raises:
            OSError: where this rank, or another, could not write its own. Nothing is left of it.
        """
        if (part := arena.frozen) is not None:
            if any(self.ranks.exchange(self.store.lacks_file(part))):
                self._write_file(part, part.arena)
            self._needed = part.file
        self._write_file(snapshot, arena)

    def _write_file(self, snapshot: Snapshot | FrozenPart, arena: Arena) -> None:
        """Writes one file; on a full disk at the cost of files that only checkpoints need.

        Raises:
            OSError: where this rank, or another, could not write its own. Nothing is left of it.
        """
        while problem := self._write_once(snapshot, arena):
            if not self.folder.saved:
                self.store.discard(snapshot)
                raise OSError(problem)
            files = self.folder.saved.pop(0)
            log.warning("merge: %s: giving up the window of an earlier checkpoint (%s …)", problem, files[:1])
            self._prune()
            self.ranks.exchange(None)  # the first rank has made room

    def _write_once(self, snapshot: Snapshot | FrozenPart, arena: Arena) -> str:
        """Has every rank write its file; returns what went wrong on one of them, the same on all."""
        checksum = problem = ""
        try:
            checksum = self.store.write(snapshot, arena)
        except (OSError, RuntimeError, MemoryError) as error:
            problem = str(error) or repr(error)
        told = self.ranks.exchange((checksum, problem))
        if problem := next((text for _, text in told if text), ""):
            return problem
        try:
            self.store.commit(snapshot, [checksum for checksum, _ in told])
        except OSError as error:
            problem = str(error) or repr(error)
        return self.ranks.from_first(problem)

    def _commit(self) -> None:
        """Writes the manifest, then removes the files nobody needs: a kill in between loses nothing."""
        try:
            self._write_manifest()
        except OSError:  # a full disk, as a rule: what nobody needs makes room
            self._prune()
            self._write_manifest()
        self._prune()

    def _write_manifest(self) -> None:
        self.folder.write_manifest(self.store.whole.hash, [s.record() for s in self.snapshots])

    def _prune(self) -> None:
        held = {self._needed, *(stored.file for stored in self.held()), *(s.frozen for s in self.snapshots)}
        self.folder.prune(held, self._latest)


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256("\0".join(sorted(names)).encode()).hexdigest() if names else ""


def _other_dtype(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In what two headers of the same tensors differ that are stored in other dtypes; else empty."""
    if found.keys() != expected.keys() or any(found[n]["shape"] != expected[n]["shape"] for n in expected):
        return ""
    names = [name for name in expected if found[name]["dtype"] != expected[name]["dtype"]]
    if not names:
        return ""
    there, here = found[names[0]]["dtype"], expected[names[0]]["dtype"]
    return f"{names[0]!r} is {there} there and here {here} ({len(names)} tensors)"
