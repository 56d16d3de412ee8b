"""The kernels' own tests, compiled on the GPU; they need pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.gpu_check.checks import Outcome, Section, Skipped
from benchmarks.gpu_check.machines import ROOT, Machine

SECTION = Section("cases", 120)


@SECTION.check("tests/support/triton_cases.py", "all pass", 30)
def triton_cases(machine: Machine) -> Outcome:
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables["TRITON_INTERPRET"] = str(int(machine.is_dry))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    one = ["-k", "random_numbers or kernels_are_what"] if machine.is_dry else []
    run = subprocess.run(
        [*command, *one, str(ROOT / "tests/support/triton_cases.py")],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    said = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    last = (run.stdout.strip() or run.stderr.strip()).splitlines()[-1]
    return Outcome(f"{last} {' | '.join(said)[:400]}".strip(), run.returncode == 0)
