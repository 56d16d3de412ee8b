"""One run at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

LOCK = ".lock"


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
        return (folder / LOCK).read_text()
    except OSError:
        return ""


def _lock(folder: Path, session: str) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a")  # noqa: SIM115 - held for as long as the run uses the folder
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):
        pass
    file.truncate(0)
    file.write(session)
    file.flush()
    # Forked children (data workers) share the lock, and may outlive a run that is killed.
    os.register_at_fork(after_in_child=file.close)
    return file
