"""A section in a process of its own: a crash, as by an illegal address, ends no other section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_check.checks import Row
from benchmarks.gpu_check.machines import ROOT
from benchmarks.gpu_check.sections import environment, machine, section

_ROW = "gpu_check row "

_GRACE = 15.0
"""Seconds that a section may take longer than it was told to, before it is killed."""


class Process:
    """A section's process: it imports what it needs, and waits for its turn.

    Args:
        name: of the section.
        is_dry: whether to do without a GPU.
        log: the file that gets what the process says.
    """

    def __init__(self, name: str, is_dry: bool, log: Path) -> None:
        self.name, self._log = name, log
        variables = environment(name, is_dry)
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--section", name]
        self._process = subprocess.Popen(
            [*command, *(["--dry"] if is_dry else [])],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def rows(self, seconds: float) -> Iterator[Row]:
        """Has the section run for so many seconds; yields each result as soon as it is there."""
        killer = threading.Timer(seconds + _GRACE, self._process.kill)
        killer.start()
        said: list[str] = []
        try:
            self._tell(f"{seconds}\n")
            assert self._process.stdout is not None
            with open(self._log, "a") as log:
                for line in self._process.stdout:
                    if line.startswith(_ROW):
                        yield json.loads(line.removeprefix(_ROW))
                    else:
                        log.write(line)
                        said = [*said[-20:], line]
            if code := self._process.wait():
                yield self._failed(f"exit code {code}: {''.join(said)[-500:].strip()}")
        finally:
            killer.cancel()
            self.end()

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.close()
        except OSError:
            pass  # it has ended, and its output says why
        self._process.stdin = None

    def _failed(self, value: str) -> Row:
        row = {"section": self.name, "name": "the process of the section", "expected": "ends by itself"}
        return {**row, "status": "FAIL", "value": value, "seconds": 0.0}


def serve(name: str, is_dry: bool) -> None:
    """What the process of a section does."""
    found, place = section(name), machine(name, is_dry)
    if line := sys.stdin.readline():
        for row in found.run(place, float(line)):
            # A line of its own, whatever a progress bar has left on this one.
            print(f"\n{_ROW}{json.dumps(row, default=str)}", flush=True)
