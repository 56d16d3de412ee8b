"""Writes a benchmark's figures with the machine and the versions they were measured on."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""A Trainer's options that leave what is measured alone."""


def machine() -> dict[str, Any]:
    """What ran the benchmark."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def described(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A benchmark's figures, with what they were measured on."""
    packages = ("torch", "lightning", "merge-callback")
    return {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        **figures,
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json`` and returns its path."""
    record = described(name, figures)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # a source tree on the path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
