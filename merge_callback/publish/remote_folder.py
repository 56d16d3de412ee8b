"""A folder that fsspec reaches (``s3://…``, ``gs://…``): emissions appear there whole, or not at all.

Object stores know no renames. So the files of an emission come first and ``merge.json`` last; what has none
is no emission. ``latest`` is a small text file with the name of the newest one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from merge_callback.checkpoints.file_names import LATEST, PROVENANCE
from merge_callback.snapshots.files import MOST_METADATA, CorruptFileError, read_object

_UPLOADING = ".uploading"  # holds the id of the run that is writing an emission, or removing it
_MARK = ".run-"  # and the id of the run that a folder belongs to
_MOST_VERSIONS = 1000
_EMISSION = re.compile(r"step=\d+.*", re.DOTALL)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of another than the local file system."""
    protocol, found, _ = str(path).partition("://")
    return bool(found) and protocol not in ("file", "local")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A local path, also of a ``file://`` URL."""
    if not re.match(r"(file|local):", str(path)):
        return Path(path).expanduser()
    from fsspec.implementations.local import LocalFileSystem

    return Path(LocalFileSystem._strip_protocol(str(path)))


class RemoteFolder:
    """What is done in a remote folder; every method may raise whatever its file system raises.

    Args:
        url: of the folder, which need not be there.

    Raises:
        ValueError: for an unknown protocol.
        ImportError: where the package that a protocol needs is missing.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        # An instance of its own: Lightning saves checkpoints in transactions, in another thread, and one
        # that it ends must not end ours.
        self._files, root = url_to_fs(self.url, skip_instance_cache=True)
        self._root = root.rstrip("/")

    def names(self, folder: str = "") -> list[str]:
        """What is in the folder, or in one below it; nothing if it does not exist."""
        return self._list(self._path(folder).rstrip("/"))

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
            if self._record(name).get("run_id") == run_id:
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
        record = read_object(source / PROVENANCE)
        for name in (source.name, *(f"{source.name}-v{number}" for number in range(1, _MOST_VERSIONS))):
            held = self.names(name)
            if not held or self._is_unfinished(name, held, run_id):
                self._write_emission(name, held, source, run_id)
                return name
            there = self._record(name)
            if (there.get("run_id"), there.get("files")) == (run_id, record["files"]):
                if _UPLOADING in held:
                    self._files.rm_file(self._path(name, _UPLOADING))
                return name
        raise FileExistsError(f"{self.url}/{source.name}: too many versions of it are there already")

    def point_latest(self, name: str) -> None:
        """Has ``latest`` name an emission."""
        self._write(LATEST, name)

    def remove(self, name: str, run_id: str) -> None:
        """Removes an emission of a run: first of all what makes it one."""
        self._write(f"{name}/{_UPLOADING}", run_id)
        files = [n for n in self.names(name) if n != _UPLOADING]
        for file in (*sorted(files, key=lambda n: n != PROVENANCE), _UPLOADING):
            self._files.rm_file(self._path(name, file))
        self._remove_empty(self._path(name))

    def download(self, target: Path) -> Path:
        """Copies this emission, or that which this ``latest`` names, into a folder; returns where it is then.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        if self._files.isfile(self._root):
            parent, _, pointer = self._root.rpartition("/")
            name = self._read(pointer, parent).strip()
            if PurePosixPath(name).name != name or not name:
                raise FileNotFoundError(f"{self.url}: no published merge, and no name of one")
            self._root = f"{parent}/{name}"
        names = self.names()
        if PROVENANCE not in names:
            mend = f"did you mean '{self.url}/{LATEST}'?" if LATEST in names else f"it has no {PROVENANCE}"
            raise FileNotFoundError(f"{self.url}: no published merge; {mend}")
        folder = target / PurePosixPath(self._root).name
        folder.mkdir()
        for name in names:
            if self._files.isfile(self._path(name)):
                self._files.get_file(self._path(name), str(folder / name))
        return folder

    def _list(self, path: str) -> list[str]:
        self._files.invalidate_cache()
        try:
            found = self._files.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(p).name for p in found if p.rstrip("/") != path)

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

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def _record(self, name: str) -> dict[str, Any]:
        """What an emission says of itself; nothing if it does not exist."""
        try:
            record = json.loads(self._read(f"{name}/{PROVENANCE}"))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _is_unfinished(self, name: str, held: list[str], run_id: str) -> bool:
        return PROVENANCE not in held and _UPLOADING in held and self._read(f"{name}/{_UPLOADING}") == run_id

    def _read(self, name: str, folder: str | None = None) -> str:
        path = self._path(name) if folder is None else f"{folder}/{name}"
        size = self._files.info(path)["size"]
        if size > MOST_METADATA:
            raise CorruptFileError(f"{path}: has {size} bytes, expected metadata, which is smaller")
        content: bytes = self._files.cat_file(path)
        return content.decode()

    def _write(self, name: str, text: str) -> None:
        with self._files.transaction, self._files.open(self._path(name), "wb") as file:
            file.write(text.encode())


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A local copy of a remote emission, for as long as it is needed.

    Raises:
        FileNotFoundError: where there is no published merge.
    """
    with TemporaryDirectory(prefix="merge-") as folder:
        yield RemoteFolder(url).download(Path(folder))
