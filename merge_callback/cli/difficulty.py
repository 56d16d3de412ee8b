"""The command ``difficulty``."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.analysis.difficulty_file import Examples, read_examples
from merge_callback.snapshots.files import printable

_COLUMNS = {
    "el2n": ("EL2N", 1.0),
    "expert_right": ("expert right %", 100.0),
    "merged_right": ("merge right %", 100.0),
    "forgotten": ("forgotten %", 100.0),
    "margin": ("Δmargin", 1.0),
    "loss": ("Δloss (nats)", 1.0),
    "shift": ("shift", 1.0),
}
"""What each measure is called, and by what it is multiplied."""

_DESCRIPTION = """\
Tell which examples are hard, which of them a merge of experts forgets, and which the expert memorised: means
over ten equal bins of EL2N, bin 1 the easiest."""

_EPILOG = """\
the file of a task is a safetensors file with
  scores                    (examples,)                  EL2N, the mean over seeds; or instead of it
  seeds                     (seeds, examples, classes)   logits of models early in fine-tuning (32 steps)
  labels                    (examples,) int64
  expert, merged, early     (examples, classes)          logits of the expert, of its merge, of an early
                                                         checkpoint of it; each may be left out
  ids                       (examples,) int64            what --csv calls the examples; may be left out
In Python, merge_callback.analysis.difficulty_file.save_examples writes it from the metric El2n.

examples:
  merge-callback difficulty law.safetensors
  merge-callback difficulty law.safetensors code.safetensors --csv examples.csv
"""


def add_difficulty(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``difficulty``."""
    parser.set_defaults(run=_difficulty)
    parser.description = _DESCRIPTION
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="one for each task; the last table is their mean")
    add("--csv", type=Path, metavar="FILE", help="write a line for every example, to a new file")


def _difficulty(parsed: argparse.Namespace) -> int:
    if parsed.csv is not None and os.path.lexists(parsed.csv):
        raise FileExistsError(f"{parsed.csv} exists; name another file with --csv")
    tasks = {path: read_examples(path) for path in parsed.files}
    for line in _report(tasks):
        print(printable(line))
    if parsed.csv is not None:
        with open(parsed.csv, "x", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["task", "id", "bin", *_COLUMNS])
            for path, examples in tasks.items():
                writer.writerows(_rows(path, examples))
    return 0


def _report(tasks: Mapping[Path, Examples]) -> Iterator[str]:
    tables = {path: examples.by_bin() for path, examples in tasks.items()}
    for path, table in tables.items():
        yield f"{path}: {len(tasks[path].scores):,} examples"
        yield from _table(table)
        yield ""
    if len(tables) > 1:
        shared = [name for name in _COLUMNS if all(name in table for table in tables.values())]
        yield f"mean of {len(tables)} tasks"
        yield from _table({n: torch.stack([t[n] for t in tables.values()]).mean(0) for n in shared})
        yield ""
    yield "Δmargin, Δloss: later minus earlier margin, earlier minus later loss; shift: ‖p_late - p_early‖₁"


def _table(measures: Mapping[str, Tensor]) -> Iterator[str]:
    told = [(*_COLUMNS[name], values.tolist()) for name, values in measures.items()]
    yield " bin" + "".join(f"{title:>16}" for title, _, _ in told)
    for i in range(10):
        yield f"{i + 1:4}" + "".join(f"{values[i] * factor:16.4f}" for _, factor, values in told)


def _rows(path: Path, examples: Examples) -> Iterator[Sequence[object]]:
    measures = examples.by_example()
    columns = [measures[name].tolist() if name in measures else None for name in _COLUMNS]
    for i, (number, bin_) in enumerate(zip(examples.ids.tolist(), examples.bins.tolist(), strict=True)):
        values = [None if column is None else column[i] for column in columns]
        yield [path, number, bin_, *(int(v) if isinstance(v, bool) else v for v in values)]
