"""`merge-callback prune` where an earlier one was killed in the middle of a removal."""

import pytest

from merge_callback.cli.main import main
from merge_callback.publish import Publisher
from merge_callback.publish.emission import remove_emission
from merge_callback.snapshots.files import hidden_path


class Killed(BaseException):
    """Nothing that is done afterwards counts."""


@pytest.fixture
def folder(tmp_path):
    publisher = Publisher(tmp_path / "merges", None, 1 << 30)
    for step in (1, 2):
        record = {"run_id": "run", "step": step, "method": {"name": "sma", "options": {}, "reference": ""}}
        publisher.publish(f"step={step:08d}-sma", lambda draft: {}, record)
    return tmp_path / "merges"


def test_what_a_killed_removal_left_is_removed(folder, monkeypatch, capsys):
    def die(path):
        if path.exists():
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("merge_callback.publish.emission.clear", die)
        with pytest.raises(Killed):
            remove_emission(folder, "step=00000001-sma")
    left, draft = hidden_path(folder, "step=00000001-sma", "old"), folder / ".step=00000003-sma.7.tmp"
    draft.mkdir()  # of a run that is going on
    assert (left / "merge.json").exists()
    assert main(["prune", str(folder), "--dry-run"]) == 0
    assert left.exists()
    assert main(["prune", str(folder)]) == 0
    assert [left.exists(), draft.exists()] == [False, True]
    assert "0 merges removed" in capsys.readouterr().out
