"""Paths that may be URLs, and the file systems these are on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of another than the local file system."""
    protocol, found, _ = str(path).partition("://")
    return bool(found) and protocol not in ("file", "local")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A local path, also of a ``file://`` URL."""
    if not re.match(r"(file|local):", str(path)):
        return Path(path).expanduser()
    from fsspec.implementations.local import LocalFileSystem

    return Path(LocalFileSystem._strip_protocol(str(path)))


def file_system_of(url: str) -> tuple[Any, str]:
    """A file system of fsspec, and the path that the URL has in it.

    Raises:
        ValueError: for an unknown protocol.
        ImportError: if the package that a protocol needs is missing.
    """
    from fsspec.core import url_to_fs

    # An instance of its own: Lightning saves checkpoints in transactions, in another thread, and one
    # that it ends must not end ours.
    files, root = url_to_fs(url, skip_instance_cache=True)
    return files, root.rstrip("/")
