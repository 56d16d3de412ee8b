"""Messages to the user while a model trains, from the first rank only."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable

import torch.distributed as dist

_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class _UntilConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows messages on stderr as long as the application has not set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            self.stream = sys.stderr
            super().emit(record)


log = logging.getLogger("merge_callback")
if log.level == logging.NOTSET:
    log.setLevel(logging.INFO)
if not log.handlers:
    log.addHandler(_UntilConfigured())


def info(text: str) -> None:
    """Logs a message to the user, through the logger ``merge_callback``."""
    if _is_first():
        log.info(text)


def warn(text: str) -> None:
    """Warns the user with a ``UserWarning``, without a line of our code, which would not help them."""
    if _is_first():
        warnings.warn_explicit(text, UserWarning, "merge_callback", 0)


def tell(lines: Iterable[str], warned: Iterable[str]) -> None:
    """Logs several messages, then warns of others."""
    for line in lines:
        info(line)
    for line in warned:
        warn(line)


def _is_first() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name)), 0) == 0
