"""The source files of the standard library, as short lexemes."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.demo.text import split_files

CONTEXT, VOCABULARY = 16, 1024
_LEXEME = re.compile(r"\n *|[A-Z]?[a-z]+|[A-Z]+|[0-9]+|[^\w\s]|_")
PAD, _UNKNOWN = 0, 1


@dataclass(frozen=True)
class File:
    """One source file.

    Args:
        source: its text, ASCII.
        tree: what `ast` makes of it.
    """

    source: str
    tree: ast.Module


@cache
def files() -> tuple[list[File], list[File]]:
    """The library's files for training, and each fourth one, held out."""
    parts: tuple[list[File], list[File]] = ([], [])
    for number, (path, _) in enumerate(split_files(Path(os.__file__).parent)):
        try:
            source = path.read_text("ascii")
            parts[number % 4 == 0].append(File(source, ast.parse(source)))
        except (OSError, ValueError, SyntaxError):
            continue
    return parts


@cache
def vocabulary() -> dict[str, int]:
    """The commonest lexemes of the training files."""
    counts = Counter(lexeme for file in files()[0] for lexeme in _LEXEME.findall(file.source))
    return {lexeme: i for i, (lexeme, _) in enumerate(counts.most_common(VOCABULARY - 2), 2)}


def encode(text: str) -> list[int]:
    """Lexemes as numbers."""
    return [vocabulary().get(lexeme, _UNKNOWN) for lexeme in _LEXEME.findall(text)]


@cache
def text() -> Tensor:
    """The training files, one after the other, `(lexemes,)` int64."""
    return torch.tensor([i for file in files()[0] for i in encode(file.source)])
