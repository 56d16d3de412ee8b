"""A folder that fsspec reaches (``s3://…``, ``gs://…``): emissions appear there whole, or not at all.

Object stores know no renames. So the files of an emission come first and ``merge.json`` last; what has none
is no emission. ``latest`` and ``best`` are small text files with the name of one.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from merge_callback.checkpoints.file_names import PROVENANCE
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.remote_files import RemoteFiles

_UPLOADING = ".uploading"  # holds the id of the run that is writing an emission, or removing it
_MARK = ".run-"  # and the id of the run that a folder belongs to
_MOST_VERSIONS = 1000
_EMISSION = re.compile(r"step=\d+.*", re.DOTALL)


class RemoteFolder(RemoteFiles):
    """What runs write into a remote folder; every method may raise whatever its file system raises."""

    def siblings(self) -> list[str]:
        """What lies beside the folder, and it itself."""
        return self._list(self._root.rpartition("/")[0])

    def claim(self, run_id: str) -> bool:
        """Makes the folder a run's, if there is nothing in it; says whether it is.

        Of several runs that try so at the same time, one gets it at most.
        """
        self._mark(run_id)
        if self.names() == [_MARK + run_id]:
            return True
        self.release(run_id)
        return False

    def release(self, run_id: str) -> None:
        """Takes the mark of a run away again, and the folder, if nothing is in it."""
        self._files.rm_file(self._path(_MARK + run_id))
        self._remove_empty(self._root)

    def check_writable(self, run_id: str) -> None:
        """Writes a small file, and removes it."""
        self._mark(run_id)
        self.release(run_id)

    def emissions_of(self, run_id: str) -> list[str]:
        """The emissions of a run, oldest first; what it left half written, or half removed, is removed."""
        found = []
        for name in filter(_EMISSION.fullmatch, self.names()):
            if self.record(name).run_id == run_id:
                found.append(name)
            elif self._is_unfinished(name, self.names(name), run_id):
                self.remove(name, run_id)
        return found

    def upload(self, source: Path, run_id: str) -> str:
        """Copies an emission here, unless it is here already.

        Args:
            source: its local folder.
            run_id: of the run that made it.

        Returns:
            Its name here: where something else has the local one, ``-v1``, ``-v2``, … is added.
        """
        record = read_record(source)
        for name in (source.name, *(f"{source.name}-v{number}" for number in range(1, _MOST_VERSIONS))):
            held = self.names(name)
            if not held or self._is_unfinished(name, held, run_id):
                self._write_emission(name, held, source, run_id)
                return name
            there = self.record(name)
            if (there.run_id, there.own_files) == (run_id, record.own_files):
                if _UPLOADING in held:
                    self._files.rm_file(self._path(name, _UPLOADING))
                return name
        raise FileExistsError(f"{self.url}/{source.name}: too many versions of it are there already")

    def point(self, pointer: str, name: str) -> None:
        """Has ``latest`` or ``best`` name an emission."""
        self._write(pointer, name)

    def remove(self, name: str, run_id: str) -> None:
        """Removes an emission of a run: first of all what makes it one."""
        self._write(f"{name}/{_UPLOADING}", run_id)
        files = [n for n in self.names(name) if n != _UPLOADING]
        for file in (*sorted(files, key=lambda n: n != PROVENANCE), _UPLOADING):
            self._files.rm_file(self._path(name, file))
        self._remove_empty(self._path(name))

    def _write_emission(self, name: str, left: list[str], source: Path, run_id: str) -> None:
        for file in left:
            self._files.rm_file(self._path(name, file))
        self._files.makedirs(self._path(name), exist_ok=True)
        self._write(f"{name}/{_UPLOADING}", run_id)
        for path in sorted(p for p in source.iterdir() if p.name != PROVENANCE):
            self._files.put_file(str(path), self._path(name, path.name))
        self._write(f"{name}/{PROVENANCE}", (source / PROVENANCE).read_text())
        self._files.rm_file(self._path(name, _UPLOADING))

    def _mark(self, run_id: str) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        self._write(_MARK + run_id, run_id)

    def _remove_empty(self, path: str) -> None:
        with suppress(Exception):  # object stores have no folders that could stay behind
            self._files.rmdir(path)

    def _is_unfinished(self, name: str, held: list[str], run_id: str) -> bool:
        return (
            PROVENANCE not in held
            and _UPLOADING in held
            and self._read(f"{name}/{_UPLOADING}") == run_id.encode()
        )

    def _write(self, name: str, text: str) -> None:
        with self._files.transaction, self._files.open(self._path(name), "wb") as file:
            file.write(text.encode())
