"""The command ``prune``."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from merge_callback.checks import positive
from merge_callback.engine.plan import in_bytes
from merge_callback.options import DEFAULTS
from merge_callback.publish.emission import finish_removals, remove_emission
from merge_callback.publish.published import Emission, emissions, latest_in, linked
from merge_callback.snapshots.files import printable

_DESCRIPTION = """\
Remove older merges that a run has published. What stays: the newest N of each run and the last of its
stable phase, what `latest`, `best` or another link in the folder leads to, the window, and every folder
with something in it that the run has not written. A run that is going on may be pruned, too.

Without `latest` nothing is removed: such merges may still wait for their upload."""

_EXAMPLES = """\
examples:
  merge-callback prune lightning_logs/version_0 --dry-run
  merge-callback prune lightning_logs/version_0/merges --keep-last 1
"""


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``prune``."""
    parser.set_defaults(run=_prune)
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, few = parser.add_argument, DEFAULTS["keep_last"]
    add("path", type=Path, metavar="RUN", help="the folder of the merges, or the one that holds it")
    add("--keep-last", type=int, default=few, metavar="N", help="merges that stay of each run (%(default)s)")
    add("--dry-run", action="store_true", help="only say what would be removed")


def _prune(parsed: argparse.Namespace) -> int:
    keep_last, folder = positive("--keep-last", parsed.keep_last), _folder(parsed.path)
    latest = latest_in(folder)
    if latest is None:
        raise ValueError(f"{folder}: has no `latest` that leads to a merge in it, so nothing is removed")
    by_run = defaultdict[str | None, list[Emission]](list)
    for emission in emissions(folder):
        by_run[emission.record.run_id].append(emission)
    if not parsed.dry_run:
        finish_removals(folder)
    stable = [
        [e.path for e in found if e.record.content.get("phase") == "stable"] for found in by_run.values()
    ]
    preserved = [paths[-1] for paths in stable if paths]
    count = freed = 0
    for older in (emission for found in by_run.values() for emission in found[:-keep_last]):
        name, size, link = older.path.name, older.nbytes, linked(folder).get(older.path.name)
        reason = f"{link} leads to it" if link else older.foreign()
        if older.path in preserved:
            reason = "it is the last of the stable phase"
        if not reason and not parsed.dry_run:
            remove_emission(folder, name)
        verb = "keeps" if reason else "would remove" if parsed.dry_run else "removed"
        print(printable(f"{verb} {name}" + (f": {reason}" if reason else f", {in_bytes(size)}")))
        count, freed = count + (not reason), freed + (0 if reason else size)
    would, merges = "would be " * parsed.dry_run, "merge" if count == 1 else "merges"
    print(f"{count} {merges} {would}removed, {in_bytes(freed)} {would}freed; latest is {printable(latest)}")
    return 0


def _folder(path: Path) -> Path:
    """The folder of the merges: the one named, or the only one in it.

    Raises:
        ValueError: if there is none, or there are several.
    """
    found = [folder for folder in (path, *sorted(path.glob("*merges*"))) if emissions(folder)]
    if path in found or len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path}: name one of {', '.join(map(str, found))}")
    raise ValueError(f"{path}: holds no merges that a run has published; name the folder with `latest` in it")
