"""Objects in a checkpoint whose classes are not torch's: they are replaced by ones that do nothing.

A run's hyperparameters may be paths, enums, namespaces, configurations; none of that code is wanted for the
weights beside them, and none is imported.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import _weights_only_unpickler

_REFUSED = re.compile(
    r"(os|posix|nt|sys|subprocess|importlib|runpy|pickle|ctypes|socket|marshal|types|pty)\..+"
    r"|builtins\.(?!(slice|range|frozenset|object|int|float|str|list|dict|tuple|bool|bytes|type)$).+"
)
"""What no data is made of: a file that asks for it is not read, though nothing in it would be run."""

_MOST, _LONGEST = 200, 300  # classes, and letters of a name: torch searches all of them for each object


class StandIn:
    """An object of a class that is not loaded, which ``kind`` names. It forgets what it is filled with."""

    kind: ClassVar[str] = ""

    def __new__(cls, *_: object, **__: object) -> StandIn:
        """An empty one, whatever the class's own arguments are."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Nothing."""

    def __setstate__(self, _: object) -> None:
        """Nothing."""

    def __setitem__(self, _: object, __: object) -> None:
        """Nothing."""


def kind_of(value: object) -> str:
    """The name of a value's class, the one it stands in for if it does."""
    return value.kind if isinstance(value, StandIn) else type(value).__name__


def holds_stand_in(value: object) -> bool:
    """Whether a value is one, or a class that is, or has one in it."""
    if isinstance(value, Mapping):
        return any(holds_stand_in(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple, set)):
        return any(map(holds_stand_in, value))
    return isinstance(value, StandIn) or (isinstance(value, type) and issubclass(value, StandIn))


def without_stand_ins(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Nested mappings without the entries that are stand-ins, or lists that hold one."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not holds_stand_in(key):
            kept[key] = without_stand_ins(value)
        elif not holds_stand_in((key, value)):
            kept[key] = value
    return kept


@contextmanager
def standing_in(path: Path) -> Iterator[None]:
    """Within, ``torch.load(path, weights_only=True)`` makes stand-ins of what it would refuse.

    It is torch's restricted unpickler that reads the file, which looks classes up among those it is given and
    imports none.

    Args:
        path: an archive that ``check_archive`` has found sound.
    """
    unknown = [name for name in _globals(path) if not _REFUSED.fullmatch(name)]
    stand_ins = [(type("StandIn", (StandIn,), {"kind": name}), name) for name in unknown]
    plain = _weights_only_unpickler.Unpickler
    _weights_only_unpickler.Unpickler = _own_unpickler()  # type: ignore[misc, assignment]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            yield
    finally:
        _weights_only_unpickler.Unpickler = plain  # type: ignore[misc]


def _own_unpickler() -> type:
    class Unpickler(_weights_only_unpickler.Unpickler):
        def _check_set_item_target(self, opcode: str) -> None:
            if not isinstance(self.stack[-1], StandIn):
                super()._check_set_item_target(opcode)

    return Unpickler


def _globals(path: Path) -> list[str]:
    """The names of what a file's pickle asks for beyond what torch allows; none if that can't be told."""
    try:
        with zipfile.ZipFile(path) as archive:
            [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(pickled) as file:
                found = _weights_only_unpickler.get_globals_in_pkl(file)
    except Exception:  # a broken pickle raises anything; torch.load says what
        return []
    unknown = sorted(found - _weights_only_unpickler._get_allowed_globals().keys())
    return unknown if len(unknown) <= _MOST and max(map(len, unknown), default=0) <= _LONGEST else []
