"""What a power loss would leave of a folder, by the strictest reading of POSIX, while real files are written.

A name lasts once the folder it is in was synced, a file's bytes once the file was; a removal may last at
once. So of each moment there are two extremes to judge: the names that were synced less all that was removed,
and the names as they are. In both, a file whose bytes were never synced is torn.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

REAL = {
    name: getattr(os, name) for name in ("fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")
}


class Disk:
    """Folders below ``root`` as they would be found again.

    Args:
        root: there and durable already.
        judge: is called with a function that lists a folder's lasting content, after each operation; what it
            raises fails the test.
    """

    def __init__(self, root, judge):
        self.root, self.judge = root, judge
        self.names = {root.stat().st_ino: dict(_listing(root))}  # of each folder, by its inode
        self.synced = set()  # inodes of files
        self.operations = 0

    @contextmanager
    def watched(self):
        with pytest.MonkeyPatch.context() as patch:
            for name in REAL:
                patch.setattr(os, name, getattr(self, f"_{name}"))
            yield

    def lasting(self, *parts):
        """The names in a folder after the power loss, each with its inode; ``None`` where it is not there."""
        inode = self.root.stat().st_ino
        for part in parts:
            inode = self.names.get(inode, {}).get(part)
        return self.names.get(inode)

    def now(self, *parts):
        """The same, if all names had lasted."""
        place = self.root.joinpath(*parts)
        return dict(_listing(place)) if place.is_dir() else None

    def _fsync(self, descriptor):
        REAL["fsync"](descriptor)
        inode, path = os.fstat(descriptor).st_ino, Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.names[inode] = dict(_listing(path))
        else:
            self.synced.add(inode)
        self._done()

    def _mkdir(self, path, *args, **kwargs):
        REAL["mkdir"](path, *args, **kwargs)
        self.names[os.stat(path).st_ino] = {}  # where an inode is used again, too
        self._done()

    def _rename(self, source, target, **kwargs):
        REAL["rename"](source, target, **kwargs)
        self._done()

    def _replace(self, source, target, **kwargs):
        REAL["replace"](source, target, **kwargs)
        self._done()

    def _unlink(self, path, *, dir_fd=None):
        found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        self._forget(path, dir_fd)
        REAL["unlink"](path, dir_fd=dir_fd)
        if found.st_nlink == 1:
            self.synced.discard(found.st_ino)
        self._done()

    _remove = _unlink

    def _rmdir(self, path, *, dir_fd=None):
        REAL["rmdir"](path, dir_fd=dir_fd)
        self._forget(path, dir_fd)
        self._done()

    def _forget(self, path, dir_fd):
        folder = os.fstat(dir_fd) if dir_fd is not None else os.stat(os.path.dirname(path) or ".")
        self.names.get(folder.st_ino, {}).pop(os.path.basename(path), None)

    def _done(self):
        self.operations += 1
        self.judge(self, self.lasting)
        self.judge(self, self.now)


def _listing(folder):
    return [(entry.name, entry.inode()) for entry in os.scandir(folder)]


def assert_whole(disk, found, record):
    """A folder's content has all the files of its record, every byte of them."""
    names = {"merge.json", *record["files"]}
    assert names <= found.keys(), f"without {names - found.keys()}"
    assert all(found[name] in disk.synced for name in names), "torn"


def record_of(folder):
    return json.loads((folder / "merge.json").read_text())
