"""The files of snapshots: one of each if the process is alone, else a folder with one of every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.files import CorruptFileError, draft, make_folder, put_in_place
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.safetensors_file import (
    arena_header,
    file_checksum,
    map_arena,
    write_file,
)
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.shard_files import (
    SHARDS,
    gather_shards,
    list_shards,
    listed_shards,
    shard_file,
    shards_name,
    shares,
    write_shard,
)
from merge_callback.snapshots.snapshot import Snapshot, Stored
from merge_callback.snapshots.staging import ToHost


class SnapshotFiles:
    """One file per snapshot, of a process that is alone.

    Args:
        folder: of the files; ``None`` if snapshots are kept in memory only: then nothing is written.
        sharding: which part of each tensor this rank keeps.
        session: of this process and the other ranks'.
        to_host: reads arenas out of device memory.
    """

    def __init__(self, folder: Path | None, sharding: Sharding, session: str, to_host: ToHost) -> None:
        self.folder, self._sharding, self._session, self._to_host = folder, sharding, session, to_host
        self._ranks = sharding.ranks
        self.before_writing: Callable[[], object] = lambda: None  # raises OSError if it may not be done

    @staticmethod
    def of(folder: Path | None, sharding: Sharding, session: str, to_host: ToHost) -> SnapshotFiles:
        """Those of this run's snapshots."""
        kind = SnapshotFiles if sharding.ranks.size == 1 else ShardedFiles
        return kind(folder, sharding, session, to_host)

    def path(self, stored: Stored) -> Path:
        """The file of this rank."""
        assert self.folder is not None
        return self.folder / stored.file

    def own(self, path: Path) -> Path:
        """The file of this rank, of a snapshot whose file or folder is ``path``."""
        return path

    def write(self, stored: Stored, arena: Arena) -> str:
        """Makes a snapshot durable, if there is a folder: every rank writes a file of its own.

        Returns:
            What went wrong on one of the ranks, the same on all; empty if nothing did.
        """
        checksum = problem = ""
        try:
            checksum = self.write_own(stored, arena) if self.folder is not None else ""
        except (OSError, RuntimeError, MemoryError) as error:
            problem = str(error) or repr(error)
        told = self._ranks.exchange((checksum, problem))
        for _, problem in told:
            if problem:
                return problem
        try:
            if self.folder is not None:
                self.commit(stored, [checksum for checksum, _ in told])
        except OSError as error:
            problem = str(error) or repr(error)
        return self._ranks.from_first(problem)

    def write_own(self, stored: Stored, arena: Arena) -> str:
        """Writes the file of this rank; returns its SHA-256.

        Raises:
            OSError: if it can't be written; nothing is left of it.
        """
        self.before_writing()
        if isinstance(stored, Snapshot) and arena.frozen is not None:
            stored.frozen, stored.frozen_checksum = arena.frozen.file, arena.frozen.checksum
        metadata = {"format": "pt"}
        for key, value in stored.record().items():
            if value not in ("", None):
                metadata[key] = str(value)
        metadata["layout"] = arena.layout.hash
        return self._write(stored, arena, metadata)

    def _write(self, stored: Stored, arena: Arena, metadata: Mapping[str, str]) -> str:
        # The name ends in the checksum: two timelines of one run can never take each other's file.
        assert self.folder is not None
        make_folder(self.folder)
        name = f"{stored.kind}step={stored.step:08d}"
        with draft(self.folder, name) as made:
            checksum = write_file(made, arena.layout.entries, self._to_host.chunks(arena.buffer), metadata)
            file = f"{name}-{checksum[:12]}.safetensors"
            put_in_place(made, self.folder / file)
        stored.file, stored.checksum = file, checksum
        return checksum

    def commit(self, stored: Stored, checksums: Sequence[str]) -> None:
        """Completes a snapshot of several files, once every rank has written its own.

        Args:
            stored: updated in place; ``file`` becomes the folder's name, ``checksum`` that of the list in it.
            checksums: of each rank's file.

        Raises:
            OSError: on the first rank, if the list can't be written.
        """

    def discard(self, stored: Stored) -> None:
        """Removes what this rank has written of a snapshot that another could not write."""
        stored.file = stored.checksum = ""
        if isinstance(stored, Snapshot):
            stored.frozen = stored.frozen_checksum = ""

    def checksum(self, stored: Stored, path: Path) -> str:
        """The recorded SHA-256 of this rank's file, of a snapshot at ``path``.

        Raises:
            CorruptFileError, OSError: if the list of all ranks' files is another, or missing.
        """
        return stored.checksum

    def holds_own(self, path: Path, layout: Layout) -> bool:
        """Whether the snapshot at ``path`` has a file of just what this rank keeps now, in this layout."""
        return path.is_file()

    def verified(self, stored: Stored, path: Path, layout: Layout) -> Arena:
        """This rank's file of a snapshot at ``path``, mapped.

        Raises:
            CorruptFileError: if it is not, byte for byte, what was written, or has another layout.
            OSError: if it is missing or unreadable.
        """
        expected, path = self.checksum(stored, path), self.own(path)
        mapped = map_arena(path, layout)
        if file_checksum(path) != expected:
            raise CorruptFileError(f"{path}: the checksum differs from the recorded one")
        return mapped

    def lacks(self, stored: Stored) -> bool:
        """Whether the file of this rank is yet to be written; or once more, as somebody removed it."""
        return self.folder is not None and not (stored.file and self.path(stored).exists())

    def gather(self, path: Path, checksum: str, out: Arena) -> None:
        """Fills ``out`` with what this rank keeps now, from files that were shared out over other ranks.

        Args:
            path: of the snapshot's file or folder.
            checksum: of that file, or of the list in the folder.
            out: of any of this rank's tensors.

        Raises:
            CorruptFileError, OSError: as ``verified``.
        """
        wanted = {name: self._sharding.kept[name] for name in out.layout.names}
        gather_shards(path, checksum, wanted, out.tensors())

    def is_altered(self, stored: Stored) -> bool:
        """Whether this rank's file is not, byte for byte, what was written."""
        assert self.folder is not None
        try:
            expected = self.checksum(stored, self.folder / stored.file)
            return file_checksum(self.path(stored)) != expected
        except FileNotFoundError:  # a removed file stays readable through its map
            return False
        except (CorruptFileError, OSError):
            return True


class ShardedFiles(SnapshotFiles):
    """A folder per snapshot, with a file of every rank and a list of them."""

    def path(self, stored: Stored) -> Path:
        """The file of this rank."""
        return self.own(super().path(stored))

    def own(self, path: Path) -> Path:
        """The file of this rank, of a snapshot whose folder is ``path``."""
        return path / shard_file(self._ranks.rank, self._ranks.size)

    def _write(self, stored: Stored, arena: Arena, metadata: Mapping[str, str]) -> str:
        data = self._to_host.chunks(arena.buffer)
        return write_shard(self._folder_of(stored), self._sharding, arena.layout, data, metadata)

    def commit(self, stored: Stored, checksums: Sequence[str]) -> None:
        """Lists the files of all ranks; see ``SnapshotFiles.commit``."""
        folder = self._folder_of(stored)
        stored.file = folder.name
        stored.checksum = list_shards(folder, checksums, write=self._ranks.is_first)

    def discard(self, stored: Stored) -> None:
        """Removes what this rank has written of a snapshot that another could not write."""
        super().discard(stored)
        if self.folder is None:
            return
        folder = self._folder_of(stored)
        with contextlib.suppress(OSError):
            self.own(folder).unlink(missing_ok=True)
            for path in (*folder.glob(SHARDS), *folder.glob(".*.tmp")) if self._ranks.is_first else ():
                path.unlink()
            folder.rmdir()  # succeeds for the last rank

    def checksum(self, stored: Stored, path: Path) -> str:
        """The recorded SHA-256 of this rank's file; see ``SnapshotFiles.checksum``."""
        return listed_shards(path, stored.checksum)[self.own(path).name]

    def holds_own(self, path: Path, layout: Layout) -> bool:
        """Whether this rank's file, if there is one, holds just what the rank keeps now."""
        return shares(path, self._sharding, arena_header(layout))

    def _folder_of(self, stored: Stored) -> Path:
        assert self.folder is not None
        name = shards_name(stored.step, self._session, stored.difference_to is not None)
        return self.folder / (stored.kind + name)


def names_in(file: Path) -> frozenset[str]:
    """The names of the tensors in a safetensors file."""
    return frozenset(read_header(file).entries)
