"""Taking a window's snapshots back from the files that a checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_callback.snapshots.arena import Arena, FrozenPart
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.safetensors_file import arena_header, difference
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.shard_files import a_file
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.snapshot_files import names_in
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window_folder import WindowFolder


class WindowRestore:
    """Finds, verifies and loads the snapshots of one recorded window.

    Args:
        store: of the window that takes them back.
        folder: of that window.
        recorded_folder: in which the files were.
    """

    def __init__(self, store: SnapshotStore, folder: WindowFolder, recorded_folder: str) -> None:
        self._store, self._folder, self._recorded = store, folder, recorded_folder
        self._files, self._ranks = store.files, store.ranks
        self._parts: dict[str, FrozenPart | Exception] = {}  # what snapshots have in common, by its file

    def load(self, snapshot: Snapshot, before: Sequence[Snapshot]) -> tuple[str, Arena | None]:
        """Loads a snapshot on all ranks. Every file is verified.

        Args:
            snapshot: what is known of it; its arena is set unless one is returned.
            before: the snapshots that were taken back.

        Returns:
            What is wrong with it, on this rank or another; empty if nothing is. And its arena, if it has to
            be written and admitted once more, as it was shared out over other ranks.
        """
        problem, arena = "", None
        try:
            known = before[-1].step if before else None
            if snapshot.difference_to not in (None, known):
                raise CorruptFileError(
                    f"it is kept as the difference to that of step {snapshot.difference_to}, which is lost"
                )
            arena = self._load(snapshot)
        except (CorruptFileError, OSError) as error:
            problem = str(error) or type(error).__name__
        told = self._ranks.exchange((problem, arena is not None))
        if problems := [text for text, _ in told if text]:
            if arena is not None:
                self._store.pool.recycle(arena)
            elif not problem:
                self._store.place.release(snapshot.arena)
            return problems[0], None
        if arena is None and any(is_resharded for _, is_resharded in told):
            # This rank's file would do, but another rank keeps something else by now.
            arena = self._store.place.rewritable(snapshot.arena)
        return "", arena

    def _load(self, snapshot: Snapshot) -> Arena | None:
        """Loads a snapshot from the first sound file of its name, taking it over into the own folder.

        Returns:
            The arena of one that was shared out over other ranks, and so has no file of this rank's.
        """
        problem: Exception = FileNotFoundError(f"{Path(self._recorded) / snapshot.file} is gone")
        if not snapshot.file:
            problem = FileNotFoundError("it lived in memory only and ended with its process")
        part = self._frozen_part(snapshot)
        for path in self._folder.find(snapshot.file, self._recorded):
            try:
                is_elsewhere = self._is_elsewhere(path)
                may_stay = not (is_elsewhere and self._ranks.size > 1) and (part is None or part.file)
                own = self._files.own(path)
                if not (
                    may_stay and own.is_file() and self._files.holds_own(path, self._layout(snapshot, own))
                ):
                    return self._reshard(snapshot, path, part)
                if is_elsewhere:
                    path = self._folder.take_over(path)
                layout = self._layout(snapshot, self._files.own(path))
                shared = self._shared(layout, part, path)
                mapped = self._files.verified(snapshot, path, layout)
                snapshot.arena = self._store.place.loaded(mapped).sharing(part, shared)
                return None
            except (CorruptFileError, OSError) as error:
                problem = error
        raise problem

    def _reshard(self, snapshot: Snapshot, path: Path, part: FrozenPart | None) -> Arena:
        """What this rank keeps now, from a snapshot whose files were shared out over other ranks.

        Raises:
            CorruptFileError: if a file that is read is not, byte for byte, what was written.
            OSError: if one is missing or unreadable.
        """
        layout = self._layout(snapshot, a_file(path))
        shared = self._shared(layout, part, path)
        arena = self._store.pool.acquire(layout, self._store.device)
        try:
            self._files.gather(path, snapshot.checksum, arena)
        except (CorruptFileError, OSError):
            self._store.pool.recycle(arena)
            raise
        return arena.sharing(part, shared)

    def _frozen_part(self, snapshot: Snapshot) -> FrozenPart | None:
        """What a snapshot has in common with others, from the first sound file; read once for all of them."""
        if not snapshot.frozen:
            return None
        if snapshot.frozen not in self._parts:
            self._parts[snapshot.frozen] = self._load_frozen(snapshot)
        if isinstance(part := self._parts[snapshot.frozen], Exception):
            raise part
        return part

    def _load_frozen(self, snapshot: Snapshot) -> FrozenPart | Exception:
        problem: Exception = FileNotFoundError(f"{Path(self._recorded) / snapshot.frozen} is gone")
        alone = self._ranks.size == 1
        for path in self._folder.find(snapshot.frozen, self._recorded):
            try:
                is_elsewhere = self._is_elsewhere(path)
                if is_elsewhere and alone:
                    path = self._folder.take_over(path)
                return self._frozen_part_at(snapshot, path, may_stay=alone or not is_elsewhere)
            except (CorruptFileError, OSError) as error:
                problem = error
        return problem

    def _frozen_part_at(self, snapshot: Snapshot, path: Path, may_stay: bool) -> FrozenPart:
        """What a snapshot has in common with others, from its file at ``path``, which is verified.

        Args:
            snapshot: that names it.
            path: of its file or folder.
            may_stay: whether it may stay in that file, if shared out as it is now. Else it has no file yet.

        Raises:
            CorruptFileError: if a file is not, byte for byte, what was written, or has another layout.
            OSError: if it is missing or unreadable.
        """
        names = names_in(a_file(path)) & self._store.layout.names
        layout = self._store.layout.only(names)
        part = FrozenPart(snapshot.step, Arena.empty(Layout(())), names)
        if may_stay and self._files.own(path).is_file() and self._files.holds_own(path, layout):
            part.file, part.checksum = snapshot.frozen, snapshot.frozen_checksum
            part.arena = self._store.place.loaded(self._files.verified(part, path, layout))
            part.is_placed = True
        else:
            part.arena = self._store.pool.acquire(layout, self._store.device)
            self._files.gather(path, snapshot.frozen_checksum, part.arena)
        return part

    def _layout(self, snapshot: Snapshot, file: Path) -> Layout:
        """How a snapshot lies in its arena and file.

        Raises:
            CorruptFileError, OSError: if the file can't tell.
        """
        names = self._store.layout.names - names_in(file) if snapshot.frozen else frozenset()
        layout = self._store.layout.without(names)
        return layout if snapshot.difference_to is None else self._store.coding.packed(layout)

    def _shared(self, layout: Layout, part: FrozenPart | None, path: Path) -> frozenset[str]:
        """What a snapshot of this layout has in common with others."""
        shared = self._store.layout.names - layout.names
        if not shared <= (part.arena.layout.names if part else frozenset()):
            raise CorruptFileError(f"{path}: other tensors than this model's, with those that are frozen")
        return shared

    def _is_elsewhere(self, path: Path) -> bool:
        return self._folder.path is not None and path.parent != self._folder.path


def layout_difference(store: SnapshotStore, folder: WindowFolder, state: Mapping[str, Any]) -> str:
    """How the model of a window's ``state_dict`` differs from this one, in one line; empty if it does not."""
    layout, codec = store.whole, state.get("codec", "")
    if not state["snapshots"]:
        return ""
    if codec != store.codec:
        return f"snapshot_codec={codec or None!r} there and {store.codec or None!r} here"
    if state["layout"] == layout.hash:
        return ""
    for record in state["snapshots"]:
        with suppress(OSError, CorruptFileError, StopIteration):
            found: dict[str, Any] = {}
            for file in (record["file"], *filter(None, [record.get("frozen")])):
                found = read_header(next(folder.find(file, state["folder"]))).entries | found
            expected = arena_header(layout)
            for entry in (*found.values(), *expected.values()):  # what is kept once lies elsewhere
                entry.pop("data_offsets", None)
            return _other_dtype(found, expected) or difference(found, expected) or "the order of the tensors"
    return "their layouts have different hashes"


def _other_dtype(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In what two headers of the same tensors differ that are stored in other dtypes; else empty."""
    if found.keys() != expected.keys() or any(found[n]["shape"] != expected[n]["shape"] for n in expected):
        return ""
    names = [name for name in expected if found[name]["dtype"] != expected[name]["dtype"]]
    if not names:
        return ""
    there, here = found[names[0]]["dtype"], expected[names[0]]["dtype"]
    return f"{names[0]!r} is {there} there and here {here} ({len(names)} tensors)"
