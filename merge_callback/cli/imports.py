"""Modules that a command line names, also those of the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _InCurrentFolder(MetaPathFinder):
    """Finds one module in the current folder, if Python finds it nowhere else.

    One alone: the folder may be a downloaded one, and whatever is imported later, by torch say, must not be
    found there.
    """

    def __init__(self, module: str) -> None:
        self.name = module.partition(".")[0]

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module, or the package that it lies in."""
        return PathFinder.find_spec(fullname, [os.getcwd()]) if fullname == self.name else None


def import_all(modules: Iterable[str], here: bool) -> None:
    """Imports the modules that ``--import`` names, which register methods.

    Args:
        modules: their names.
        here: from the current folder, too: not on the word of a file, which may be anyone's.

    Raises:
        ValueError: if one can't be imported; says how to mend it.
    """
    for module in modules:
        import_named(f"--import {module}", module, here)


def import_named(what: str, module: str, here: bool = True) -> ModuleType:
    """Imports a module; ``what`` begins the message if that fails.

    Raises:
        ValueError: see above.
    """
    finders = [_InCurrentFolder(module)] if here else []
    sys.meta_path += finders
    try:
        return import_module(module)
    except Exception as error:  # someone's code may raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        raise ValueError(f"{what}: {reason}{_mend(module, error, here)}") from None
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)


def _mend(module: str, error: Exception, here: bool) -> str:
    if not isinstance(error, ImportError):
        return ""
    missing = error.name
    if not here:
        return "; a module of the current folder has to be named on the command line, with --import"
    return f"; if {missing} lies in the same folder, name it first" if missing and missing != module else ""
