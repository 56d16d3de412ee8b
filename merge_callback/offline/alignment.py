"""One name for one tensor: what wrappers put into the names of some checkpoints is no part of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checks import matches_any
from merge_callback.snapshots.capture import clean_name

_WRAPPED = "module."  # by DataParallel and DistributedDataParallel, which put it before every name

Rename = Callable[[str], str]


def aligned(
    checkpoints: Sequence[Checkpoint], strip: str = "", exclude: Sequence[str] | None = None
) -> list[Checkpoint]:
    """Checkpoints of one model with the names that the last of them has.

    Names are the same if they are so without what ``torch.compile``, activation checkpointing and FSDP put in
    (``clean_name``), without the prefix, and, in a checkpoint whose every name begins with it, without
    ``module.``. An excluded tensor need not be in all checkpoints.

    Args:
        checkpoints: the last one's names are kept.
        strip: a prefix that not all of them need have.
        exclude: ``fnmatch`` patterns of names; ``None``: all stay, and may differ in names.

    Raises:
        ValueError: for names that differ, unless ``exclude`` is ``None``.
    """
    newest = checkpoints[-1]
    plain = _shared_names(checkpoints, strip)
    own = {plain[-1](name): name for name in _names(newest)}
    return [
        *(_renamed(c, p, own, exclude, newest) for c, p in zip(checkpoints[:-1], plain, strict=False)),
        newest,
    ]


def published_name(checkpoints: Sequence[Checkpoint], strip: str = "") -> Rename:
    """How the last checkpoint's tensors are called without wrappers and prefix."""
    return _shared_names(checkpoints, strip)[-1]


def _names(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.tensors, *checkpoint.tied]


def _shared_names(checkpoints: Sequence[Checkpoint], strip: str) -> list[Rename]:
    """For each checkpoint, what makes of its names those that all have in common."""
    cleaned = [_cleaned(_names(checkpoint), strip) for checkpoint in checkpoints]
    found = [{clean(name) for name in _names(c)} for clean, c in zip(cleaned, checkpoints, strict=True)]
    wrapped = [all(name.startswith(_WRAPPED) for name in names) for names in found]
    if all(wrapped):  # nobody knows it for a wrapper's
        return cleaned
    return [_without(_WRAPPED, clean) if has else clean for clean, has in zip(cleaned, wrapped, strict=True)]


def _cleaned(names: Collection[str], strip: str) -> Rename:
    """Takes wrappers out, and the prefix off; the prefix alone, if two tensors would get one name."""
    clean = _without(clean_name(strip), clean_name)
    if len({clean(name) for name in names}) == len(names):
        return clean
    return _without(strip, str)


def _without(prefix: str, rename: Rename) -> Rename:
    return lambda name: rename(name).removeprefix(prefix)


def _renamed(
    checkpoint: Checkpoint,
    plain: Rename,
    own: Mapping[str, str],
    exclude: Sequence[str] | None,
    newest: Checkpoint,
) -> Checkpoint:
    names = {name: own.get(plain(name), name) for name in _names(checkpoint)}
    if exclude is None:
        return _with_names(checkpoint, names)
    here, there = {*names.values()}, {*own.values()}
    former = sorted(name for name in here - there if not _excluded(name, plain, exclude))
    latter = sorted(name for name in there - here if not matches_any(name, exclude))
    if former or latter:
        raise ValueError(
            f"{checkpoint.path} and {newest.path} have different names: only in the former {former[:5]}, "
            f"only in the latter {latter[:5]}; --strip-prefix takes off a prefix that "
            "some have, --exclude leaves such tensors to the last checkpoint"
        )
    return _with_names(checkpoint, {name: new for name, new in names.items() if new in there})


def _with_names(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint of the tensors that have a new name."""
    if all(names.get(name) == name for name in _names(checkpoint)):
        return checkpoint  # whose tensors may be formed only when they are asked for
    return replace(
        checkpoint,
        tensors={names[name]: tensor for name, tensor in checkpoint.tensors.items() if name in names},
        tied={
            names[alias]: names[kept]
            for alias, kept in checkpoint.tied.items()
            if {alias, kept} <= names.keys()
        },
    )


def _excluded(name: str, plain: Rename, exclude: Sequence[str]) -> bool:
    return matches_any(name, exclude) or matches_any(plain(name), exclude)
