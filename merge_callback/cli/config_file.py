"""The options of a command in a YAML file, which may be anyone's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge_callback.checkpoints.plain_yaml import read_value
from merge_callback.snapshots.files import CorruptFileError, read_small

_MOST = 1 << 18  # bytes; Python's YAML reads that many in a second
_KINDS: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), str: (str, int, float)}
_TOLD = {bool: "true or false", int: "a whole number", str: "text", list: "a list of names"}


def read_options(path: Path) -> dict[Any, Any]:
    """The mapping in a file.

    Raises:
        ValueError: if it holds anything else, or is no regular file of a size that options have.
        OSError: if it can't be read.
    """
    try:
        content = read_value(read_small(path, _MOST).decode())
    except CorruptFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected options and their values")
    return content


def checked(where: str, value: Any, kind: type) -> Any:
    """A value of an option as the command line would have it.

    Args:
        where: names file and option.
        value: as YAML gave it.
        kind: of ``bool``, ``int``, ``str``, and ``list`` for a list of texts.

    Raises:
        ValueError: for a value of another kind.
    """
    items = value if kind is list and isinstance(value, list) else [value]
    allowed = _KINDS[str if kind is list else kind]
    if not all(isinstance(v, allowed) and (kind is bool or not isinstance(v, bool)) for v in items):
        raise ValueError(f"{where} is {value!r:.100}, expected {_TOLD[kind]}")
    if kind is list:
        return [str(item) for item in items]
    return str(value) if kind is str else value


def is_plain(value: Any) -> bool:
    """Whether a value may be a method's option: a number, text, true or false, or a list of those."""
    if isinstance(value, list):
        return all(is_plain(item) and not isinstance(item, list) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
