"""The commands that are recorded: each is a real process, and can be run again in what a power loss has left.

As a script it is such a process: ``commands.py ROOT LOG EXCHANGE ARGUMENTS…``.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_callback.cli.main import main
from merge_callback.offline.sweep_results import SweepResults

TESTS = Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(TESTS / "support"), str(TESTS)) if path not in sys.path]

from power_loss.checks import Verdict, inspected  # noqa: E402 - found by the line before
from power_loss.log import Log, Recorder  # noqa: E402
from power_loss.states import MODELS, Disk, below, digest, lay_out  # noqa: E402

ROOT, LOG, INPUTS, OUT = "disk", "log", "inputs", "new/newer/out"
"""In the folder of a command: what is watched, and its log; in the first, what is merged, and the result."""


@dataclass(frozen=True)
class Done:
    """How many of the commands have come to an end."""

    commands: int = 0

    def after(self, record, disk):
        """The same after one more record."""
        return replace(self, commands=self.commands + 1) if record.get("mark") == "done" else self


class Commands:
    """One merge, or a second one that replaces it.

    Args:
        count: of merges; all but the first are forced.
        *options: of the command.
        exchange: whether the system can exchange two names.
        start: runs a command: a folder to watch, one for the log, ``exchange`` and the arguments.
    """

    promises, at_most = Done(), 500

    def __init__(self, count, *options, exchange=True, start=None):
        self.count, self.options, self.exchange = count, options, exchange
        self.start = start or started

    def record(self, place):
        """Runs the commands, and returns the log."""
        inputs = place / ROOT / INPUTS
        inputs.mkdir(parents=True)
        dice = torch.Generator().manual_seed(0)
        for i in range(self.count + 1):
            tensors = {name: torch.randn(700, generator=dice) for name in ("a", "b", "c")}
            save_file(tensors, inputs / f"step={i}.safetensors")
        for i in range(self.count):
            self.start(place / ROOT, place / LOG, self.exchange, self._arguments(place, i, i > 0))
        return Log(place / LOG)

    def prepare(self, place, log):
        """Learns from a log what the commands made, and checks it."""
        disk, self.truth, self.files = Disk(log, MODELS[0]), [], []
        for i, record in enumerate(log.records):
            disk.do(record)
            if i == log.start - 1:
                self.inputs = below(disk.as_it_is(), INPUTS)
            if record.get("mark") == "done":
                assert record["value"] == 0
                tree = below(disk.as_it_is(), OUT)
                inspected(tree, log, place / f"output-{len(self.truth)}")
                self.truth.append(digest(tree))
                self.files.append(json.loads(log.blob(tree["merge.json"]))["files"])

    def judge(self, tree, promises, log):
        """What is wrong with a state: other inputs, or an output that is neither the old nor the new one."""
        verdict, done = Verdict(), promises.commands
        if below(tree, INPUTS) != self.inputs:
            verdict.damaged.append("the inputs have changed")
        allowed = self.truth[max(0, done - 1) : done + 1]
        out = below(tree, OUT)
        if out is not None and digest(out) not in allowed:
            verdict.damaged.append(f"the output is neither the old one nor the new one: {sorted(out)}")
        if out is None and done and not (done < self.count and self._has_another_name(tree, allowed[0])):
            verdict.silent.append("the output is gone")
        return verdict

    def resumes_from(self, promises):
        """What is run again: the last command."""
        return (self.count - 1,)

    def resume(self, place, log, cases):
        """Runs a command again in each state; how that ended."""
        for tree, number in cases:
            shutil.rmtree(place / ROOT, ignore_errors=True)
            (place / ROOT).mkdir()
            lay_out(tree, log, place / ROOT)
            with redirect_stderr(StringIO()) as told:
                try:
                    code = main(self._arguments(place, number, True))
                except Exception:
                    code, told = -1, StringIO(traceback.format_exc())
            yield code, told.getvalue(), place / ROOT

    def judge_resume(self, found, number):
        """What is wrong with what a command made of a state."""
        verdict, (code, told, root) = Verdict(), found
        if code:
            verdict.crashed.append(f"exit status {code}: {told}")
            return verdict
        out = root / OUT
        if json.loads((out / "merge.json").read_text())["files"] != self.files[number]:
            verdict.torn.append("the output is another")
        if names := [path.name for path in out.parent.iterdir() if path != out]:
            verdict.damaged.append(f"{names} are left over")
        return verdict

    def _has_another_name(self, tree, old):
        """Whether the old output lies beside its place, from which the next command puts it back."""
        if self.exchange:
            return False
        above = below(tree, os.path.dirname(OUT)) or {}
        return any(name.endswith(".old") and digest(below(above, name)) == old for name in above)

    def _arguments(self, place, number, force):
        inputs = [place / ROOT / INPUTS / f"step={i}.safetensors" for i in (number, number + 1)]
        forced = ["--force"] if force else []
        output = ["--output", str(place / ROOT / OUT), "--quiet"]
        return ["merge", *map(str, inputs), *output, *forced, *self.options]


def started(root, log, exchange, arguments):
    """Runs a command in a process of its own, recorded."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(root), str(log), str(exchange), *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def called(root, log, exchange, arguments):
    """Runs a command in this process, recorded; returns its exit status."""
    recorder, add = Recorder(root, log, exchange), SweepResults.add

    def add_and_tell(self, key, entry):
        add(self, key, entry)
        recorder.mark("scored", key)

    with recorder.recording(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepResults, "add", add_and_tell)
        status = main(arguments)
        recorder.mark("done", status)
    return status


COMMANDS = {
    "offline": lambda: Commands(1),
    "offline, in shards": lambda: Commands(1, "--shard-size", "4kB"),
    "offline, Lightning": lambda: Commands(2, "--as", "lightning"),
    "--force": lambda: Commands(2),
    "--force, in shards": lambda: Commands(2, "--shard-size", "4kB"),
    "--force, no exchange": lambda: Commands(2, exchange=False),
}
"""By the kind of command."""


if __name__ == "__main__":
    sys.exit(called(sys.argv[1], sys.argv[2], sys.argv[3] == "True", sys.argv[4:]))
