"""One run at a time in a folder."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from merge_callback.snapshots.files import CorruptFileError, make_folder, open_own, read_small

log = logging.getLogger(__name__)

LOCK = ".lock"

# A power loss may have cut it off, or left zeros in its place.
_SESSION = re.compile(rb"[0-9a-f]{0,12}|(?=.{12}\Z)[0-9a-f]*\0*", re.DOTALL)
_LONGEST = 64  # bytes of the file that are read: more than it ever has


class FolderInUseError(ValueError):
    """A folder that is another run's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"dirpath={str(folder)!r} can't be used: another run is using it; give each run its own"
        )
        self.folder = folder


class FolderLock:
    """Holds a folder for one run, and notices if it is another folder by now.

    One that is deleted or unmounted takes its lock along: what is written under its name then lies in a new
    folder, or on the disk below, which any other run may use as well.

    Args:
        folder: whose it is.
        session: whose it is, for ``holder``.
        file: that is locked.
    """

    def __init__(self, folder: Path, session: str, file: IO[str]) -> None:
        self.folder, self.session, self._file = folder, session, file
        self.claim: Callable[[], object] = lambda: None
        self._told: set[str] = set()
        self._is_closed = self._was_lost = False
        self._one_at_a_time = threading.RLock()  # checked by what is done in the background, too

    def check(self) -> None:
        """Makes sure, before something is written, that the folder is the one that is locked.

        If it is not, the one there is now is locked and claimed instead, which is reported once.

        Raises:
            OSError: if another run has it, or it can't be made, which is reported once, too; if it was lost
                when it was given back.
        """
        with self._one_at_a_time:
            if self._was_lost:
                raise OSError(f"{self.folder} was deleted, moved or unmounted before the run was over")
            if self._is_closed or self._is_held():
                return
            self._file.close()  # first: network file systems may number the very same file anew
            try:
                self._file = _lock(self.folder, self.session)
                self.claim()
            except OSError as error:
                self._file.close()
                another = isinstance(error, BlockingIOError)
                problem = "another run is using the one of that name now" if another else str(error)
                self._tell(f"nothing is written there any more: {problem}")
                raise OSError(f"{self.folder} was deleted, moved or unmounted: {problem}") from None
            self._tell("snapshots and merges go on in the one of that name now, without those before")

    def close(self) -> None:
        """Lets go of the folder."""
        self._was_lost = self._was_lost or not (self._is_closed or self._is_held())
        self._is_closed = True
        self._file.close()

    def _tell(self, consequence: str) -> None:
        if consequence not in self._told:
            self._told.add(consequence)
            log.warning("merge: the folder %s was deleted, moved or unmounted; %s", self.folder, consequence)

    def _is_held(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self._file.fileno()))
        except (OSError, ValueError):  # it is gone, or closed
            return False


def lock_folder(folder: Path, session: str = "") -> FolderLock:
    """Takes the folder for this process until what is returned is closed or the process ends.

    Where platform or file system know no such locks, nothing is locked.

    Args:
        folder: is created.
        session: whose it is, for ``holder``.

    Raises:
        FolderInUseError: if another run has it, in this process or another.
        ValueError: if it can't be created or written.
    """
    try:
        return FolderLock(folder, session, _lock(folder, session))
    except BlockingIOError:
        raise FolderInUseError(folder) from None
    except OSError as error:
        problem = str(error)
    raise ValueError(f"dirpath={str(folder)!r} can't be used: {problem}; name a folder that can be written")


def holder(folder: Path) -> str:
    """The session that took the folder last; empty if none is known."""
    try:
        return read_small(folder / LOCK, _LONGEST).decode()
    except (OSError, CorruptFileError, UnicodeDecodeError):
        return ""


def _lock(folder: Path, session: str) -> IO[str]:
    make_folder(folder)
    file = open_own(folder / LOCK)  # held for as long as the run uses the folder
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):
        pass
    _name_holder(file, folder / LOCK, session)
    # Forked children (data workers) share the lock, and may outlive a run that is killed.
    os.register_at_fork(after_in_child=file.close)
    return file


def _name_holder(file: IO[str], path: Path, session: str) -> None:
    # A file of that name may be somebody else's, by a hard link too: only what a run has written goes.
    if not _SESSION.fullmatch(os.pread(file.fileno(), _LONGEST, 0)):
        file.close()
        raise OSError(f"{path} holds something else than the name of a run; move it away")
    file.truncate(0)
    file.write(session)
    file.flush()
