"""Files in folders that others may write to: what is opened there, and the order in which it becomes durable.

Whoever prepared such a folder may have put a link, a pipe or a device where a file of ours belongs. So
nothing is written through a link, nothing is read that is not a regular file, and no metadata is read that is
larger than metadata ever is.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

MOST_METADATA = 64 << 20
"""Bytes of the largest metadata file that is read; the index of a model of 140,000 tensors has 14 MB."""

_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class CorruptFileError(ValueError):
    """A file that is not what was written: truncated, altered, or of another layout."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to be read, through a link if it is one.

    Raises:
        CorruptFileError: for a pipe, a device or a folder; nothing is waited for.
        OSError: if it is missing or unreadable.
    """
    _check_regular(path, os.stat(path))  # first: merely to open a device may do something
    file = open(os.open(path, os.O_RDONLY | _NO_WAIT), "rb")  # noqa: SIM115 - the caller's to close
    try:
        _check_regular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def read_small(path: Path, most: int = MOST_METADATA) -> bytes:
    """All of a metadata file.

    Raises:
        CorruptFileError: if it is no regular file, or has more than ``most`` bytes.
        OSError: if it is missing or unreadable.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CorruptFileError(f"{path}: has more than {most} bytes, expected metadata, which is smaller")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a metadata file.

    Raises:
        CorruptFileError: if it is no regular file, too large, or holds anything else.
        OSError: if it is missing or unreadable.
    """
    return parse_object(read_small(path), str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a metadata file that was read already; ``where`` names the file.

    Raises:
        CorruptFileError: if it holds anything else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where}: not sound JSON ({error})") from None
    if not isinstance(content, dict):
        raise CorruptFileError(f"{where}: holds a {type(content).__name__}, expected a JSON object")
    return content


def open_own(path: Path) -> IO[str]:
    """Opens a text file of ours to read and append to, and creates it if it is not there.

    Raises:
        OSError: for a link, which is not followed, a pipe, a device or a folder; or if it can't be opened.
    """
    with suppress(FileNotFoundError):
        _check_own(path, os.lstat(path))
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_WAIT | _NO_LINK
    file = open(os.open(path, flags, 0o666), "a+")  # noqa: SIM115 - the caller's to close
    try:
        _check_own(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def append_line(path: Path, line: str, durable: bool = True) -> None:
    """Adds a line to a text file of ours; a line before it that a kill cut off is ended first.

    Args:
        path: of the file.
        line: without its end.
        durable: wait until it would survive a power loss.

    Raises:
        OSError: if the file is a link, or nothing that can be appended to, or the disk is full.
    """
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            _detach(path)
    with open_own(path) as file:
        size = os.fstat(file.fileno()).st_size
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(f"{chr(10) if torn else ''}{line}\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())
    if durable and not size:
        sync(path.parent)


def plain(value: Any) -> Any:
    """What JSON can hold: it has no NaN and no infinities, so they become strings that ``float`` reads.

    A tensor with one element becomes its number.

    >>> plain({"loss": float("nan"), "steps": (1, 2)})
    {'loss': 'nan', 'steps': [1, 2]}
    """
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__float__") and not isinstance(value, int):
        value = float(value)
        return value if math.isfinite(value) else str(value)
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def copy_file(source: Path, target: Path) -> None:
    """Copies a regular file to a name that nothing has yet.

    Raises:
        CorruptFileError: if the source is no regular file.
        OSError: if it can't be read, or the target is there or can't be written.
    """
    with open_regular(source) as read, open(target, "xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)


def clear(path: Path) -> None:
    """Removes what a draft of ours is to replace: a link itself, not what it leads to.

    Raises:
        OSError: if it can't be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hidden_path(folder: Path, name: str, ending: str = "tmp") -> Path:
    """What this process calls a file or folder that is not to be seen under its name, yet or any more."""
    return folder / f".{name}.{os.getpid()}.{ending}"


def hidden_names(names: str, ending: str = "tmp") -> re.Pattern[str]:
    """Those of any process, for names and endings that match these patterns: what a killed one has left."""
    return re.compile(rf"\.({names})\.\d{{1,10}}\.({ending})", re.DOTALL)


@contextmanager
def draft(folder: Path, name: str) -> Iterator[Path]:
    """A hidden path to make a file or folder at; what is left there in the end is removed.

    Args:
        folder: that the path lies in.
        name: of what is made.

    Raises:
        OSError: if something that is there already can't be removed.
    """
    path = hidden_path(folder, name)
    clear(path)
    try:
        yield path
    finally:
        with suppress(OSError):
            clear(path)


def put_in_place(made: Path, target: Path) -> None:
    """Gives a draft its name, in place of a file of that name, atomically and durably.

    Raises:
        OSError: if it can't be renamed.
    """
    os.replace(made, target)
    sync(target.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A draft that takes the place of ``target`` at the end; what is written into it is the caller's to sync.

    Raises:
        OSError: if it can't be renamed. The file that was there stays.
    """
    with draft(target.parent, target.name) as path:
        yield path
        put_in_place(path, target)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, and makes their names durable.

    Raises:
        OSError: if it can't be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(new):
        with suppress(PermissionError):  # who may not list a folder can make one in it, but not sync it
            sync(folder.parent)


def write_json(path: Path, content: object) -> None:
    """Replaces a JSON file atomically and durably."""
    with replacing(path) as made, open(made, "x") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Makes a file's bytes, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(text: str) -> str:
    """Text on one line, as a terminal may show it.

    A name that somebody else chose may hold sequences that move the cursor, hide or fake lines.

    >>> printable("layer\\x1b[2K\\nchecksums    verified")
    'layer\\\\x1b[2K\\\\nchecksums    verified'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CorruptFileError(f"{path}: is {_kind(found.st_mode)}, expected a regular file")


def _check_own(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(
            f"{path}: is {_kind(found.st_mode)}, expected a regular file of this run's own; remove it"
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    return next((name for test, name in kinds.items() if test(mode)), "a device")


def _detach(path: Path) -> None:
    """Gives a file that has other names, too, bytes of its own: a backup's, or another's altogether."""
    with replacing(path) as own:
        copy_file(path, own)
        sync(own)
