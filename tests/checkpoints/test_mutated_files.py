"""Whatever is wrong with a file, it is refused in one line that names it, soon and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mutated_files
import pytest
from checkpoint_files import ROOT
from command_line import run

PROGRAM = Path(mutated_files.__file__)


def read_mutated(folder, count, seed=0):
    """Has that many mutated files read; returns what went wrong, in words, and how many were read."""
    wrong, begin, read = [], 0, 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while begin < count:
        formats = ",".join(mutated_files.FORMATS)
        command = [sys.executable, str(PROGRAM), str(folder), formats, str(seed), str(begin), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        cases, last = {}, None
        for line in done.stdout.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "case":
                number, _, what = rest.partition(" ")
                last, cases[int(number)] = int(number), what
            elif kind == "wrong":
                number, _, reason = rest.partition(" ")
                wrong.append(f"case {number} ({cases[int(number)]}): {json.loads(reason)}")
        assert last is not None, done.stderr[-2000:]
        read += len(cases)
        if done.returncode:
            wrong.append(f"case {last} ({cases[last]}): ended by {done.returncode}: {done.stderr[-300:]}")
        begin = last + 1
    return wrong, read


@pytest.mark.usefixtures("in_this_process")
def test_the_sound_files_are_read(tmp_path):
    for name, make in mutated_files.FORMATS.items():
        (tmp_path / name).mkdir()
        file = make(tmp_path / name)
        if name != "options":
            assert run(["inspect", str(tmp_path / name / file)])[0] == 0, name
        for number in (0, 1):  # the latter prunes the window
            assert not mutated_files.verdict(tmp_path / name, file, number), name


def test_a_hundred_mutated_files_are_read_or_refused_in_a_line(tmp_path):
    wrong, read = read_mutated(tmp_path, 100)
    assert (wrong, read) == ([], 100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_files_are_read_or_refused_in_a_line(tmp_path):
    wrong, read = read_mutated(tmp_path, 10_000, seed=1)
    assert (wrong, read) == ([], 10_000)
