"""A sweep that was killed while it began its folder of results goes on there."""

import os
from pathlib import Path

import pytest

from merge_callback.offline.sweep_results import RESULTS, SweepResults

ENTRY = {"metrics": {"val_loss": 0.5}}


class Killed(BaseException):
    """Nothing that is done afterwards counts."""


@pytest.mark.parametrize("dies_in", ["sync", "put_in_place"])
def test_the_folder_of_a_sweep_that_was_killed_at_once_is_taken_for_its_own(tmp_path, monkeypatch, dies_in):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("merge_callback.snapshots.files.clear", lambda path: None)
        where = "merge_callback.offline.sweep_results.sync" if dies_in == "sync" else "os.replace"
        patched.setattr(where, die)
        with pytest.raises(Killed):
            SweepResults(tmp_path / "scores").begin()
    assert os.listdir(tmp_path / "scores") == [f".{RESULTS}.{os.getpid()}.tmp"]
    results = SweepResults(tmp_path / "scores")
    results.begin()
    results.add("a", ENTRY)
    assert os.listdir(tmp_path / "scores") == [RESULTS]
    assert SweepResults(tmp_path / "scores").known["a"]["metrics"] == ENTRY["metrics"]


def test_scores_of_one_process_of_several_are_enough(tmp_path):
    results = SweepResults(tmp_path / "scores", rank=1)
    results.begin()
    results.add("a", ENTRY)
    assert [*SweepResults(tmp_path / "scores").known] == ["a"]
    assert [path.name for path in Path(tmp_path / "scores").iterdir()] == ["results-1.jsonl"]
