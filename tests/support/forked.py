"""Processes for tests, forked from one that has imported PyTorch and Lightning already.

To import them takes seconds, which each of pytest's workers pays for once: with its first `Forked`.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

IMPORTED = [
    *("killed_ranks", "shared_statistics", "sharded_save", "forked"),
    *("safetensors.torch", "transformers.modeling_utils"),  # which a fit imports as it goes on
]
"""What has been imported before a process is forked; these name all that is slow to import."""


class Forked:
    """A process that calls ``function(*arguments)`` and ends with what it returns.

    Args:
        function: one of a module in ``tests``.
        *arguments: pickled.
        log: a file for all that is printed.
        **environment: variables on top of those of this process.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, log: Path | None = None, **environment: str
    ) -> None:
        _ensure_server()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_run, args=(function, arguments, variables, log))
        self.process.start()

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status, minus the signal if one ended it; None if it has not ended by then."""
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self) -> None:
        """Ends it and all that it has forked."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _ensure_server() -> None:
    """Starts the process that forks the others, unless it runs; it finds the modules where pytest does."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: Path | None
) -> None:
    gc.freeze()  # the garbage collector need not look at all that has been imported
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if log:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))
