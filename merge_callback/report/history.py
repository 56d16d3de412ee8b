"""Reads the event file of a run: what happened in the run as it is now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_callback.events import EVENTS, FORMAT
from merge_callback.snapshots.files import open_regular

Event = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """What happened in a run.

    Args:
        folder: the run's folder.
        run: the newest event of the kind ``run``, which describes it.
        events: all other events, in the order in which they were written.
        begun: when it began, in seconds since 1970.
        ended: when the last event was written.
        seconds: that its processes ran, without the breaks between them.
    """

    folder: Path
    run: Event
    events: tuple[Event, ...]
    begun: float
    ended: float
    seconds: float

    def of(self, kind: str) -> list[Event]:
        """The events of a kind, in the order of their steps; of several at a step, that is the written one.

        Snapshots and emissions are unique by step: the last one written counts.
        """
        found = sorted((e for e in self.events if e["event"] == kind), key=lambda event: event["step"])
        if kind in ("snapshot", "emission"):
            return list({event["step"]: event for event in found}.values())
        return found


def read_history(folder: Path | str) -> History:
    """What happened in a run, without what an abandoned branch of it did after the step it was resumed from.

    Args:
        folder: the run's folder; or one that has it, such as a logger's.

    Raises:
        ValueError: if there is no event file, or it is of a later format.
    """
    folder = find_run(Path(folder))
    with open_regular(folder / EVENTS) as file:
        return history_of(folder, file)


def find_run(folder: Path) -> Path:
    """The run's folder: this one, or the one in it.

    Raises:
        ValueError: if there is no event file, or several.
    """
    if (folder / EVENTS).exists():
        return folder
    found = sorted(path.parent for path in folder.glob(f"*merges*/{EVENTS}"))
    if len(found) > 1:
        raise ValueError(f"{folder}: several runs are there; name one of {', '.join(p.name for p in found)}")
    if not found:
        raise ValueError(f"{folder}: no {EVENTS} is there; name the folder that a run's merges go to")
    return found[0]


def history_of(folder: Path, lines: Iterable[bytes]) -> History:
    """The history that the lines of an event file tell.

    Raises:
        ValueError: if they are of a later format, or tell of no run.
    """
    run: Event | None = None
    events: list[Event] = []
    begun = ended = seconds = 0.0
    for event in filter(None, map(_event, lines)):
        if event["event"] == "run":
            written = event.get("format", FORMAT)
            if not isinstance(written, int) or written > FORMAT:
                raise ValueError(
                    f"{folder / EVENTS}: format {written}, and this version of merge-callback reads "
                    f"up to {FORMAT}; install a newer one"
                )
            if run is not None and run.get("run_id") != event.get("run_id"):
                events, run, seconds = [], None, 0.0
            begun, ended = begun if run else event["time"], event["time"]
            run, events = event, [past for past in events if past["event"] != "end"]  # it goes on
            continue
        seconds, ended = seconds + max(0.0, event["time"] - ended), event["time"]
        if event["event"] == "resumed":
            events = [past for past in events if past["step"] <= event["step"]]
        events.append(event)
    if run is None:
        raise ValueError(f"{folder / EVENTS}: tells of no run")
    return History(folder, run, tuple(events), begun, ended, seconds)


def _event(line: bytes) -> Event | None:
    """The event on a line; ``None`` if it is none: the line was cut off, or lacks what every event has."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    if not _is_count(event.get("step")) or not _is_number(event.get("time"), 1e11):
        return None
    sound = {name: value for name, value in event.items() if _EXPECTED.get(name, _any)(value)}
    return sound if _NEEDED.get(event["event"], set()) <= sound.keys() else None


def _any(value: object) -> bool:
    return True


def _is_number(value: object, most: float = 1e300) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < most


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_number(value, 1e15)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_spike(value: object) -> bool:
    counts = ("onset", "rewarm_steps", "seconds")
    return isinstance(value, dict) and all(_is_number(value[name]) for name in counts if name in value)


def _is_window(value: object) -> bool:
    return _is_count(value) or _is_list(_is_count)(value)


def _is_list(is_sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_sound, value))


def _is_mapping(is_sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_sound, value.values()))


def _is_comparison(value: object) -> bool:
    texts, scores = ("name", "method", "order"), _is_mapping(_any)

    def is_entry(one: object) -> bool:
        return (
            isinstance(one, dict)
            and all(_is_text(one.get(name)) for name in texts)
            and _is_count(one.get("snapshots"))
            and all(scores(one.get(kind)) for kind in ("metrics", "gains", "options"))
        )

    return isinstance(value, dict) and _is_list(is_entry)(value.get("scores"))


_EXPECTED: Mapping[str, Callable[[object], bool]] = {
    "window": _is_window,
    "snapshots": _is_list(_is_count),
    "weights": _is_list(_is_number),
    "phase": _is_text,
    "path": _is_text,
    "since": _is_count,
    "total_steps": _is_count,
    "record": _is_spike,
    "scores": _is_mapping(_is_mapping(_any)),
    "candidates": _is_comparison,
    **dict.fromkeys(("gains", "layers", "values", "methods", "versions"), _is_mapping(_any)),
}
"""What an entry has to be. One that is anything else counts as missing: the file may be anybody's."""

_NEEDED: Mapping[str, set[str]] = {
    "validation": {"scores"},
    "phase": {"phase", "since"},
    "spike": {"record"},
}
"""What an event has no meaning without."""
