"""The corpus: the Python standard library's own source files, as bytes.

Every machine that can run the demo has this text, so nothing is downloaded.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
    | {"encodings", "pydoc_data"}
)
"""Other people's packages, tests with deliberate nonsense, and tables that happen to end in `.py`."""

VALIDATION_SHARE = 16
"""One file in this many is held out."""

MIN_BYTES = 100_000
"""Less text than this on either side of the split cannot train or judge a model."""


class Corpus(NamedTuple):
    """A text split by file into two byte sequences.

    Attributes:
        train: `(bytes,)` uint8.
        validation: `(bytes,)` uint8, from files that are not in `train`.
    """

    train: Tensor
    validation: Tensor


def load_corpus(max_bytes: int = 8_000_000, root: str | Path | None = None) -> Corpus:
    """Reads the source files under `root` and splits them by file into training and validation text.

    The files are read in the order of a hash of their relative path, so `max_bytes` takes a fair sample of
    the library, and the same Python version gives the same bytes on every machine.

    Args:
        max_bytes: Stop after the file that reaches this size.
        root: Folder to read; default: that of the running Python's standard library.

    Raises:
        ValueError: If there is too little Python source below `root`.
    """
    return _load(max_bytes, str(root or Path(os.__file__).parent))


def package_folder(name: str) -> Path:
    """Finds the folder of an installed package, without importing it.

    Raises:
        ValueError: If no package has that name.
    """
    spec = find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ValueError(f"package={name!r} is no package that is installed; name one, such as 'torch'")
    return Path(folders[0])


@lru_cache(maxsize=2)
def _load(max_bytes: int, root: str) -> Corpus:
    """Reads once per process, since a module, its data and a resumed run all need the same text."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for path, is_validation in split_files(Path(root)):
        if size >= max_bytes:
            break
        content = _read(path)
        parts[is_validation].append(content)
        size += len(content)
    train, validation = (b"".join(part) for part in parts)
    _require_text(root, len(train), len(validation), max_bytes)
    return Corpus(_to_tensor(train), _to_tensor(validation))


def split_files(root: Path) -> list[tuple[Path, bool]]:
    """Lists the source files below `root` in hash order, each with whether it is held out for validation."""
    hashed = sorted((_path_hash(path, root), path) for path in _source_files(root))
    return [(path, key % VALIDATION_SHARE == 0) for key, path in hashed]


def _source_files(root: Path) -> Iterator[Path]:
    """Walks the `.py` files below `root`, except those that are not the library's own portable text."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            # _sysconfigdata differs from build to build of one Python version.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _path_hash(path: Path, root: Path) -> int:
    """Hashes the relative path; `hash()` would differ between processes."""
    relative = path.relative_to(root).as_posix()
    return int.from_bytes(hashlib.blake2b(relative.encode(), digest_size=8).digest(), "big")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _to_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def _require_text(root: str, train: int, validation: int, max_bytes: int) -> None:
    if min(train, validation) < MIN_BYTES:
        raise ValueError(
            f"The demo trains on the Python source files under {root}, but found {train} bytes for training "
            f"and {validation} for validation within max_bytes={max_bytes}; each needs {MIN_BYTES}. "
            "Raise max_bytes, or use a Python that ships its standard library as source files."
        )
