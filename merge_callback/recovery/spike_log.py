"""Reports and records spike events: a sentence for people, and a line of JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merge_callback.messages import warn
from merge_callback.signals.host import Host
from merge_callback.snapshots.files import append_line, plain

log = logging.getLogger(__name__)

RECORD = "spikes.jsonl"


def announce(host: Host, record: Mapping[str, Any]) -> None:
    """Warns of an event, and shows it as text in every logger that can (TensorBoard)."""
    text = sentence(record)
    warn(text)
    host.log_text(text, record["step"])


def append(
    folder: Path, record: Mapping[str, Any], before_writing: Callable[[], object] = lambda: None
) -> None:
    """Appends the event durably to the folder's ``spikes.jsonl``. A full disk is logged; the run goes on.

    Args:
        folder: the run's folder.
        record: the event's record.
        before_writing: raises an ``OSError`` if the folder belongs to another run by now.
    """
    path = folder / RECORD
    line = json.dumps(plain(record), allow_nan=False, default=str)
    try:
        before_writing()
        append_line(path, line)
    except OSError as error:
        log.warning("merge: the event could not be written to %s (%s): %s", path, error, line)


def sentence(record: Mapping[str, Any]) -> str:
    """Describes an event in one sentence.

    >>> event = {"event": "warn", "step": 12, "onset": 8, "trigger": "loss", "values": [3.0] * 5}
    >>> print(sentence({**event, "baseline": 2.0, "threshold": 2.5, "reason": "only reported"}))
    merge: loss spike: 5 outliers from step 8 to 12, the last 3 (baseline 2, threshold 2.5); only reported
    """
    watched = record["trigger"]
    if record["event"] == "drift":
        return (
            f"merge: {watched} drift: it has crept up from {record['best']:.4g} to {record['level']:.4g} by "
            f"step {record['step']}; nothing is done about it"
        )
    values = record["values"]
    limits = f"baseline {number(record['baseline'])}, threshold {number(record['threshold'])}"
    if math.isnan(record["baseline"]):
        limits = "there is no baseline yet"
    what = (
        f"{len(values)} outlier{'s' * (len(values) > 1)} from step {record['onset']} to {record['step']}, "
        f"the last {number(values[-1])} ({limits})"
    )
    if len(values) == 1 and not math.isfinite(values[0]):
        what = f"{number(values[0])} at step {record['step']} ({limits})"
    kind = "shift" if record["event"] == "shift" else "spike"
    sick = record.get("sick_rank")
    rank = "" if sick is None else f"; only rank {sick} has seen them, so its hardware may be faulty"
    return f"merge: {watched} {kind}: {what}; {_outcome(record)}{rank}"


def _outcome(record: Mapping[str, Any]) -> str:
    if record["event"] == "shift":
        return "this is the new baseline"
    if record["event"] == "hard data":
        return f"hard data, the weights are sound: {sentence_of(record['evidence'])}"
    if record["event"] != "restore":
        return str(record.get("reason", "nothing is done about it"))
    steps = ", ".join(str(s["step"]) for s in record["snapshots"])
    tried = f"{sentence_of(record['evidence'])}; " if record.get("evidence") else ""
    factor = "" if record["lr_factor"] == 1 else f" to {record['lr_factor']:g} of the schedule"
    return (
        f"{tried}restored the {record['method']} of the snapshots of steps {steps} in "
        f"{record['seconds']:.2f} s (number {record['in_a_row']} in a row); optimizer: "
        f"{record['optimizer']}, the learning rate warms up again over {record['rewarm_steps']} steps{factor}"
    )


def sentence_of(evidence: Mapping[str, Any]) -> str:
    """Describes the record of an ``Evidence`` in one sentence."""
    live, candidate = evidence["live"], evidence["candidate"]
    if evidence["source"] == "weights":
        return "weights or optimizer state are not finite"
    if math.isnan(candidate) and math.isfinite(live):
        return f"on the same {evidence['source']} they score {number(live)} now"
    heard = evidence.get("validation")
    validation = f"; on the validation {number(heard[0])} and {number(heard[1])}" if heard else ""
    return (
        f"on the same {evidence['source']} the live weights score {number(live)}, those before the spike "
        f"{number(candidate)}{validation}"
    )


def number(value: float) -> str:
    """A readable number: 1.234, NaN, infinity.

    >>> number(1.23456), number(float("nan")), number(float("-inf"))
    ('1.235', 'NaN', '-infinity')
    """
    if math.isfinite(value):
        return f"{value:.4g}"
    return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}infinity"
