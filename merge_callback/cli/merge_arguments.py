"""What the commands that merge files have in common: which checkpoints, and what the output is like."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_callback.checks import resolve_dtype, resolve_size
from merge_callback.cli.dry_run import HELP
from merge_callback.merging import MergeMethod, Weighted
from merge_callback.offline import workers
from merge_callback.offline.job import Job, OutputNames
from merge_callback.offline.left_out import grouped
from merge_callback.offline.selection import Selection, select
from merge_callback.snapshots.files import printable

DEFAULTS: dict[str, Any] = {
    "checkpoints": [],
    "output": None,
    "method": "sma",
    "last": None,
    "every": 1,
    "first_step": None,
    "last_step": None,
    "keep_order": False,
    "keep_all": False,
    "base": None,
    "dtype": None,
    "exclude": [],
    "state_key": None,
    "strip_prefix": None,
    "prefix": "",
    "shard_size": None,
    "kind": "safetensors",
    "rank": None,
    "sigma": None,
    "optimizer_state": False,
    "dry_run": False,
    "force": False,
    "quiet": False,
    "imports": [],
}

FORMATS = ("safetensors", "lightning", "lora", "model")
CHOICE = ("last", "every", "first_step", "last_step", "keep_order", "keep_all")
IMPORT_HELP = "modules that register methods of your own"


def add_range(add: Callable[..., Any]) -> None:
    """Adds which of the checkpoints are taken, and in which order."""
    add("--from", dest="first_step", type=int, metavar="STEP", help="of all these, only from that step on")
    add("--to", dest="last_step", type=int, metavar="STEP", help="and only up to that step")
    add("--every", type=int, metavar="K", help="of the rest, only every K-th, counted from the last")
    add("--keep-order", action="store_true", help="take them in the order given, not by their steps")
    add("--keep-all", action="store_true", help="leave out no earlier merges, repeated ones, or spikes")


def add_form(add: Callable[..., Any]) -> None:
    """Adds what the merged tensors and their files are like."""
    add("--dtype", metavar="TYPE", help="of the merged weights: fp32, bf16, fp16 or fp64 (the checkpoints')")
    add("--exclude", nargs="+", metavar="PATTERN", help="names to copy from the last checkpoint, '*.bias'")
    add("--state-key", metavar="KEY", help="where in the files the weights are, e.g. 'model_ema'")
    add(
        "--strip-prefix",
        metavar="P",
        help="taken off the names, e.g. 'model.' (what a snapshot's run takes off)",
    )
    add("--prefix", metavar="P", help="put before the names")
    add("--shard-size", metavar="SIZE", help="a larger model is split (as the last checkpoint is, or 5GB)")
    add("--dry-run", action="store_true", help=HELP)
    add("--force", action="store_true", help="replace the output folder if it is there")
    add("--quiet", action="store_true", help="no progress bar")
    add("--import", dest="imports", nargs="+", metavar="MODULE", help=IMPORT_HELP)


def tell(lines: Iterable[str]) -> None:
    """Prints lines beside the output proper."""
    for line in lines:
        print(printable(line), file=sys.stderr)


def notes_of(record: Mapping[str, Any]) -> list[str]:
    """What has to be told of a merge that was written: what it lacks, and what it only copied."""
    left_out = grouped(record["left_out"]).items()
    notes = [f"not taken along: {', '.join(names)}: {reason}" for reason, names in left_out]
    if (state := record.get("training_state", [])) and "optimizer_state" not in record:
        shown = ", ".join(state[:3]) + " …" * (len(state) > 3)
        notes.append(f"left out as training state: {len(state)} tensors ({shown})")
    if held := record.get("not_finite", []):
        notes.append(f"copied, as it holds the same NaN or Inf in all checkpoints: {', '.join(held)}")
    return notes


def own_line(error: Exception, method: MergeMethod) -> str:
    """The line of an own method's module in which it failed; empty for those of this package."""
    file = getattr(sys.modules.get(type(method).__module__), "__file__", None)
    if not file or type(method).__module__.startswith("merge_callback."):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else ""


def job_of(
    given: Mapping[str, Any], checkpoints: Sequence[Path], method: MergeMethod, begun: Callable[[], None]
) -> Job:
    """What is to be done, from the options."""
    base, size = given["base"], given["shard_size"]
    return Job(
        checkpoints=checkpoints,
        method=method,
        base=None if base is None else Path(base),
        dtype=resolve_dtype("--dtype", given["dtype"]),
        exclude=given["exclude"],
        state_key=given["state_key"],
        naming=OutputNames(given["strip_prefix"], given["prefix"]),
        max_shard_bytes=None if size is None else resolve_size("--shard-size", size),
        kind=given["kind"],
        optimizer_state=given["optimizer_state"],
        rank=given["rank"],
        force=given["force"],
        progress=not given["quiet"],
        workers=workers.available(),
        begun=begun,
    )


def chosen(given: Mapping[str, Any], method: MergeMethod) -> Selection:
    """The checkpoints to merge.

    Raises:
        ValueError: if there is only one, or weights were given in another order than theirs.
    """
    choice = {name: given[name] for name in CHOICE}
    found = select([str(path) for path in given["checkpoints"]], **choice)
    if len(found.chosen) < 2 and given["base"] is None:
        names = "".join(f" ({path})" for path in found.chosen)
        raise ValueError("; ".join([f"only one checkpoint is left to merge{names}", *found.notes]))
    if found.is_reordered and isinstance(method, Weighted):
        raise ValueError(
            "--weights, one for each checkpoint, go with their order, and they were not given oldest first "
            f"(their steps: {', '.join(map(str, found.steps))}); say --keep-order, or give them in that order"
        )
    return found
