"""What a run's event file holds: one table, for the code that writes it and for the page that explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EVENTS = "events.jsonl"
"""The file's name in the run's folder."""

PROVENANCE = "merge.json"
"""The record of a merge; a folder that has it is an emission, or what the command has merged."""

FORMAT = 1
"""The version of the format; it rises when an old reader would misread a new file."""


@dataclass(frozen=True)
class Kind:
    """A kind of event.

    Args:
        name: as ``"event"`` has it.
        written: when.
        entries: what the line holds besides ``event``, ``time`` and ``step``, and what each entry means.
    """

    name: str
    written: str
    entries: Mapping[str, str]


KINDS: tuple[Kind, ...] = (
    Kind(
        "run",
        "first, and whenever a process takes the run up",
        {
            "format": f"the version of this format: {FORMAT}",
            "run_id": "of the run; `merge.json` of its emissions has it, too",
            "window": "snapshots kept",
            "every": "the interval between snapshots",
            "unit": "of the interval: `steps` or `tokens`",
            "methods": "the merging method of each phase",
            "total_steps": "of the whole run; null if not known",
            "storage": "where the window lies",
            "url": "of a remote folder that merges go to; null without one",
            "ranks": "processes of the run",
            "snapshot_bytes": "of one snapshot, on all ranks together",
            "window_bytes": "of a full window",
            "versions": "of the libraries",
        },
    ),
    Kind(
        "resumed",
        "after `run`, if the run goes on from a checkpoint: what the file says of later steps did not happen",
        {
            "tokens": "seen by then; null if they are not counted",
            "snapshots": "steps of the snapshots that are back in the window",
        },
    ),
    Kind(
        "phase",
        "when the phase of the learning rate is recognised",
        {"phase": "`warmup`, `stable` or `decay`", "since": "the step at which it began"},
    ),
    Kind(
        "snapshot",
        "when a snapshot is in the window and measured; `step` is the snapshot's",
        {
            "tokens": "seen by then; null if they are not counted",
            "lr": "the highest learning rate that was applied",
            "phase": "of the learning rate",
            "bytes": "of the snapshot, as it is stored, on all ranks together",
            "stall": "seconds that training waited for it",
            "background": "seconds that storing, measuring and merging took in the background",
            "window": "steps of the snapshots in the window",
            "diversity": "RMS distance to the snapshot `diversity_lag` before; null if there is none",
            "layers": "the same of each layer, by its name",
        },
    ),
    Kind(
        "emission",
        "when a merge is published; `step` is that of its newest snapshot",
        {
            "path": "of its folder: a name in the run's folder, or in `url`",
            "method": "that made it",
            "phase": "of the learning rate",
            "tokens": "seen by then; null if they are not counted",
            "snapshots": "steps of the merged snapshots",
            "weights": "of these; null if the method is not linear",
            "bytes": "of its files; null if they are gone already",
            "seconds": "that publishing took in the background",
        },
    ),
    Kind(
        "validation",
        "after a validation",
        {
            "scores": "by whose they are (`live`, `merged`, a candidate's name): every metric, by its name",
            "gains": "of the merge, by metric; positive is better",
            "merge": "step of the merge that was validated; null if there is no new one",
            "seconds": "that the merged validation took; null if there was none",
            "candidates": "what `merge.json` says of them; null without",
        },
    ),
    Kind(
        "metrics",
        "whenever the callback logs numbers",
        {"values": "the numbers, by the names of `METRICS`", "log_step": "the step of the loggers' axis"},
    ),
    Kind(
        "spike",
        "at each loss spike, drift or shift",
        {"record": "the line of `spikes.jsonl`", "text": "the same in a sentence"},
    ),
    Kind("advice", "when the callback gives advice", {"text": "the advice"}),
    Kind(
        "end",
        "when the fit is over; missing if the process was killed",
        {"finished": "whether the fit came to its end, and was not ended by an exception"},
    ),
)
"""All of them, in the order of the page."""
