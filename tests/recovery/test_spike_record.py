"""What is kept of a spike: a line of strict JSON each, a sentence, and text in the loggers that show any."""

import functools
import json
import logging
import math

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merge_callback.recovery.spike_log import RECORD, announce, append, sentence
from merge_callback.trainers.lightning.host import LightningHost

SPIKE = {
    "trigger": "loss",
    "watched": "loss",
    "onset": 120,
    "step": 124,
    "values": [3.1, 3.2, 3.3, 3.4, 3.51234],
    "baseline": 2.0,
    "threshold": 2.1,
}
RESTORE = {
    **SPIKE,
    "event": "restore",
    "restored_at": 125,
    "snapshots": [{"step": s, "tokens": None, "file": f"{s}.st", "weight": 1 / 3} for s in (90, 100, 110)],
    "method": "sma",
    "optimizer": "reset",
    "rewarm_steps": 100,
    "lr_factor": 1.0,
    "in_a_row": 1,
    "restores": 1,
    "seconds": 0.1234,
}


def strict(line):
    """As a reader does that knows the standard: NaN and Infinity are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def events(folder):
    return [strict(line) for line in (folder / RECORD).read_text().splitlines()]


# --- the file ---------------------------------------------------------------------------------------------


def test_every_event_is_a_line_of_its_own(tmp_path):
    for record in (RESTORE, {**SPIKE, "event": "warn"}, RESTORE):
        append(tmp_path, record)
    assert events(tmp_path) == [RESTORE, {**SPIKE, "event": "warn"}, RESTORE]
    assert (tmp_path / RECORD).read_text().endswith("\n")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_json_is_text_that_float_reads(tmp_path, bad):
    nested = {"deep": [{"value": bad}, (bad, 1.0)]}
    append(tmp_path, {**SPIKE, "event": "warn", "values": [3.0, bad], "threshold": bad, **nested})
    (event,) = events(tmp_path)
    assert [repr(float(value)) for value in event["values"]] == [repr(3.0), repr(bad)]
    assert repr(float(event["threshold"])) == repr(bad)
    assert event["deep"] == [{"value": str(bad)}, [str(bad), 1.0]]


def test_a_policy_without_a_name_is_recorded_all_the_same(tmp_path):
    policy = functools.partial(print, end="")
    append(tmp_path, {**RESTORE, "optimizer": policy, "dirpath": tmp_path})
    (event,) = events(tmp_path)
    assert "functools.partial" in event["optimizer"]
    assert event["dirpath"] == str(tmp_path)


@pytest.mark.parametrize("torn", [b'{"event": "rest', b'{"event": "r\xc3', b"\n\n{", b'{"whole": 1}'])
def test_a_line_that_a_kill_cut_off_costs_no_other_line(tmp_path, torn):
    append(tmp_path, RESTORE)
    with (tmp_path / RECORD).open("ab") as file:
        file.write(torn)
    append(tmp_path, RESTORE)
    append(tmp_path, RESTORE)
    lines = (tmp_path / RECORD).read_bytes().split(b"\n")
    assert [strict(line) for line in (lines[0], *lines[-3:-1])] == [RESTORE] * 3
    assert lines[-1] == b""
    assert b"\n".join(lines[1:-3]) == torn  # and nothing that was there is gone


@pytest.mark.parametrize("obstacle", ["no folder", "a folder of that name"])
def test_an_event_that_cannot_be_written_is_logged_whole(tmp_path, obstacle, caplog):
    folder = tmp_path / "merges"
    if obstacle != "no folder":
        (folder / RECORD).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        append(folder, RESTORE)
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(folder / RECORD) in message
    assert strict(message[message.index('{"') :]) == RESTORE


# --- the sentence -----------------------------------------------------------------------------------------


def test_a_restore_says_what_happened_and_what_was_done():
    assert sentence(RESTORE) == (
        "merge: loss spike: 5 outliers from step 120 to 124, the last 3.512 (baseline 2, threshold 2.1); "
        "restored the sma of the snapshots of steps 90, 100, 110 in 0.12 s (number 1 in a row); "
        "optimizer: reset, the learning rate warms up again over 100 steps"
    )
    assert sentence({**RESTORE, "lr_factor": 0.25}).endswith("over 100 steps to 0.25 of the schedule")


def test_a_single_nan_before_there_is_a_baseline_can_be_said():
    record = {**SPIKE, "event": "warn", "trigger": "non-finite loss", "onset": 3, "step": 3}
    said = sentence({**record, "values": [math.nan], "baseline": math.nan, "threshold": math.nan})
    what, outcome = said.split("; ")
    assert what == ("merge: non-finite loss spike: NaN at step 3 (there is no baseline yet)")
    assert outcome == "nothing is done about it"


@pytest.mark.parametrize("watched", ["loss", "gradient norm"])
def test_a_shift_names_what_has_shifted(watched):
    said = sentence({**SPIKE, "event": "shift", "trigger": watched, "watched": watched})
    assert said.startswith(f"merge: {watched} shift: 5 outliers")
    assert said.endswith("this is the new baseline")


def test_the_reason_for_doing_nothing_is_given():
    said = sentence({**SPIKE, "event": "stop", "reason": "5 restores in a row did not help: stopped"})
    assert said.endswith("; 5 restores in a row did not help: stopped")


# --- the loggers ------------------------------------------------------------------------------------------


def shown_by(trainer):
    host = object.__new__(LightningHost)  # one needs a fit
    host.trainer = trainer
    return host


def test_an_event_is_a_warning_and_a_text_in_tensorboard(tmp_path):
    board = TensorBoardLogger(tmp_path, name="board", version="")
    loggers = [board, CSVLogger(tmp_path, name="csv")]  # which has no place for text
    trainer = Trainer(accelerator="cpu", devices=1, logger=loggers, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="loss spike: 5 outliers from step 120"):
        announce(shown_by(trainer), RESTORE)
    board.experiment.flush()
    shown = EventAccumulator(board.log_dir)
    shown.Reload()
    (event,) = shown.Tensors("merge_spike/events/text_summary")
    assert event.step == 124
    assert event.tensor_proto.string_val[0].decode() == sentence(RESTORE)


def test_without_a_logger_an_event_is_a_warning_only(tmp_path):
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="this is the new baseline"):
        announce(shown_by(trainer), {**SPIKE, "event": "shift"})
