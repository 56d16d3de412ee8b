"""The ``.metadata`` file of a distributed checkpoint, read without running anything in it."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path, PurePath
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import Metadata

from merge_callback.snapshots.files import CorruptFileError, read_small

_DATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": None,  # every class it defines
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "dict", "list"},
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


_load_build: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
_load_mark: Any = pickle._Unpickler.dispatch[pickle.MARK[0]]
_DEEPEST = 1000
_MOST = 1 << 28  # bytes; a million chunks have about half of that


class _DataUnpickler(pickle._Unpickler):
    """Builds the records of a ``.metadata`` file and nothing else; torch reads it with plain pickle.

    The unpickler in Python, because the one in C has no place to look at what an object is filled in with.
    """

    stack: list[Any]
    metastack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The class, function or dtype that a pickle asks for, if it can only hold data."""
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
            return _enum_member  # how Python 3.11 first pickled an Enum
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return PurePath
        allowed = _DATA_CLASSES.get(module, set())
        found = getattr(torch, name, None) if module == "torch" else None
        if "." in name or not (isinstance(found, torch.dtype) or allowed is None or name in allowed):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        found = super().find_class(module, name)
        if allowed is None and not (isinstance(found, type) and found.__module__ == module):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")  # what that module only imports
        return found

    def load_build(self) -> None:
        """Fills an object in; never a class, function or constant, which all of this process would share."""
        if isinstance(self.stack[-2], type | FunctionType | Enum):
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]!r}")
        _load_build(self)

    def load_mark(self) -> None:
        """Begins a nested value; a pickle of nothing but beginnings would take minutes and gigabytes."""
        if len(self.metastack) >= _DEEPEST:
            raise CorruptFileError(f"it nests more than {_DEEPEST} values")
        _load_mark(self)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.MARK[0]] = load_mark


def _enum_member(kind: Any, name: Any) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it asks for getattr({kind!r:.100}, {name!r:.100})")
    return kind[name]


def read_metadata(path: Path) -> Metadata:
    """The content of a ``.metadata`` file.

    Raises:
        ValueError: if it asks for anything but records of data.
        CorruptFileError: if it is broken, or something else.
        OSError: if it can't be opened.
    """
    try:
        # All of it first: what a length in the pickle promises is then never more than there is.
        metadata = _DataUnpickler(io.BytesIO(read_small(path, _MOST))).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: reading it could run code, which this tool never does: {error}; "
            "if you trust it, load and save the checkpoint again with torch.distributed.checkpoint"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise CorruptFileError(
            f"{path}: not the metadata of a distributed checkpoint ({error!r:.200})"
        ) from None
    entries, places = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(entries, dict) or not isinstance(places, dict):
        raise CorruptFileError(f"{path}: not the metadata of a distributed checkpoint")
    return metadata
