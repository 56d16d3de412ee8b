"""Which checkpoints of a run to merge: paths, globs and folders, put in the order they were trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_callback.offline.arguments import expand
from merge_callback.offline.left_out import grouped, left_out
from merge_callback.offline.order import distinct_names, in_order, put_together, steps_of

_MOST_TOLD = 12
_RANK = re.compile(r"mp_rank_([\d_]+)|[-_]rank_?(\d+)$|^consolidated\.(\d+)$|-(\d+)-of-\d+$")
"""In the names of Megatron's and DeepSpeed's files, FSDP's, Llama's and those of shards."""

_OF_RANK = re.compile(r"^mp_rank_([\d_]+)$")


@dataclass(frozen=True)
class Selection:
    """The chosen checkpoints, oldest first, and what has to be told about the choice.

    Args:
        chosen: the checkpoints.
        steps: of each, if it is known.
        notes: how they were ordered, and what was left out and why.
        is_reordered: whether single checkpoints were given in another order.
    """

    chosen: list[Path]
    steps: list[int | None]
    notes: list[str]
    is_reordered: bool = False

    def lines(self) -> list[str]:
        """The choice, for people."""
        names = distinct_names(self.chosen)
        told = [n if s is None else f"{n} (step {s})" for n, s in zip(names, self.steps, strict=True)]
        return [f"{len(self.chosen)} checkpoints, oldest first: {_shortened(told)}", *self.notes]


def select(
    paths: Sequence[str],
    last: int | None = None,
    every: int = 1,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
    keep_order: bool = False,
    keep_all: bool = False,
) -> Selection:
    """The checkpoints that the arguments of a command name, oldest first.

    An argument is one of these:

    - a checkpoint;
    - a glob, for the checkpoints it matches;
    - the folder of one run, for its ``.ckpt`` and ``.safetensors`` files and the folders in it that are
      checkpoints;
    - the callback's own folder, or ``window/`` in it, for the snapshots that its manifest lists, without
      those of a loss spike. The emissions beside them are merges already.

    All of them together are ordered by the step in the names, else by the recorded one, else by that of the
    folder around; what a glob or a run gives also by the epoch, or the one number in which the names differ.
    A shell passes the files that a glob matches in the order of the alphabet, so single checkpoints are
    ordered like the others; the order given stays if no step tells another.

    Left out are hidden and unfinished ones, what is frozen in a window, snapshots of a loss spike, merges
    beside other checkpoints, further names of the same file, a ``last.ckpt`` that repeats another one, and
    ``a.ckpt`` if ``a-v1.ckpt`` is of the same step: two callbacks, or two attempts, that saved the same.

    Args:
        paths: the arguments.
        last: keeps that many of the newest, of all arguments together, after ``every``.
        every: keeps every k-th, counted from the newest backwards.
        first_step: leaves out, before that, what is of an earlier step.
        last_step: and what is of a later one.
        keep_order: keeps the arguments in the order given.
        keep_all: leaves out nothing of what is there.

    Raises:
        FileNotFoundError: if an argument finds nothing.
        ValueError: if no order can be told, or it is not clear which checkpoints are meant.
    """
    for name, value in (("every", every), ("last", last)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    arguments = [expand(given) for given in paths]
    everything = list(dict.fromkeys(path for argument in arguments for path in argument.found))
    steps = steps_of(everything)
    unfit = {} if keep_all else left_out(everything, steps)
    out = grouped(unfit).items()
    notes = [f"left out: {_shown(found)}: {reason}" for reason, found in out]
    arguments = [replace(a, found=[p for p in a.found if p not in unfit]) for a in arguments]
    given = [path for argument in arguments for path in in_order(argument, steps)]
    if len(set(given)) < len(given) and not keep_all:
        given = list(dict.fromkeys(given))
        notes.append("those given twice are taken once; --keep-all takes them twice")
    ordered = given
    if not keep_order and len(arguments) > 1:
        ordered, unknown = put_together(given, steps, all(argument.is_single for argument in arguments))
        if unknown is not None:
            notes.insert(0, f"they stay in the order given: the step of {unknown} is not known")
        elif ordered != given:
            notes.insert(0, "they were put in the order of their steps; --keep-order keeps the order given")
    within = _in_range(ordered, steps, first_step, last_step)
    sparse = within[::-1][::every][::-1]
    chosen = sparse[-last:] if last else sparse
    if last is not None and len(chosen) < last:
        notes.append(f"fewer than --last {last} were found: {len(chosen)}")
    for option, before, kept in (
        ("--from and --to", ordered, {*within}),
        (f"--every {every}", within, {*sparse}),
        (f"--last {last}", sparse, {*chosen}),
    ):
        if gone := [path for path in before if path not in kept]:
            notes.append(f"left out by {option}: {_shown(gone)}")
    _check_ranks(chosen)
    return Selection(chosen, [steps[path] for path in chosen], notes, ordered != given)


def _shown(found: Sequence[Path]) -> str:
    return _shortened(distinct_names(found))


def _shortened(names: list[str]) -> str:
    if len(names) > _MOST_TOLD:
        names = [*names[: _MOST_TOLD // 2], f"… ({len(names)})", *names[-_MOST_TOLD // 2 :]]
    return ", ".join(names)


def _check_ranks(chosen: Sequence[Path]) -> None:
    """Makes sure that no two are the parts of different ranks, whose tensors may have the same shapes.

    Raises:
        ValueError: if there are.
    """
    ranks = {rank: path for path in chosen if (rank := _rank(path))}
    if len(ranks) > 1:
        one, other = list(ranks.values())[:2]
        raise ValueError(
            f"{one} and {other} are parts of checkpoints, of different ranks or shards; give whole "
            "checkpoints, or merge the parts of each rank by themselves"
        )


def _rank(path: Path) -> str | None:
    found = _RANK.search(path.stem) or _OF_RANK.search(path.parent.name)
    return next(filter(None, found.groups()), None) if found else None


def _in_range(
    found: list[Path], steps: Mapping[Path, int | None], first: int | None, last: int | None
) -> list[Path]:
    if first is None and last is None:
        return found
    if unknown := [path for path in found if steps[path] is None]:
        raise ValueError(f"--from and --to need every step: that of {unknown[0]} is not known")
    low, high = first if first is not None else 0, float("inf") if last is None else last
    within = [path for path in found if low <= (steps[path] or 0) <= high]
    if not within:
        known = [step for step in steps.values() if step is not None]
        raise ValueError(f"no step lies in {low} … {high}: they are {min(known)} to {max(known)}")
    return within
