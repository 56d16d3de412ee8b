"""The event file: it tells what happened, whichever trainer trains, and never ends a run."""

import json

import pytest
import torch
from resumed_runs import stopped
from test_full_disk import needs_root, small_disk  # noqa: F401 - a fixture
from tiny_run import SaveAt, StopError, fit
from training_runs import emissions

from merge_callback.engine.events import EventFile
from merge_callback.events import EVENTS, FORMAT, KINDS
from merge_callback.report.history import history_of, read_history

RUN = {"run_id": "one"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished fit of 26 steps, a snapshot every two steps, an emission every four."""
    folder = tmp_path_factory.mktemp("run")
    fit(folder)
    return folder / "merges"


def test_every_line_is_of_a_documented_kind_with_its_entries(run):
    entries = {kind.name: {*kind.entries} for kind in KINDS}
    lines = lines_of(run)

    assert lines[0]["event"] == "run"
    assert lines[0]["format"] == FORMAT
    assert lines[-1]["event"] == "end"
    assert lines[-1]["finished"]
    for line in lines:
        assert line.keys() - {"event", "time", "step"} == entries[line["event"]]
    assert {line["event"] for line in lines} >= {"phase", "snapshot", "emission", "validation", "metrics"}


def test_a_line_of_thousands_of_layers_holds_no_thread_up(tmp_path, monkeypatch):
    """C's encoder would hold the GIL until the whole line is done."""
    monkeypatch.setattr(json.encoder, "c_make_encoder", lambda *_: pytest.fail("one call for the whole line"))
    layers = {f"experts.{i}": float(i) for i in range(3)}
    EventFile(tmp_path, RUN).write("snapshot", 1, layers=layers)
    assert lines_of(tmp_path)[-1]["layers"] == layers


def test_it_tells_of_every_snapshot_emission_and_score(run):
    history = read_history(run)

    snapshots = history.of("snapshot")
    assert [event["step"] for event in snapshots] == [*range(2, 27, 2)]
    assert all(event["stall"] > 0 and event["background"] > 0 and event["bytes"] > 0 for event in snapshots)
    assert snapshots[-1]["window"] == [20, 22, 24, 26]
    layers = snapshots[-1]["layers"]
    assert {*layers} == {"embed", "norm", "head"}
    assert min(layers.values()) < snapshots[-1]["diversity"] < max(layers.values())

    published = {path.name: json.loads((path / "merge.json").read_text()) for path in emissions(run)}
    told = {event["path"]: event for event in history.of("emission")}
    for name, record in published.items():
        assert told[name]["step"] == record["step"]
        assert told[name]["snapshots"] == [part["step"] for part in record["snapshots"]]
        weights = [part["weight"] for part in record["snapshots"]]
        assert told[name]["weights"] == weights
        assert told[name]["bytes"] >= (run / name / "model.safetensors").stat().st_size

    validated = [event for event in history.of("validation") if event["merge"] is not None]
    logged = [event["values"] for event in history.of("metrics") if "merged/val_loss" in event["values"]]
    assert len(validated) == len(logged) > 0
    for event, values in zip(validated, logged, strict=True):
        scores = event["scores"]
        assert scores["merged"]["val_loss"] == values["merged/val_loss"]
        assert event["gains"]["val_loss"] == pytest.approx(
            scores["live"]["val_loss"] - scores["merged"]["val_loss"], abs=1e-6
        )
    assert history.of("phase")[-1]["phase"] == "decay"


def test_what_an_abandoned_future_did_is_dropped(tmp_path):
    checkpoint = stopped(tmp_path, 9, stop=17)
    before = read_history(tmp_path / "merges")
    assert not before.of("end")[-1]["finished"]
    assert [event["step"] for event in before.of("snapshot")][-1] == 16

    with pytest.raises(StopError):
        fit(tmp_path, checkpoint, callbacks=[SaveAt(tmp_path / "b.ckpt", 2, stop=2)])
    history = read_history(tmp_path / "merges")

    assert history.of("resumed")[-1]["step"] == 9
    assert [event["step"] for event in history.of("snapshot")] == [2, 4, 6, 8, 10]
    assert max(event["step"] for event in history.events) == 11


def test_torn_lines_and_strange_ones_are_skipped():
    lines = [
        b'{"event": "run", "time": 1, "step": 0, "format": 1, "run_id": "one"}\n',
        b'{"event": "snapshot", "step": 2, "ti',
        b"\n",
        b"7\n",
        b'{"event": "of a later version", "time": 2, "step": 3}\n',
        b'{"event": "snapshot", "time": 3.5, "step": 4}\n',
        b'{"event": "snapsh\xff',
    ]
    history = history_of("run", lines)

    assert [event["step"] for event in history.of("snapshot")] == [4]


def test_a_line_that_was_cut_off_is_ended_before_the_next(tmp_path):
    EventFile(tmp_path, RUN).write("snapshot", 2)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"event": "snapshot", "st')
    EventFile(tmp_path, RUN).write("snapshot", 4)

    assert [event["step"] for event in read_history(tmp_path).of("snapshot")] == [2, 4]


def test_the_last_of_several_runs_in_a_folder_counts(tmp_path):
    EventFile(tmp_path, RUN).write("snapshot", 8)
    EventFile(tmp_path, {"run_id": "two"}).write("snapshot", 2)

    history = read_history(tmp_path)
    assert history.run["run_id"] == "two"
    assert [event["step"] for event in history.of("snapshot")] == [2]


def test_a_later_format_is_refused(tmp_path):
    (tmp_path / EVENTS).write_text('{"event": "run", "time": 1, "step": 0, "format": 99, "run_id": "one"}\n')
    with pytest.raises(ValueError, match="format 99, and this version"):
        read_history(tmp_path)
    with pytest.raises(ValueError, match=r"no events\.jsonl is there"):
        read_history(tmp_path / "elsewhere")


def test_numbers_that_json_lacks_are_texts_and_tensors_are_numbers(tmp_path):
    nan, values = float("nan"), torch.tensor([2.5, float("inf")])
    EventFile(tmp_path, RUN).write("metrics", 1, values={"a": nan, "b": values[0], "c": values[1], "d": True})

    (event,) = read_history(tmp_path).of("metrics")
    assert event["values"] == {"a": "nan", "b": 2.5, "c": "inf", "d": True}


def test_nothing_is_added_to_a_file_of_somebody_else(tmp_path, caplog):
    (tmp_path / EVENTS).write_text('{"name": "click"}\n')
    events = EventFile(tmp_path, RUN)
    for step in range(2):
        events.write("snapshot", step)

    assert (tmp_path / EVENTS).read_text() == '{"name": "click"}\n'
    assert caplog.text.count("is no event file; move it away") == 1


def test_a_folder_that_is_gone_is_told_once(tmp_path, caplog):
    events = EventFile(tmp_path / "gone", RUN)
    for step in range(3):
        events.write("snapshot", step)

    assert len([r for r in caplog.records if "events could not be written" in r.getMessage()]) == 1
    (tmp_path / "gone").mkdir()
    events.write("snapshot", 3)
    assert [event["step"] for event in read_history(tmp_path / "gone").of("snapshot")] == [3]


@needs_root
def test_the_rest_of_a_full_disk_is_left_to_the_window(small_disk):  # noqa: F811
    disk = small_disk(400)
    EventFile(disk, RUN, reserved=lambda: 1 << 18).write("snapshot", 1)
    EventFile(disk, RUN, reserved=lambda: 1 << 20).write("snapshot", 2)

    assert [event["step"] for event in read_history(disk).of("snapshot")] == [1]
