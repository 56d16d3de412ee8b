"""The kernels' own tests, compiled on the GPU; they need pytest."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu_check.checks import Outcome, Section, Skipped
from benchmarks.gpu_check.machines import ROOT, Machine

SECTION = Section("cases", 120)


class Told:
    """What pytest tells of the tests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failed.append(f"{report.nodeid.split('::')[-1]}: {str(report.longrepr)[-200:]}")


@SECTION.check("tests/support/triton_cases.py", "all pass", 30)
def triton_cases(machine: Machine) -> Outcome:
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    import pytest

    few = ["-k", "random_numbers or kernels_are_what"] if machine.is_dry else []
    cases, told = str(ROOT / "tests/support/triton_cases.py"), Told()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", *few, cases], plugins=[told])
    counts = ", ".join(f"{count} {outcome}" for outcome, count in told.counts.items())
    failures = "; ".join(" ".join(failure.split()) for failure in told.failed[:3])
    return Outcome(f"{counts}. {failures}", code == 0 and told.counts["passed"] > 0)
