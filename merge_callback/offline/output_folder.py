"""The folder a command makes: complete or not there at all, and in place of nothing but an earlier merge."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from merge_callback.checkpoints.file_names import CARD, PROVENANCE
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.model_folder import named_below
from merge_callback.snapshots.files import CorruptFileError, make_folder, sync
from merge_callback.snapshots.safetensors_file import file_checksum

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux
_RENAME_SWAP = 2  # macOS
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV}


class OutputFolder:
    """A folder to fill that takes the place of ``target`` once it is complete.

    Args:
        target: what is to appear.
        force: replace the merge that is there.
        sources: what is merged: no folder that holds any of it is replaced.

    Raises:
        FileExistsError: if something is there, and ``force`` is not set.
        ValueError: if what is there is no merge and nothing else, or holds something that is merged.
    """

    def __init__(self, target: Path, force: bool, sources: Iterable[Path]) -> None:
        self.target = Path(os.path.abspath(target))  # "." and ".." have names, too
        self.force, self._given, self._sources = force, target, list(sources)
        self._settled = True  # whether what has which name is on the disk
        if not self.target.name:
            raise ValueError(f"{target}: is no folder that can be made; name another one with --output")
        self.check()

    def add_sources(self, sources: Iterable[Path]) -> None:
        """Notes further files that are merged, which the folder must not hold either."""
        self._sources += sources
        self.check()

    def check(self) -> None:
        """Makes sure that nothing is lost when the folder takes its place.

        Raises:
            FileExistsError, ValueError: see above.
        """
        if not os.path.lexists(self.target):
            return
        if not self.force:
            raise FileExistsError(f"{self._given} exists; name another folder, or replace it with --force")
        if reason := _whats_lost(self.target, self._sources):
            raise ValueError(
                f"{self._given}: {reason}; --force replaces nothing but a merge: name another folder"
            )

    @contextmanager
    def draft(self, is_kept: bool = True) -> Iterator[Path]:
        """The folder under a temporary name; it takes its place at the end, and leaves nothing otherwise.

        Args:
            is_kept: if not, it leaves nothing in any case.

        Raises:
            OSError: if it can't be written.
        """
        _sweep(self.target)
        self.check()  # the sweep may have brought back what was to be replaced
        make_folder(self.target.parent)
        draft, lock = _new_draft(self.target)
        try:
            yield draft
            if not is_kept:
                return
            for name, _ in named_below(draft):  # folders last
                sync(draft / name)
            sync(draft)
            self.check()  # a merge takes hours: something else may be there by now
            self._place(draft)
        finally:
            if self._settled:  # else what was replaced may be what a power loss brings back: it stays for now
                _discard(draft)
            if lock is not None:
                os.close(lock)

    def _place(self, draft: Path) -> None:
        """Puts the draft in its place; what it replaces then has the draft's name, or is gone."""
        self._settled = False
        if not os.path.lexists(self.target):
            os.rename(draft, self.target)
        elif not exchange(draft, self.target):
            _rename_twice(draft, self.target)
        sync(self.target.parent)
        self._settled = True


def exchange(one: Path, other: Path) -> bool:
    """Has two folders change names in one step, so that there is never neither; says whether it can be done.

    Raises:
        OSError: if it can be done here, but not with these.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # no C library that is known by that name
        return False
    a, b = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_RENAME_EXCHANGE))
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(a, b, ctypes.c_uint(_RENAME_SWAP))
    else:
        return False
    if not failed:
        return True
    if (number := ctypes.get_errno()) in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _rename_twice(draft: Path, target: Path) -> None:
    """Replaces a folder by two renames, if one can't do it: a kill in between leaves it under ``….old``."""
    lock = _locked(target)
    old = draft.with_suffix(".old")
    try:
        os.rename(target, old)
        try:
            os.rename(draft, target)
        except BaseException:
            os.rename(old, target)
            raise
        sync(target.parent)
        _discard(old)
    finally:
        if lock is not None:
            os.close(lock)


def _whats_lost(target: Path, sources: Iterable[Path]) -> str:
    """Why a folder may not be replaced; empty if it is a merge, or empty itself."""
    if target.is_symlink():
        return f"is a link to {target.readlink()}"
    if not target.is_dir():
        return "is no folder"
    for source in sources:
        if _lies_in(source, target):
            return f"holds {source}, which is merged"
    names = sorted(path.name for path in target.iterdir())
    if not names:
        return ""
    if PROVENANCE not in names:
        return f"has no {PROVENANCE}, and holds {names[0]!r}"
    try:
        own = _own_names(target)
    except (CorruptFileError, OSError) as error:
        return f"its record can't be read ({error})"
    above = {parent.as_posix() for name in own for parent in PurePosixPath(name).parents}
    for name, is_folder in named_below(target):
        if name not in (above if is_folder else own) or (not is_folder and (target / name).is_dir()):
            first = name.partition("/")[0]
            other = name if first in above else first
            return f"holds {other!r}, which is no part of the merge"
    card = target / CARD
    is_edited = CARD in own and card.is_file() and file_checksum(card) != read_record(target).files[CARD]
    return f"its {CARD} was edited" if is_edited else ""


def _own_names(folder: Path) -> set[str]:
    return {PROVENANCE, *read_record(folder).files}


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, or what it links to, is a folder or lies in it, by whatever name that is reached."""
    own = os.stat(folder)
    for place in (Path(os.path.abspath(path)), path.resolve()):
        for above in (place, *place.parents):
            with suppress(OSError):
                if os.path.samestat(os.stat(above), own):
                    return True
    return False


def _new_draft(target: Path) -> tuple[Path, int | None]:
    """A new folder beside the target, locked for as long as this process fills it."""
    while True:
        draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        draft.mkdir()
        lock = _locked(draft)
        if lock is None:
            return draft, None
        with suppress(FileNotFoundError):  # another process took it for a dead one's before it was locked
            if os.path.samestat(os.stat(draft), os.fstat(lock)):
                return draft, lock
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a folder; ``None`` if another process has it, or if there are no such locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, AttributeError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(target: Path) -> None:
    """Puts in order what processes that died left beside a target: theirs are the drafts nobody holds.

    Where there are no locks, nobody can tell, and they stay.
    """
    named = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.(tmp|old)")
    with suppress(OSError):
        for path in [p for p in target.parent.iterdir() if named.fullmatch(p.name)]:
            if (lock := _locked(path)) is None:  # or a link, or no folder
                continue
            with suppress(OSError):
                if os.fstat(lock).st_uid != os.geteuid():
                    pass
                elif path.suffix == ".old" and not os.path.lexists(target):
                    os.rename(path, target)  # it was to be replaced, and is all there is
                    sync(target.parent)
                else:
                    sync(target.parent)
                    _discard(path)
            os.close(lock)


def _discard(folder: Path) -> None:
    """Removes a draft, or the merge that one has replaced: of that, what it lists and nothing else."""
    if not (folder / PROVENANCE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(CorruptFileError, OSError):
        own = _own_names(folder)
        below = sorted(named_below(folder), key=lambda found: found == (PROVENANCE, False))
        for name, is_folder in below:  # the list goes last
            if is_folder:
                with suppress(OSError):  # something came into it
                    os.rmdir(folder / name)
            elif name in own:
                (folder / name).unlink()
        os.rmdir(folder)
    if folder.exists():
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        warnings.warn(f"{folder} is left, because of what came into it: {names}", stacklevel=2)
