"""Reading a folder that fsspec reaches (``s3://…``, ``gs://…``): its emissions, and a copy of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from merge_callback.checkpoints.file_names import LATEST, PROVENANCE
from merge_callback.checkpoints.merge_record import MergeRecord
from merge_callback.snapshots.files import MOST_METADATA, CorruptFileError, parse_object
from merge_callback.urls import file_system_of


class RemoteFiles:
    """What a remote folder holds; every method may raise whatever its file system raises.

    Args:
        url: of the folder, which need not exist.

    Raises:
        ValueError: for an unknown protocol.
        ImportError: if the package that a protocol needs is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = file_system_of(self.url)

    def names(self, folder: str = "") -> list[str]:
        """What is in the folder, or in one below it; nothing if it does not exist."""
        return self._list(self._path(folder).rstrip("/"))

    def record(self, name: str) -> MergeRecord:
        """What an emission says of itself; an empty record if it does not exist."""
        place = f"{name}/{PROVENANCE}"
        try:
            return MergeRecord.of(parse_object(self._read(place), place), place)
        except (FileNotFoundError, ValueError):
            return MergeRecord(place, {}, {})

    def download(self, target: Path) -> Path:
        """Copies this emission, or that which this ``latest`` names, into a folder; returns where it is then.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        if self._files.isfile(self._root):
            parent, _, pointer = self._root.rpartition("/")
            name = self._read(pointer, parent).decode().strip()
            if PurePosixPath(name).name != name or not name:
                raise FileNotFoundError(f"{self.url}: no published merge, and no name of one")
            self._root = f"{parent}/{name}"
        names = self.names()
        if PROVENANCE not in names:
            remedy = f"did you mean '{self.url}/{LATEST}'?" if LATEST in names else f"it has no {PROVENANCE}"
            raise FileNotFoundError(f"{self.url}: no published merge; {remedy}")
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

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def _read(self, name: str, folder: str | None = None) -> bytes:
        path = self._path(name) if folder is None else f"{folder}/{name}"
        size = self._files.info(path)["size"]
        if size > MOST_METADATA:
            raise CorruptFileError(f"{path}: has {size} bytes, expected metadata, which is smaller")
        content: bytes = self._files.cat_file(path)
        return content


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A local copy of a remote emission, for as long as it is needed.

    Raises:
        FileNotFoundError: if there is no published merge.
    """
    with TemporaryDirectory(prefix="merge-") as folder:
        yield RemoteFiles(url).download(Path(folder))
