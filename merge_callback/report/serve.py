"""Shows the page of runs that are going on, and draws it again whenever their files have changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from merge_callback.events import EVENTS
from merge_callback.report.history import find_run
from merge_callback.report.page import page, read_runs
from merge_callback.report.sections import record_of
from merge_callback.snapshots.files import read_small

_REFRESH = """
let seen = null;
setInterval(async () => {
  try {
    const now = await (await fetch("changed")).text();
    if (seen !== null && now !== seen) location.reload();
    seen = now;
  } catch { }
}, 3000);
"""


def server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page, for this machine alone; its ``serve_forever`` shows it until it is interrupted.

    Args:
        folders: the runs'.
        port: 0 for any that is free.

    Raises:
        OSError: if the port is taken.
    """
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, folders))


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, folders: Sequence[Path], *args: object) -> None:
        self._folders = folders
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        try:
            if path == "/":
                self._answer("text/html", self._page().encode(errors="replace"))
            elif path == "/changed":
                self._answer("text/plain", self._state().encode(errors="replace"))
            else:
                self._answer("application/json", self._record(unquote(path)))
        except (OSError, ValueError) as error:
            self._answer("text/plain", str(error).encode(errors="replace"), 404)

    def log_message(self, *_: object) -> None:
        return

    def _page(self) -> str:
        return page(read_runs(self._folders), Path("/"), _REFRESH)

    def _state(self) -> str:
        """What changes whenever an event is written."""
        files = [(find_run(folder) / EVENTS).stat() for folder in self._folders]
        return ",".join(f"{file.st_mtime_ns} {file.st_size}" for file in files)

    def _record(self, path: str) -> bytes:
        """The record of a merge that the page links to; no other file is shown to anybody.

        Raises:
            ValueError: for any other path.
        """
        runs = read_runs(self._folders)
        records = [record_of(run, event) for run in runs for event in run.emissions]
        for record in filter(None, records):
            if quote(str(record.absolute())) == quote(path):
                return read_small(record)
        raise ValueError(f"{path}: there is no such page")

    def _answer(self, kind: str, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
