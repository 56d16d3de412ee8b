"""The sections, the most important ones first."""

from __future__ import annotations

import os
from importlib import import_module

from benchmarks.gpu_check.checks import Section
from benchmarks.gpu_check.machines import Cpu, Gpu, Interpreted, Machine, Pretended

NAMES = (
    "kernels",
    "ties",
    "bandwidth",
    "steps",
    "training",
    "snapshots",
    "recovery",
    "averages",
    "memory",
    "distributed",
    "demo",
    "cases",
)

INTERPRETED = ("kernels", "ties", "cases")
"""Those whose kernels run in Triton's interpreter in a dry run."""

PRETENDED = ("steps", "training", "recovery", "averages", "memory")
"""Those whose modules are on a pretended GPU in a dry run."""


def section(name: str) -> Section:
    """A section by its name."""
    found: Section = import_module(f"benchmarks.gpu_check.{name}").SECTION
    return found


def machine(name: str, is_dry: bool) -> Machine:
    """Where a section runs."""
    if not is_dry:
        return Gpu()
    if name in INTERPRETED:
        return Interpreted()
    return Pretended() if name in PRETENDED else Cpu()


def environment(name: str, is_dry: bool) -> dict[str, str]:
    """The environment of a section's process."""
    more = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
    if is_dry:
        more |= {"TRITON_INTERPRET": str(int(name in INTERPRETED)), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more}
