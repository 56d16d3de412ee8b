"""The texts that the papers' runs read: code, prose, both, and another library's code."""

from __future__ import annotations

import ast
import os
import pydoc_data.topics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from merge_callback.demo.crops import Batch, RandomCrops, SpacedCrops
from merge_callback.demo.text import package_folder, split_files

Part = Literal["train", "choose", "score"]
"""Runs read ``train``; what is chosen is chosen on ``choose``; figures are given on ``score``."""

MIXES: dict[str, tuple[str, ...]] = {
    "code": ("code",),
    "prose": ("prose",),
    "both": ("code", "prose"),
    "torch": ("torch",),
    "headers": ("headers",),
}
"""The texts of each mix, in equal shares of every batch.

``code`` is the standard library without comments and docstrings; ``prose`` is these, and the help texts;
``torch`` is PyTorch's sources, another text for later stages; ``headers`` is a little C++ of its library.
"""

_LIBRARY = Path(os.__file__).parent
_MOST = 6_000_000  # bytes of PyTorch


def batch(mix: str, size: int, context: int, key: tuple[int, ...], step: int) -> Batch:
    """The batch of one step, which depends on nothing but the arguments."""
    parts = [
        RandomCrops(text(name, "train"), size // len(MIXES[mix]), context, 1, (*key, number)).draw(step)
        for number, name in enumerate(MIXES[mix])
    ]
    return Batch(
        input_ids=torch.cat([part["input_ids"] for part in parts]),
        labels=torch.cat([part["labels"] for part in parts]),
    )


@cache
@torch.inference_mode(False)  # they outlast the score that asks for them first, and derivatives use them
def held_out(mix: str, part: Part, context: int, crops: int) -> list[Batch]:
    """Evenly spaced crops of a held-out text, the same for all runs, 16 in a batch."""
    found = []
    for name in MIXES[mix]:
        whole = text(name, part)
        starts = torch.linspace(0, len(whole) - context - 1, crops // len(MIXES[mix]), dtype=torch.float64)
        found += list(SpacedCrops(whole, 16, context, starts.long()))
    return found


@cache
def text(name: str, part: Part) -> Tensor:
    """One text, ``(bytes,)`` uint8; of 16 files the first is in ``choose`` and the ninth in ``score``."""
    pieces = [piece for number, piece in enumerate(_pieces(name)) if _PARTS.get(number % 16, "train") == part]
    return torch.from_numpy(np.frombuffer("\n".join(pieces).encode(), np.uint8).copy())


_PARTS: dict[int, Part] = {0: "choose", 8: "score"}


def _pieces(name: str) -> Iterator[str]:
    """A text's pieces, one per file, so that no file is in two parts."""
    if name == "torch":
        size = 0
        for path, _ in split_files(package_folder("torch")):
            if size >= _MOST:
                return
            yield (found := path.read_text("utf-8", "ignore"))
            size += len(found)
        return
    if name == "headers":
        yield from (
            path.read_text() for path in sorted(package_folder("torch").glob("include/c10/core/**/*.h"))
        )
        return
    yield from (getattr(file, name) for file in _library())
    if name == "prose":
        yield from pydoc_data.topics.topics.values()


class _File:
    """A source file of the standard library, taken apart.

    Args:
        source: all of it.
    """

    def __init__(self, source: str) -> None:
        lines, documented = source.splitlines(), set[int]()
        prose: list[str] = []
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if documentation := ast.get_docstring(node):
                prose.append(documentation)
                documented.update(range(node.body[0].lineno - 1, node.body[0].end_lineno or 0))
        is_comment = [line.lstrip().startswith("#") for line in lines]
        prose += [line.strip(" \t#") for line, comment in zip(lines, is_comment, strict=True) if comment]
        self.prose = "\n".join(prose)
        self.code = "\n".join(
            line for number, line in enumerate(lines) if number not in documented and not is_comment[number]
        )


@cache
def _library() -> list[_File]:
    found = []
    for path, _ in split_files(_LIBRARY):
        try:
            found.append(_File(path.read_text("utf-8")))
        except (OSError, ValueError, SyntaxError):
            continue
    return found
