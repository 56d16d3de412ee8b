"""The order in which checkpoints were trained, by what their names and records tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from merge_callback.checkpoints.checkpoint import step_above
from merge_callback.checkpoints.open import recorded_step
from merge_callback.offline.arguments import Argument


def steps_of(found: Sequence[Path]) -> dict[Path, int | None]:
    """The optimizer step of each checkpoint, as far as it is known."""
    steps = {path: recorded_step(path) for path in found}
    unknown = [path.parent for path, step in steps.items() if step is None]
    return {  # the folder's name tells it if only one checkpoint is in it: else it is the run's
        path: step_above(path) if step is None and unknown.count(path.parent) == 1 else step
        for path, step in steps.items()
    }


def in_order(argument: Argument, steps: Mapping[Path, int | None]) -> list[Path]:
    """What one argument stands for, oldest first."""
    found = argument.found
    if len(found) < 2:
        return found
    if by_step := _by_step(found, steps):
        return by_step
    if by_number := _by_number(found):
        return by_number
    raise ValueError(
        f"{argument.given}: their order is not known: not all of {found[0].name}, {found[1].name}, … "
        "have a step in their name or recorded; give the checkpoints one by one, oldest first"
    )


def put_together(
    found: list[Path], steps: Mapping[Path, int | None], single: bool
) -> tuple[list[Path], str | None]:
    """What several arguments stand for, oldest first; else as given, and whose step is not known."""
    ordered = _by_step(found, steps, keep_equal=True) or (_by_number(found) if single else None)
    if ordered is not None:
        return ordered, None
    return found, next((path.name for path in found if steps[path] is None), None)


def _by_step(
    found: Sequence[Path], steps: Mapping[Path, int | None], keep_equal: bool = False
) -> list[Path] | None:
    known = [(step, path) for path in found if (step := steps[path]) is not None]
    if len(known) < len(found):
        return None
    if keep_equal:
        return [path for _, path in sorted(known, key=lambda item: item[0])]
    return [path for _, _, path in sorted((step, _natural(path.name), path) for step, path in known)]


def _by_number(found: Sequence[Path]) -> list[Path] | None:
    """By the epoch in the names, or by the one number they differ in."""
    named = sorted((_natural(n), n, p) for n, p in zip(distinct_names(found), found, strict=True))
    in_order = [path for _, _, path in named]
    epochs = [re.search(r"epoch[=_-]?(\d+)", name) for _, name, _ in named]
    numbers = [int(epoch[1]) for epoch in epochs if epoch]
    if len(numbers) == len(found):
        return [path for _, path in sorted(zip(numbers, in_order, strict=True), key=lambda item: item[0])]
    columns = list(zip_longest(*(re.split(r"(\d+)", name) for _, name, _ in named)))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # every other part is a number
        return None
    return in_order


def distinct_names(found: Sequence[Path]) -> list[str]:
    """The names, with those of as many folders above as it takes to tell them apart."""
    parts = [path.parts for path in found]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len({*names}) == len({*parts}):
            return names
    return [str(path) for path in found]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
