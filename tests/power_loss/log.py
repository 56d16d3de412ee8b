"""Every operation on the files below a folder, in order and with their bytes, while processes work there.

Functions of `os` that change names or make something durable are wrapped. Before and after each of them, the
whole folder is read: what changed is what is recorded. So a record never depends on how the arguments of a
call are understood, and what is written by C code or through a memory map is seen at the next call. What is
not seen: intermediate contents of a file between two such calls (`states` makes up its own), and locks.

A file is known by a number of its own, whatever its names are. Records are JSON objects with one of the keys
``new`` (a number; with its kind), ``names`` (changes that happen as one: folder, name, and the number that it
stands for from now on), ``write`` (a number; with the SHA-256 of its bytes), ``sync`` (a number) and ``mark``
(what the run has told somebody by then).
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

CHANGE = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "truncate")
SYNC = tuple(name for name in ("fsync", "fdatasync") if hasattr(os, name))
REAL = {name: getattr(os, name) for name in (*CHANGE, *SYNC)}

ROOT = 0
"""The number of the folder that is watched."""

UNSEEN = "unseen"


class Recorder:
    """Records what this process does to the files below ``root``; others may do so at the same time.

    Args:
        root: there and durable already, with all that lies in it.
        log: a folder elsewhere, for the records.
        exchange: whether this system can exchange two names.
    """

    def __init__(self, root, log, exchange=True):
        self.root, self.log, self.pid = Path(root), Path(log), os.getpid()
        self.exchange = exchange
        (self.log / "blobs").mkdir(parents=True, exist_ok=True)
        self._ids = {}  # by inode, of what has a name
        self._names, self._contents = {}, {}
        self._read = self._count = 0  # bytes of the log that were read, and records that are known here
        self._one_at_a_time = threading.RLock()
        with self._alone() as write:
            if not self._count:
                write({"new": ROOT, "kind": "folder", "inode": os.stat(root).st_ino})
                self._look(write, "there before")
                for number in sorted({ROOT, *self._ids.values()}):
                    write({"sync": number})

    @contextmanager
    def recording(self):
        """Within, operations of this process are recorded."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGE:
                patch.setattr(os, name, self._wrapped(name, REAL[name]))
                accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 has its own references
                if hasattr(accessor, name):
                    patch.setattr(accessor, name, staticmethod(getattr(os, name)))
            for name in SYNC:
                patch.setattr(os, name, self._syncing(REAL[name]))
            patch.setattr(ctypes.CDLL, "__getattr__", lambda library, name: self._symbol(library, name))
            yield self
        self.mark("end", None)

    def mark(self, what, value):
        """Notes that ``what`` was told to somebody, or may be relied on, from now on."""
        with self._alone() as write:
            self._look(write, UNSEEN)
            write({"mark": what, "value": value})

    def _wrapped(self, label, function):
        def call(*args, **kwargs):
            if os.getpid() != self.pid:  # a forked worker
                return function(*args, **kwargs)
            with self._alone() as write:
                self._look(write, UNSEEN)
                try:
                    return function(*args, **kwargs)
                finally:
                    self._look(write, label)

        return call

    def _syncing(self, function):
        def call(descriptor):
            if os.getpid() != self.pid:
                return function(descriptor)
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            with self._alone() as write:
                self._look(write, UNSEEN)  # what is written during the call may or may not be part of it
                function(descriptor)
                known = self._ids.get(os.fstat(number).st_ino)
                if known is not None and os.fstat(number).st_dev == os.stat(self.root).st_dev:
                    write({"sync": known, "path": self._path(known)})

        return call

    def _path(self, number):
        """Where a file or folder is, below the root; of several places any."""
        places = {target: place for place, target in self._names.items()}
        names = []
        while number in places:
            number, name = places[number]
            names.insert(0, name)
        return "/".join(names)

    def _symbol(self, library, name):
        """`renameat2` is called in the C library itself, since `os` does not have it."""
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        function = library[name]
        if name == "renameat2":
            function = self._wrapped(name, function) if self.exchange else _not_there
        setattr(library, name, function)
        return function

    @contextmanager
    def _alone(self):
        with self._one_at_a_time, open(self.log / "records.jsonl", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read)
            for line in file:
                self._know(json.loads(line))
            alive = set(self._names.values()) | {ROOT}
            self._ids = {inode: number for inode, number in self._ids.items() if number in alive}

            def write(record):
                file.write(json.dumps(record).encode() + b"\n")
                self._know(record)

            try:
                yield write
            finally:
                file.flush()
                self._read = file.tell()

    def _know(self, record):
        self._count += 1
        if "new" in record:
            self._ids[record["inode"]] = record["new"]
        elif "write" in record:
            self._contents[record["write"]] = record["sha"]
        for folder, name, number in record.get("names", ()):
            if number is None:
                self._names.pop((folder, name), None)
            else:
                self._names[folder, name] = number

    def _look(self, write, label):
        """Records how the folder differs from what is known."""
        found, changes = {}, []
        for folder, entry in _entries(self.root):
            found_at = (self._ids[folder], entry.name)
            number = self._ids.get(entry.inode())
            if number is None:
                number = self._count + 1
                link = os.readlink(entry.path) if entry.is_symlink() else None
                kind = "link" if link else "folder" if entry.is_dir() else "file"
                write({"new": number, "kind": kind, "target": link, "inode": entry.inode()})
                if kind == "file":  # made by `open`, whatever is called now
                    write({"names": [[*found_at, number]], "label": "open"})
            found[found_at] = number
            if self._names.get(found_at) != number:
                changes.append([*found_at, number])
            if entry.is_file(follow_symlinks=False):
                self._look_into(write, entry.path, number)
        gone = [[*place, None] for place in self._names if place not in found]
        if gone or changes:
            write({"names": gone + changes, "label": label})
        alive = set(found.values()) | {ROOT}
        self._ids = {inode: number for inode, number in self._ids.items() if number in alive}

    def _look_into(self, write, path, number):
        content = Path(path).read_bytes()
        sha = hashlib.sha256(content).hexdigest()
        if sha != self._contents.get(number, EMPTY):
            blob = self.log / "blobs" / sha
            if not blob.exists():
                blob.write_bytes(content)
            write({"write": number, "sha": sha, "label": "write"})


def _not_there(*arguments):
    ctypes.set_errno(errno.ENOSYS)
    return -1


EMPTY = hashlib.sha256(b"").hexdigest()


def _entries(folder):
    """Everything below a folder, from above; each with the inode of the folder it is in."""
    inode = os.stat(folder).st_ino
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) in (
            stat.S_IFREG,
            stat.S_IFDIR,
            stat.S_IFLNK,
        ):
            yield inode, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)


class Log:
    """What a `Recorder` has recorded."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.records = [json.loads(line) for line in (self.folder / "records.jsonl").open()]
        self._blobs = {EMPTY: b""}

    def blob(self, sha):
        """The bytes with this SHA-256."""
        if sha not in self._blobs:
            self._blobs[sha] = (self.folder / "blobs" / sha).read_bytes()
        return self._blobs[sha]

    def keep(self, content):
        """Notes bytes that nobody wrote; returns their SHA-256."""
        sha = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / sha).write_bytes(content)
        return sha

    @property
    def start(self):
        """The first record that is an operation of the run: what is before it was there and durable."""
        syncs = (i for i, record in enumerate(self.records) if "sync" not in record)
        first = next(i for i, record in enumerate(self.records) if "sync" in record)
        return next(i for i in syncs if i > first)

    @property
    def operations(self):
        """How many operations the run has made: changes of names, writes and syncs."""
        return sum("mark" not in record and "new" not in record for record in self.records[self.start :])

    @property
    def unseen(self):
        """Changes of names that no wrapped function made; of several, the order is not known."""
        return [record for record in self.records if record.get("label") == UNSEEN]
