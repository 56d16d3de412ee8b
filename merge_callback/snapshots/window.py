"""The rolling window of the last N snapshots."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from merge_callback.snapshots.arena import Arena, FrozenPart
from merge_callback.snapshots.codecs import decoded
from merge_callback.snapshots.live_copy import Captured
from merge_callback.snapshots.segments import Segments
from merge_callback.snapshots.snapshot import DeltaOverflowError, Snapshot, Stored
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window_folder import WindowFolder
from merge_callback.snapshots.window_restore import WindowRestore

log = logging.getLogger(__name__)

_ALTERED = "is not what was written to it"


class Window(Segments):
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
        super().__init__(size)
        self.store = store
        self.ranks = store.ranks
        self._latest = -1  # the last step a snapshot was begun at
        self.folder = WindowFolder(store.folder, run_id, store.session, keeps=self.ranks.is_first)

    def capture(self, tensors: Mapping[str, Tensor], frozen: Collection[str] = (), step: int = 0) -> Captured:
        """Copies what this rank keeps of ``tensors``. Talks to no other rank.

        Args:
            tensors: the live ones.
            frozen: names of those that take no gradient now.
            step: of the snapshot.
        """
        try:
            return Captured(self.store.capture(tensors, frozen, step))
        except (ValueError, RuntimeError, MemoryError) as error:
            return Captured(error=error)

    def add(self, snapshot: Snapshot, captured: Captured) -> None:
        """Takes in what every rank has captured as the newest snapshot, and drops the oldest beyond ``size``.

        May be done in another thread than the capture, if nobody else uses the window until then.

        Raises:
            NonFiniteSnapshotError: if a tensor holds NaN or Inf; the window is unchanged.
            ValueError, RuntimeError, MemoryError: if this rank has captured nothing; the window is unchanged.
            RemoteError: if another rank has captured nothing, or no finite values; the window is unchanged.
            OSError: if a file can't be written; in memory the snapshot is admitted all the same. Or if the
                window is full and can't let the oldest go.
        """
        self._latest = max(self._latest, snapshot.step)
        self._make_room(captured)
        arena = self._checked(captured)
        arena = self._encoded(snapshot, arena)
        try:
            self._write(snapshot, arena)
        finally:
            self._admit(snapshot, arena)
            self._evict()
        self._commit()

    def drop_newer(self, step: int) -> None:
        """Drops the snapshots taken after ``step``: the run goes on from earlier weights.

        Their files stay for as long as one of the trainer's last two checkpoints needs them.

        Raises:
            OSError: if the manifest can't be written. The window is right all the same.
        """
        while self.snapshots and self.snapshots[-1].step > step:
            self.store.place.release(self.snapshots.pop().arena)
        self._commit()

    def state_dict(self, to_keep: bool = True, further: Sequence[str] = ()) -> dict[str, Any]:
        """The window as primitives: its snapshots' records.

        Args:
            to_keep: whether it is a checkpoint's, which needs the files from now on.
            further: other files in the folder that it needs.
        """
        files = [file for s in self.snapshots for file in (s.file, s.frozen) if file]
        saved = self.folder.saved_with([*files, *further])
        if to_keep:
            self.folder.saved = saved
            with suppress(OSError):  # only a later resume from an older checkpoint would miss it
                self._write_manifest()
        return {
            "folder": str(self.store.folder.absolute()) if self.store.folder else "",
            "layout": self.store.whole.hash,
            "codec": self.store.codec,
            "still": sorted(self.store.whole.static),
            "snapshots": [s.record() for s in self.snapshots],
            "saved": [list(files) for files in saved],
            "moved": sorted(self.store.live.moved),
        }

    def restore(self, state: Mapping[str, Any], last_step: int) -> list[str]:
        """Takes the snapshots of a ``state_dict`` back, up to optimizer step ``last_step``.

        Every file is verified. One that is missing, truncated or altered is left out.

        Returns:
            One line for each snapshot left out: which and why.
        """
        self.snapshots, problems = [], []
        self.store.live.moved = set(state.get("moved", ()))
        recorded = WindowRestore(self.store, self.folder, state["folder"])
        for snapshot in [Snapshot(**record) for record in state["snapshots"] if record["step"] <= last_step]:
            problem, arena = recorded.load(snapshot, self.snapshots)
            if arena is not None:
                try:
                    self._write(snapshot, arena)
                except OSError as error:
                    problem = str(error)
                finally:
                    self._admit(snapshot, arena)
            elif not problem:
                self.snapshots.append(snapshot)
            if problem:
                problems.append(f"snapshot of step {snapshot.step}: {problem}")
        if self.snapshots and (part := self.snapshots[-1].arena.frozen):
            part.names = self.snapshots[-1].arena.shared
            self.store.frozen = part
        self._evict()
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
        return self._drop(self.store.files.is_altered, _ALTERED, self.held())

    def drop_cut(self) -> list[str]:
        """Drops snapshots whose mapped file was cut: reading past its end would kill the process.

        Returns:
            One line for each.
        """
        return self._drop(self.store.place.is_cut, "was cut", self.held())

    def held(self) -> list[Stored]:
        """The snapshots, and what they have in common."""
        parts: dict[FrozenPart | None, None] = {}
        for snapshot in self.snapshots:
            parts[snapshot.arena.frozen] = None
        parts[self.store.frozen] = None
        return [*self.snapshots, *filter(None, parts)]

    def _make_room(self, captured: Captured) -> None:
        """Lets a snapshot go that could not go before: else the window would grow as long as that is so.

        Raises:
            OSError: if it still can't.
        """
        self._evict()
        if len(self.snapshots) > self.size:
            if captured.arena is not None:
                self.store.pool.recycle(captured.arena)
            raise OSError(f"the window is full: the snapshot of step {self.snapshots[0].step} can't go yet")

    def _checked(self, captured: Captured) -> Arena:
        """What this rank has captured, if every rank has finite values, with the same tensors in common."""

        def check() -> Arena:
            arena = captured.get()
            self.store.check_finite(arena)
            if arena.frozen is not None and not arena.frozen.is_placed:
                self.store.check_finite(arena.frozen.arena)
            return arena

        try:
            return self._agreed_in_common(self.ranks.agreed(check))
        except BaseException:
            if captured.arena is not None:
                self.store.pool.recycle(captured.arena)
            raise

    def _agreed_in_common(self, arena: Arena) -> Arena:
        """A captured snapshot that has the same tensors in common with others as that of every rank.

        Raises:
            ValueError: if the file of those tensors is not what was written to it.
        """
        part, captured_with = self.store.frozen, arena.frozen
        is_lost = captured_with is not None and captured_with.file != "" and captured_with is not part
        told = self.ranks.exchange((_digest(arena.shared), bool(part and part.has_moved), is_lost))
        if part is not None and any(has_moved for _, has_moved, _ in told):
            part.has_moved = False  # or is it the file that changed, which they were compared with?
            self._warn_of(self._drop(self.store.files.is_altered, _ALTERED, [part]))
            is_lost = self.store.frozen is None
        if is_lost or any(lost for *_, lost in told):
            raise ValueError(f"what is frozen was compared with a file that {_ALTERED}")
        if len({digest for digest, *_ in told}) == 1:
            return arena
        everywhere = frozenset.intersection(*self.ranks.exchange(arena.shared))
        self.store.live.moved |= arena.shared - everywhere
        return self.store.live.sharing_only(arena, everywhere)

    def _encoded(self, snapshot: Snapshot, arena: Arena) -> Arena:
        """A checked snapshot as it is kept; one that builds on the one before, if the codec does so.

        Raises:
            DeltaOverflowError: if this rank's, or another's, can't be stored.
        """
        store = self.store
        if (base := store.coding.base(self.snapshots)) is None:
            return self._to_be_written(arena)

        def encode() -> Arena:
            nonlocal arena
            arena = store.place.moved_in(arena)
            return store.coding.encoded(arena, self.snapshots, store.pool)

        try:
            encoded = self.ranks.agreed(encode)
        except Exception as error:
            has_overflown = any(self.ranks.exchange(isinstance(error, DeltaOverflowError)))
            if has_overflown and self._warn_of(self.drop_damaged()):
                return arena  # the one before is no longer what was written to its file
            store.pool.recycle(arena)
            raise
        store.pool.recycle(arena)
        snapshot.difference_to = base.step
        return encoded

    def _to_be_written(self, arena: Arena) -> Arena:
        try:
            return self.ranks.agreed(partial(self.store.place.to_be_written, arena))
        except BaseException:
            self.store.pool.recycle(arena)
            raise

    def _admit(self, snapshot: Snapshot, arena: Arena) -> None:
        """Takes a snapshot in as the newest one, if it has a place.

        Raises:
            RuntimeError: if this rank, or another, can't keep it; the window is unchanged.
        """
        if self._placed(snapshot, arena):
            self.snapshots.append(snapshot)
            self.store.frozen = snapshot.arena.frozen

    def _placed(self, snapshot: Snapshot, arena: Arena) -> bool:
        """Gives a snapshot its place in every rank's storage; says whether it has one.

        Raises:
            RuntimeError: if this rank, or another, can't.
        """
        placed, problem = False, None
        try:
            placed = self.store.admit(snapshot, arena)
        except (OSError, ValueError, RuntimeError) as error:
            problem = RuntimeError(f"{error!r} in mapping the new file")
        self.ranks.agree(problem)
        return placed

    def _evict(self) -> None:
        """Lets the snapshots beyond ``size`` go; what is the difference to one of them is made whole first.

        If a file can't be written for that, the window stays one longer, until one can.
        """
        while len(self.snapshots) > self.size:
            if self.snapshots[1].difference_to is not None:
                # Once they are summed up and written again, nothing tells any more that one was altered.
                if self._warn_of(self._drop(self.store.files.is_altered, _ALTERED, self.snapshots[:2])):
                    continue
                try:
                    self._make_whole(self.snapshots[1])
                except (OSError, RuntimeError, MemoryError) as error:
                    log.warning("merge: the window keeps a snapshot more than %s: %s", self.size, error)
                    return
            self.store.place.release(self.snapshots.pop(0).arena)

    def _make_whole(self, snapshot: Snapshot) -> None:
        """Keeps the second snapshot, the difference to the first one, as it is; in memory if it must.

        Raises:
            OSError: if the window lies on disk and the file can't be written; nothing has changed.
            RuntimeError, MemoryError: if there is no memory for it, likewise.
        """
        store = self.store
        arena = self.ranks.agreed(partial(decoded, self.snapshots[:2], store.layout, store.pool))
        whole = replace(snapshot, file="", checksum="", difference_to=None)
        try:
            self._write(whole, arena)
        except OSError as error:
            if store.place.needs_files:
                store.pool.recycle(arena)
                raise
            log.warning("merge: the snapshot of step %s is in memory only: %s", snapshot.step, error)
        self._placed(whole, arena)
        store.place.release(snapshot.arena)
        vars(snapshot).update(vars(whole))

    def _drop(self, is_damaged: Callable[[Stored], bool], what: str, among: Sequence[Stored]) -> list[str]:
        if not self.store.place.needs_files:
            return []
        damaged = {stored.file for stored in among if is_damaged(stored)}
        damaged = set().union(*self.ranks.exchange(damaged))
        if not damaged:
            return []
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

    def _warn_of(self, lost: list[str]) -> bool:
        for line in lost:
            log.warning("merge: left out of the window: %s", line)
        return bool(lost)

    def _write(self, snapshot: Snapshot, arena: Arena) -> None:
        """Writes a snapshot's file, after that of what it has in common with others, if that has none.

        Raises:
            OSError: if this rank, or another, could not write its own. Nothing is left of it.
        """
        needed = ""
        if (part := arena.frozen) is not None:
            if any(self.ranks.exchange(self.store.files.lacks(part))):
                self._write_file(part, part.arena)
            needed = part.file
        self._write_file(snapshot, arena, needed)

    def _write_file(self, stored: Stored, arena: Arena, needed: str = "") -> None:
        """Writes one file; on a full disk at the cost of files that only checkpoints need.

        Args:
            stored: what is known of it.
            arena: its content.
            needed: a file that it refers to.

        Raises:
            OSError: if this rank, or another, could not write its own. Nothing is left of it.
        """
        while problem := self.store.files.write(stored, arena):
            if not self.folder.saved:
                self.store.files.discard(stored)
                raise OSError(problem)
            files = self.folder.saved.pop(0)
            log.warning("merge: %s: giving up the window of an earlier checkpoint (%s …)", problem, files[:1])
            self._prune(needed)
            self.ranks.exchange(None)  # the first rank has made room

    def _commit(self) -> None:
        """Writes the manifest, then removes the files nobody needs: a kill in between loses nothing."""
        try:
            self._write_manifest()
        except OSError:  # usually a full disk: what nobody needs makes room
            self._prune()
            self._write_manifest()
        self._prune()

    def _write_manifest(self) -> None:
        self.folder.write_manifest(self.store.whole.hash, [s.record() for s in self.snapshots])

    def _prune(self, needed: str = "") -> None:
        held = {needed}
        for stored in self.held():
            held.add(stored.file)
        for snapshot in self.snapshots:
            held.add(snapshot.frozen)
        self.folder.prune(held, self._latest)


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256("\0".join(sorted(names)).encode()).hexdigest() if names else ""
