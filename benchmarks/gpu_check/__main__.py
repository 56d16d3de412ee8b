"""Checks the project on one NVIDIA GPU; it ends itself after eight minutes.

    python -m benchmarks.gpu_check --out results                 # from the root of the repository
    python -m benchmarks.gpu_check --sections kernels bandwidth  # some of it
    python -m benchmarks.gpu_check --budget 240                  # less time: the most important comes first
    python -m benchmarks.gpu_check --dry                         # no GPU: tiny sizes, Triton's interpreter

It needs the repository, torch, lightning and triton; nothing has to be installed. Sections run in processes
of their own. Each result is written to OUT/gpu_check.json at once, and a table is printed last. The exit code
is 1 if something does not do what it should. Please send us the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.checks import Row, table
from benchmarks.gpu_check.processes import Process, serve
from benchmarks.gpu_check.sections import NAMES, section
from benchmarks.record import described

BUDGET = 460.0

_LEAST = 12.0
"""Seconds that a section needs to be begun."""


def main() -> int:
    """Runs the sections; returns the exit code."""
    options = parse()
    if options.section:
        serve(options.section, options.dry)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    record = described("gpu_check", {"dry": options.dry, "gpu": gpu(), "checks": []})
    rows: list[Row] = record["checks"]
    for row in results(options.sections, options.dry, options.budget, options.out / "gpu_check.log"):
        rows.append(row)
        print(f"{row['status']:4}  {row['section']}: {row['name']}: {row['value'][:160]}", flush=True)
        write(record, options.out / "gpu_check.json")
    print("\n" + table(rows))
    print(f"everything: {options.out / 'gpu_check.json'}")
    return int(any(row["status"] == "FAIL" for row in rows))


def results(names: list[str], is_dry: bool, budget: float, log: Path) -> Iterator[Row]:
    """Runs sections one after another; while one runs, the next one imports what it needs."""
    end = time.monotonic() + budget
    log.unlink(missing_ok=True)
    waiting: Process | None = Process(names[0], is_dry, log)
    for index, name in enumerate(names):
        process, waiting = waiting, None
        left = end - time.monotonic()
        if process is None or left < _LEAST:
            if process is not None:
                process.end()
            row = {"section": name, "name": "the section", "expected": "", "seconds": 0.0}
            yield {**row, "status": "skip", "value": "no time left"}
            continue
        if index + 1 < len(names):
            waiting = Process(names[index + 1], is_dry, log)
        # A processor takes its time, but shows nothing that depends on it.
        yield from process.rows(left if is_dry else min(section(name).seconds, left))


def write(record: dict[str, Any], path: Path) -> None:
    """Writes the file as a whole, so that there always is one that can be read."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(temporary, path)


def gpu() -> dict[str, Any]:
    """What the GPU is, and what drives it."""
    found: dict[str, Any] = {"cuda": torch.version.cuda}
    with suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        told = torch.cuda.get_device_properties(0)
        found |= {
            "name": told.name,
            "capability": f"{told.major}.{told.minor}",
            "gigabytes": told.total_memory / 1e9,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument(
        "--sections", nargs="+", choices=NAMES, default=[*NAMES], metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--budget", type=float, help=f"seconds (default: {BUDGET:.0f}; 1800 if dry)")
    parser.add_argument("--section", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        parser.error("PyTorch finds no NVIDIA GPU here; --dry runs without one")
    options.budget = options.budget or (1800.0 if options.dry else BUDGET)
    return options


if __name__ == "__main__":
    sys.exit(main())
