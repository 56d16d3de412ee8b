"""`benchmarks/gpu_check`: a check that fails is told, whatever it ends with; and its dry run passes."""

import json
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from checkpoint_files import ROOT

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.checks import Outcome, Section, Skipped
from benchmarks.gpu_check.machines import Cpu, Gpu, Pretended
from benchmarks.gpu_check.processes import Process
from benchmarks.gpu_check.sections import NAMES, section
from benchmarks.gpu_check.steps import watched
from merge_callback.engine.session import MergeSession

ENDS = {
    "returns a text": lambda machine: "fine",
    "holds": lambda machine: Outcome("fine", True),
    "is no target": lambda machine: Outcome("3 GB/s", None),
    "does not hold": lambda machine: Outcome("off by 1", False),
    "raises": lambda machine: 1 / 0,
    "can't be made": lambda machine: (_ for _ in ()).throw(Skipped("too small")),
}
STATUSES = ["ok", "ok", "info", "FAIL", "FAIL", "skip", "skip", "skip"]


def rows():
    made = Section("made", 9)
    for name, run in ENDS.items():
        made.check(name, "")(run)
    made.check("needs a GPU", "", on_gpu=True)(ENDS["raises"])
    made.check("needs more time", "", seconds=100)(ENDS["raises"])
    return list(made.run(Cpu(), 9))


def test_a_check_ends_in_the_status_of_what_it_found():
    found = rows()
    assert [row["status"] for row in found] == STATUSES
    assert "division by zero" in found[4]["value"]
    assert "1 / 0" in found[4]["traceback"]


@pytest.mark.parametrize("fails", [True, False])
def test_the_exit_code_says_whether_a_check_failed(tmp_path, monkeypatch, fails, capsys):
    told = [row for row in rows() if fails or row["status"] != "FAIL"]

    def results(*args):
        for done, row in enumerate(told):
            yield row
            written = json.loads((tmp_path / "gpu_check.json").read_text())  # at once, not at the end
            assert [row["status"] for row in written["checks"]] == [row["status"] for row in told[: done + 1]]

    monkeypatch.setattr(command, "results", results)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry", "--out", str(tmp_path)])
    assert command.main() == fails
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {"date", "machine", "versions", "gpu"} <= written.keys()
    assert ("2 FAIL" if fails else "0 FAIL") in capsys.readouterr().out.splitlines()[-2]


def test_a_process_that_crashes_is_a_failure_of_its_section(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    (row,) = Process("kernels", True, tmp_path / "log").rows(9)
    assert (row["section"], row["status"]) == ("kernels", "FAIL")
    assert "exit code 1" in row["value"]


@pytest.mark.parametrize("waits", [True, False])
def test_a_hook_that_waits_for_the_device_fails(monkeypatch, waits):
    end_batch = MergeSession.end_batch

    def end_and_wait(session, outputs, *args):
        if waits:
            outputs["loss"].item()
        return end_batch(session, outputs, *args)

    monkeypatch.setattr(MergeSession, "end_batch", end_and_wait)
    assert watched(Pretended()).holds is not waits


def test_what_waits_on_a_gpu_is_noted(monkeypatch):
    """PyTorch warns of its own waits; those for a whole stream or device it does not see."""
    modes = []
    for name, stand_in in {
        "is_available": lambda: True,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": modes.append,
        "synchronize": lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with Gpu().waits() as found:
        warnings.warn("Synchronization debug mode does not detect all synchronizing operations", stacklevel=1)
        assert not found
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        torch.cuda.synchronize()
    assert [wait.partition(":")[0] for wait in found] == ["the whole stream or device", "test_gpu_check.py"]
    assert modes == ["warn", 0]


def test_every_section_has_checks():
    for name in NAMES:
        if find_spec("triton") or name not in ("kernels", "ties"):
            assert section(name).name == name
            assert section(name).checks


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_dry_run_of_all_sections_passes(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("this Triton's interpreter cannot loop under NumPy 2.4; Triton 3.9 can")
    assert run.returncode == 0, run.stdout + run.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert {row["section"] for row in checks if row["status"] in ("ok", "info")} == {*NAMES}
    assert {row["value"] for row in checks if row["status"] == "skip"} == {"needs a GPU"}
