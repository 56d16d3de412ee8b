"""A remote store for tests: a folder behind a protocol that Lightning takes for a remote one."""

import hashlib
import json
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

STEPS = ("open", "put_file", "rm_file", "makedirs", "ls", "rmdir")


class Shelf(LocalFileSystem):
    """``shelf://a/b`` is ``<root>/a/b``. Class attributes: every run makes an instance of its own."""

    protocol = "shelf"
    root = ""
    broken: tuple[str, ...] = ()  # the methods that fail
    watch = staticmethod(lambda: None)  # called before everything that is done

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, str) and path.startswith("shelf://"):
            return f"{cls.root}/{path.removeprefix('shelf://')}".rstrip("/")
        return super()._strip_protocol(path)


def _watched(name):
    def act(self, *args, **kwargs):
        Shelf.watch()
        if name in Shelf.broken:
            raise ConnectionError(f"no {name}: the store is out of reach")
        return getattr(super(Shelf, self), name)(*args, **kwargs)

    return act


for _name in STEPS:
    setattr(Shelf, _name, _watched(_name))

fsspec.register_implementation("shelf", Shelf, clobber=True)


def names(url):
    """What is in a remote folder, without what is hidden."""
    files, root = fsspec.core.url_to_fs(url)
    found = [Path(path).name for path in files.ls(root, detail=False)]
    return sorted(name for name in found if not name.startswith("."))


def assert_whole(folder: Path) -> int:
    """Every emission in sight in a folder is complete, and ``latest`` names one; how many there are."""
    records = list(folder.glob("step=*/merge.json"))
    for record in records:
        for name, checksum in json.loads(record.read_text())["files"].items():
            assert hashlib.sha256((record.parent / name).read_bytes()).hexdigest() == checksum
    if (folder / "latest").exists():
        assert (folder / (folder / "latest").read_text() / "merge.json").exists()
    return len(records)
