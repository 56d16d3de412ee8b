"""The event file, whose lines are not synced, after a power loss."""

import pytest

from merge_callback.engine.events import EventFile
from merge_callback.events import EVENTS
from merge_callback.report.history import read_history


@pytest.mark.parametrize("kept", [0, 9, 40])
def test_a_file_whose_end_is_zeros_is_gone_on_with(tmp_path, kept):
    EventFile(tmp_path, {"run_id": "one"}).write("snapshot", 2)
    content = (tmp_path / EVENTS).read_bytes()
    (tmp_path / EVENTS).write_bytes(content[:kept] + bytes(len(content) - kept))
    EventFile(tmp_path, {"run_id": "one"}).write("snapshot", 4)
    EventFile(tmp_path, {"run_id": "one"}).write("snapshot", 6)

    assert [event["step"] for event in read_history(tmp_path).of("snapshot")] == [4, 6]
