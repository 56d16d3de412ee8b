"""The options of several merges of one window, of which a validation chooses one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from merge_callback.merging import MergeMethod, Weighted, resolve_method
from merge_callback.merging.running import RunningAverage

CandidatesOption = Mapping[str, str | MergeMethod] | Sequence[str | MergeMethod] | None

_TAKEN = ("live", "merged")
_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")


def resolve_candidates(
    candidates: CandidatesOption, methods: Mapping[str, MergeMethod], window: int
) -> dict[str, MergeMethod]:
    """What else the window is merged by, by name.

    Those of a list are called by their ``label``.

    Raises:
        ValueError: for names that are no names, or equal, or that of a default method for something else; for
            an unknown method or option; for weights or a ``last`` that don't fit the window.
    """
    if candidates is None:
        return {}
    if isinstance(candidates, Mapping):
        several = list(candidates.items())
    elif isinstance(candidates, Sequence) and not isinstance(candidates, str):
        several = [("", method) for method in candidates]
    else:
        raise ValueError(
            f"candidates={candidates!r} must be a mapping from names to methods, or a list of methods"
        )
    found: dict[str, MergeMethod] = {}
    defaults = {method.label: method for method in methods.values()}
    for given_name, given in several:
        try:
            method = resolve_method(given)
        except ValueError as error:
            raise ValueError(f"candidates: {error}") from None
        name = given_name or method.label
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"candidates: {name!r} can't be a name: it takes letters, digits, '_', '-', '.', '+' and '='"
            )
        if name in _TAKEN:
            raise ValueError(
                f"candidates: {name!r} is what the weights that train, or the best one, are called"
            )
        if name in found or defaults.get(name, method) != method:
            raise ValueError(
                f"candidates: two are called {name!r}; name them in a mapping, e.g. "
                f"candidates={{'{name}-b': {method!r}}}"
            )
        check_fits(f"candidates: {name}={method!r}", method, window)
        found[name] = method
    return found


def check_running(
    running: Mapping[str, RunningAverage],
    candidates: Mapping[str, MergeMethod],
    methods: Mapping[str, MergeMethod],
) -> None:
    """Makes sure that no running average has the name of a merge of the window, whose scores would be its.

    Raises:
        ValueError: for one that has.
    """
    for name in running:
        if name in (*_TAKEN, *candidates, *(method.label for method in methods.values())):
            raise ValueError(
                f"running: {name!r} is what another merge, or the weights that train, are called; choose "
                f"another name, e.g. running={{'running-{name}': {running[name]!r}}}"
            )


def check_fits(what: str, method: MergeMethod, window: int) -> None:
    """Makes sure that a method merges windows of up to this size.

    Raises:
        ValueError: if it does not; the message begins with ``what``.
    """
    if (last := method.newest) is not None and last > window:
        raise ValueError(
            f"{what} merges the last {last} of a window of {window} snapshots: choose a smaller last=, or "
            f"window={last}"
        )
    if isinstance(method, Weighted):
        for size in range(2, (last or window) + 1):
            try:
                method.normalised_weights([float(i) for i in range(size)])
            except ValueError as error:
                raise ValueError(
                    f"{what} does not fit window={window}: {error}, or choose window={len(method.weights)}"
                ) from None


def check_comparison(given: Mapping[str, Any], candidates: Mapping[str, MergeMethod]) -> None:
    """Refuses options that have no meaning without candidates, or with finished experts.

    Raises:
        ValueError: for such options.
    """
    select, batches = given["select"], given["evaluate_batches"]
    if not isinstance(select, (str, type(None))):
        raise ValueError(f"select={select!r} must be the name of a validation metric, e.g. 'val_loss'")
    if batches is not None and not candidates:
        raise ValueError(f"evaluate_batches={batches!r} has no meaning without candidates=[…]")
    if not candidates:
        return
    if given["experts"]:
        raise ValueError("candidates=… and experts=[…] were both given; give one of the two")
    if not given["evaluate"]:
        raise ValueError("evaluate=False and candidates=… were both given: a validation chooses among them")
