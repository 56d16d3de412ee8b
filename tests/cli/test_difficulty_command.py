"""`merge-callback difficulty`: tables whose values were worked out by hand, and a line for each example."""

import csv
import math

import pytest
import torch
from safetensors.torch import save_file

from merge_callback.cli.main import main


def log_of(*probabilities):
    return torch.tensor(probabilities).log()


RIGHT, WRONG = [0.75, 0.25], [0.25, 0.75]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Twenty examples, two in each bin: the merge forgets the second of each bin above 5."""
    monkeypatch.chdir(tmp_path)
    tensors = {
        "scores": torch.arange(20) / 20,
        "ids": torch.arange(20) * 3,
        "labels": torch.zeros(20, dtype=torch.int64),
        "expert": log_of(*[RIGHT] * 20),
        "merged": log_of(*[WRONG if i > 10 and i % 2 else RIGHT for i in range(20)]),
        "early": log_of(*[[0.5, 0.5]] * 20),
    }
    save_file(tensors, "law.safetensors")
    return tensors


def rows_of(printed, title):
    """The numbers of the table under a title."""
    lines = printed[printed.index(title) :].splitlines()[2:12]
    return [[float(cell) for cell in line.split()] for line in lines]


def test_the_table_has_each_bins_means(task, capsys):
    assert main(["difficulty", "law.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "mean of" not in printed
    for i, row in enumerate(rows_of(printed, "law.safetensors: 20 examples")):
        lost = 50 if i >= 5 else 0
        expected = [i + 1, (4 * i + 1) / 40, 100, 100 - lost, lost, 0.5, math.log(1.5), 0.5]
        assert row == pytest.approx(expected, abs=6e-5)


def test_several_tasks_are_averaged_over_what_all_of_them_tell(task, capsys):
    half = {name: task[name] for name in ("labels", "expert", "merged")}
    save_file({**half, "scores": task["scores"] + 1, "merged": half["expert"].clone()}, "code.safetensors")
    assert main(["difficulty", "law.safetensors", "code.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert len(rows_of(printed, "code.safetensors: 20 examples")[0]) == 5
    for i, row in enumerate(rows_of(printed, "mean of 2 tasks")):
        lost = 25 if i >= 5 else 0
        assert row == pytest.approx([i + 1, (4 * i + 1) / 40 + 0.5, 100, 100 - lost, lost], abs=6e-5)


def test_the_csv_has_a_line_for_every_example(task, capsys):
    save_file({"scores": task["scores"]}, "code.safetensors")
    command = ["difficulty", "law.safetensors", "code.safetensors", "--csv", "examples.csv"]
    assert main(command) == 0
    with open("examples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert rows[11]["task"] == "law.safetensors"
    names = ("id", "bin", "expert_right", "merged_right", "forgotten")
    assert [rows[11][name] for name in names] == ["33", "6", "1", "0", "1"]
    found = [float(rows[11][name]) for name in ("el2n", "margin", "loss", "shift")]
    assert found == pytest.approx([0.55, 0.5, math.log(1.5), 0.5])
    assert [rows[31][name] for name in ("id", "bin", "forgotten", "shift")] == ["11", "6", "", ""]
    assert main(command) == 1
    assert "examples.csv exists; name another file with --csv" in capsys.readouterr().err


def test_what_is_no_such_file_is_refused_in_a_line(tmp_path, capsys):
    for path in (tmp_path / "none.safetensors", tmp_path):
        assert main(["difficulty", str(path)]) == 1
        told = capsys.readouterr().err
        assert (told.count("\n"), str(path) in told) == (1, True)
