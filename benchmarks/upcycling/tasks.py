"""Six tasks: positions in source files, labelled by `ast` and `tokenize`, to be told from the text before."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.upcycling.corpus import CONTEXT, PAD, File, encode, files

Labelled = Iterator[tuple[int, int, str]]
"""Line, from 1, column and label of positions; what precedes one is what the model sees."""


@dataclass(frozen=True)
class Examples:
    """Contexts with labels.

    Args:
        contexts: `(examples, CONTEXT)` int64.
        labels: `(examples,)` int64.
    """

    contexts: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: Tensor | slice) -> Examples:
        return Examples(self.contexts[which], self.labels[which])


def _nodes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, int]]:
    """Every node with its parent and its depth in the tree."""
    stack = [(child, tree, 1) for child in ast.iter_child_nodes(tree)]
    while stack:
        node, parent, depth = stack.pop()
        yield node, parent, depth
        stack += [(child, node, depth + 1) for child in ast.iter_child_nodes(node)]


def _end(node: ast.expr) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def block(file: File) -> Labelled:
    """In which block is the statement that follows?"""
    kinds = ("FunctionDef", "ClassDef", "If", "For", "While", "Try", "With", "ExceptHandler")
    for node, parent, _ in _nodes(file.tree):
        if isinstance(node, ast.stmt) and (kind := type(parent).__name__) in kinds:
            yield node.lineno, node.col_offset, kind


def statement(file: File) -> Labelled:
    """Of which statement is the name that was just read a part?"""
    kinds = ("Assign", "Expr", "If", "Return", "For", "Raise", "FunctionDef", "AugAssign", "While")
    for node, _, _ in _nodes(file.tree):
        if (kind := type(node).__name__) in kinds:
            names = [
                n
                for child in ast.iter_child_nodes(node)
                if not isinstance(child, ast.stmt)
                for n in ast.walk(child)
                if isinstance(n, ast.Name)
            ]
            for name in names[1:]:
                yield *_end(name), kind


def string(file: File) -> Labelled:
    """What is the string literal that was just read for?"""
    kinds = ("Call", "Compare", "Dict", "Assign", "Expr", "BinOp", "Subscript", "Tuple", "Return")
    for node, parent, _ in _nodes(file.tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and (kind := type(parent).__name__) in kinds:
            yield *_end(node), kind


def depth(file: File) -> Labelled:
    """How deep in the syntax tree is the name that was just read?"""
    for node, _, deep in _nodes(file.tree):
        if isinstance(node, ast.Name):
            yield *_end(node), str(min(max(deep, 3), 9))


def bracket(file: File) -> Labelled:
    """In which brackets, and how deep in them, is the token that follows?"""
    opened: list[str] = []
    for token in _tokens(file):
        if token.type == tokenize.NAME:
            yield *token.start, f"{opened[-1]}{min(len(opened), 2)}" if opened else "none"
        if token.type == tokenize.OP and token.string in "([{":
            opened.append(token.string)
        elif token.type == tokenize.OP and token.string in ")]}":
            opened.pop()


def column(file: File) -> Labelled:
    """How many tokens ago did the line begin?"""
    since = 0
    for token in _tokens(file):
        if token.type == tokenize.NAME:
            yield *token.start, str(min(since, 7))
        if token.type in (tokenize.NEWLINE, tokenize.NL):
            since = 0
        elif token.type not in (tokenize.INDENT, tokenize.DEDENT):
            since += 1


def _tokens(file: File) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(file.source).readline)


TASKS = {f.__name__: f for f in (block, statement, bracket, string, column, depth)}


@cache
def pool(task: str, held_out: bool) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Every labelled position, as the text before it and its label, and the names of the classes."""
    found = []
    for file in files()[held_out]:
        lines = [0]
        for line in file.source.splitlines(keepends=True):
            lines.append(lines[-1] + len(line))
        for line, column, label in TASKS[task](file):
            end = lines[line - 1] + column
            found.append((file.source[max(0, end - 16 * CONTEXT) : end], label))
    return found, tuple(sorted({label for _, label in found}))


def sample(task: str, held_out: bool, count: int, seed: int) -> Examples:
    """Examples in random order, at most twice the fair share of each class, no text twice."""
    positions, classes = pool(task, held_out)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(positions), generator=generator)
    room = dict.fromkeys(classes, 2 * count // len(classes))
    chosen: dict[tuple[int, ...], str] = {}
    for text, label in (positions[i] for i in order.tolist()):
        lexemes = encode(text)[-CONTEXT:]
        context = (*[PAD] * (CONTEXT - len(lexemes)), *lexemes)
        if room[label] and context not in chosen:
            room[label] -= 1
            chosen[context] = label
            if len(chosen) == count:
                break
    labels = torch.tensor([classes.index(label) for label in chosen.values()])
    again = torch.randperm(len(labels), generator=generator)  # the last ones are of rare classes
    return Examples(torch.tensor(list(chosen)), labels)[again]
