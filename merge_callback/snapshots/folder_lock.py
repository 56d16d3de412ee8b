"""One run at a time in a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

from merge_callback.snapshots.files import CorruptFileError, make_folder, open_own, read_small

LOCK = ".lock"

_SESSION = re.compile(rb"(?:[0-9a-f]{12})?")
_LONGEST = 64  # bytes of the file that are read: more than it ever has


def lock_folder(folder: Path, session: str = "") -> IO[str]:
    """Takes the folder for this process until the returned file is closed or the process ends.

    Where platform or file system know no such locks, nothing is locked.

    Args:
        folder: is created.
        session: whose it is, for ``holder``.

    Raises:
        ValueError: where another run has it, in this process or another, or it can't be created or written.
    """
    try:
        return _lock(folder, session)
    except BlockingIOError:
        reason, mend = "another run is using it", "give each run its own"
    except OSError as error:
        reason, mend = str(error), "name a folder that can be written"
    raise ValueError(f"dirpath={str(folder)!r} can't be used: {reason}; {mend}")


def holder(folder: Path) -> str:
    """The session that took the folder last; empty where none is known."""
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
