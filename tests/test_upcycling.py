"""The study of experts that merge well, `benchmarks/upcycling`: its labels, its searches, its verdicts."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from checkpoint_files import ROOT

from benchmarks.upcycling.corpus import CONTEXT, VOCABULARY, File
from benchmarks.upcycling.findings import beside_merged, findings, holds, stopping, verdict
from benchmarks.upcycling.merges import GRIDS, merged, search
from benchmarks.upcycling.model import Encoder
from benchmarks.upcycling.setup import Cache, Part, Study, run
from benchmarks.upcycling.stopping import best_before_stop
from benchmarks.upcycling.tasks import TASKS

SOURCE = """\
class Reader:
    def read(self, path):
        if path:
            names = {"a": (1, path)}
        return open(path, "rb")
"""


@pytest.mark.parametrize(
    ("task", "before", "label"),
    [
        ("block", "class Reader:\n    ", "ClassDef"),
        ("block", "        if path:\n            ", "If"),
        ("statement", "return open(path", "Return"),
        ("bracket", '{"a": (1, ', "(2"),
        ("bracket", "return open(", "(1"),
        ("bracket", "        if ", "none"),
        ("string", 'names = {"a"', "Dict"),
        ("string", 'open(path, "rb"', "Call"),
        ("column", "return open(", "3"),
        ("depth", "if path", "4"),
    ],
)
def test_positions_are_labelled_by_what_the_syntax_tree_and_the_tokens_say(task, before, label):
    lines = SOURCE.splitlines(keepends=True)
    ends = {
        SOURCE[: sum(map(len, lines[: line - 1])) + column]: found
        for line, column, found in TASKS[task](File(SOURCE, ast.parse(SOURCE)))
    }
    assert [found for text, found in ends.items() if text.endswith(before)] == [label]


def test_the_last_features_are_those_of_the_whole_model():
    contexts = torch.randint(VOCABULARY, (3, CONTEXT))
    model = Encoder()
    torch.testing.assert_close(model.last(contexts), model(contexts)[:, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({50: 1, 100: 2, 150: 2, 200: 1, 250: 1.5, 300: 9}, 100),  # the third look without a new best value
        ({50: 1, 100: 2, 150: 1, 200: 1, 250: 3}, 250),
        ({2: 9, 50: 1, 64: 9, 100: 2}, 100),  # only multiples of 50 are looks
    ],
)
def test_the_best_checkpoint_is_of_the_time_before_patience_ran_out(values, best):
    assert best_before_stop(values, every=50, patience=3) == best


@pytest.mark.parametrize("peak", range(20))
def test_the_search_finds_each_peak_of_a_grid_with_half_its_evaluations(peak):
    grid, asked = GRIDS["task_arithmetic"][0], []

    def score(scale):
        asked.append(scale)
        return -abs(scale - grid[peak])

    assert search(grid, score) == (0, grid[peak])
    assert len(asked) == len(set(asked)) <= 10


def test_task_arithmetic_is_the_plain_sum_of_the_paper():
    base, experts = {"w": torch.ones(2)}, [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 4.0])}]
    assert merged(base, experts, "task_arithmetic", 0.5)["w"].tolist() == [1.5, 2.5]


def test_a_killed_study_goes_on_with_the_part_it_was_at(tmp_path, capsys):
    cache, made = Cache(tmp_path), []

    def make(name):
        made.append(name)
        if made == ["a", "b"]:
            raise KeyboardInterrupt
        return name

    parts = [Part(name, 1, lambda name=name: make(name)) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        run(parts, cache)
    run(parts, cache)
    assert made == ["a", "b", "b", "c"]
    assert [cache.get(name) for name in "abc"] == ["a", "b", "c"]
    assert capsys.readouterr().out.endswith("2/2 c: about 0 minutes left\n")


def test_a_difference_counts_if_all_seeds_agree():
    assert holds([0.9, 0.4])
    assert not holds([2.0, -0.1])
    assert not holds([0.1, 0.1])
    assert [verdict(each) for each in ([True], [True, False], [False])] == ["reproduced", "partly", "not"]


def test_the_page_tells_what_the_last_study_found():
    record = json.loads((ROOT / "benchmarks/results/upcycling.json").read_text())
    assert record["findings"] == findings(record)
    assert record["stopping"] == stopping(record)
    assert record["beside_merged"] == beside_merged(record)
    assert record["study"]["last"] == Study().last


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes on a free core
def test_a_very_small_study_runs_to_its_pictures(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.upcycling",
        "--quick",
        "--cache",
        tmp_path,
        "--out",
        tmp_path,
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    record = json.loads((tmp_path / "upcycling.json").read_text())
    assert len(record["findings"]) == 15
    assert len(list(tmp_path.glob("upcycling_*.png"))) == 3
