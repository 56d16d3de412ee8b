"""Writes the event file of a run."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_callback.events import EVENTS, FORMAT
from merge_callback.snapshots.files import append_line, open_regular, plain

_BEGINNING = b'{"event": "run"'
"""How an event file begins."""

_LEFT_FREE = 1 << 20
"""Bytes that events leave free besides: a manifest and a record of spikes are worth more."""

log = logging.getLogger(__name__)


class EventFile:
    """The event file of a run, which only its first rank writes.

    A line is one write, so a reader never sees half of two. It is handed to the operating system, but not
    synced: an event is not worth a wait. If it can't be written, that is logged once, and the run goes on.

    Args:
        folder: the run's folder.
        run: what the file says of the run in its first line, and whenever a process takes the run up.
        before_writing: raises an ``OSError`` if the folder belongs to another run by now.
        reserved: gives the bytes of the disk that the window still needs.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        before_writing: Callable[[], object] = int,
        reserved: Callable[[], int] = int,
    ) -> None:
        self._path, self._run = folder / EVENTS, run
        self._before_writing, self._reserved = before_writing, reserved
        self._is_begun = self._has_failed = False
        self._one_at_a_time = threading.Lock()

    def write(self, kind: str, step: int, **entries: Any) -> None:
        """Appends an event; see ``KINDS`` for the entries of each kind.

        Args:
            kind: of the event.
            step: optimizer steps taken by then.
            **entries: numbers (tensors of one element, too), texts, and lists and mappings of them.
        """
        try:
            self._before_writing()
            if shutil.disk_usage(self._path.parent).free < self._reserved() + _LEFT_FREE:
                raise OSError(errno.ENOSPC, "the rest of the disk is left to the window")
            with self._one_at_a_time:
                if not self._is_begun or not self._path.exists():
                    self._check_own()
                    self._append("run", step, {"format": FORMAT, **self._run})
                    self._is_begun = True
                self._append(kind, step, entries)
        except Exception as error:  # the run is worth more than its record
            if not self._has_failed:
                self._has_failed = True
                log.warning(
                    "merge: events could not be written to %s (%r); training goes on", self._path, error
                )

    def _check_own(self) -> None:
        """Raises an ``OSError`` if the file is somebody else's; a line of ours may be cut off, or zeros."""
        with suppress(FileNotFoundError), open_regular(self._path) as file:
            if not _BEGINNING.startswith(file.read(len(_BEGINNING)).strip(b"\0")):
                raise OSError(f"{self._path}: is no event file; move it away")

    def _append(self, kind: str, step: int, entries: Mapping[str, Any]) -> None:
        event = {"event": kind, "time": round(time.time(), 3), "step": step, **entries}
        # In Python, piece by piece: C's encoder would hold the GIL for the 4 ms that 10,000 layers take.
        line = "".join(json.JSONEncoder(allow_nan=False, default=str).iterencode(plain(event)))
        append_line(self._path, line, durable=False)
