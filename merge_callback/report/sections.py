"""The parts of a page that are no charts: what a run is, what happened, its merges, what it cost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from merge_callback.events import PROVENANCE
from merge_callback.report.history import Event
from merge_callback.report.markup import Html, table, tag
from merge_callback.report.numbers import MISSING, compact, in_bytes, in_seconds, number, shown, signed
from merge_callback.report.run_view import RunView

_SHOWN, _MOST = (
    12,
    200,
)  # merges in sight, and those that are a click away; still older ones are in the event file

_OUTCOMES = {
    "restore": "restored",
    "warn": "reported",
    "hard data": "hard data",
    "shift": "new level",
    "drift": "drift",
    "stop": "stopped",
}
"""What was decided about a spike, in a word."""


def facts(run: RunView) -> Html:
    """What the run is, in a list."""
    about = run.run
    total = about.get("total_steps")
    every = f"{about.get('every', 0):,} {about.get('unit', 'steps')}"
    methods = ", ".join(f"{method} ({phase})" for phase, method in (about.get("methods") or {}).items())
    entries = {
        "steps": f"{run.step:,}" + (f" of {total:,}" if total else ""),
        "tokens": compact(run.tokens) if run.tokens else None,
        "window": f"{about.get('window')} snapshots, one every {every}",
        "methods": methods,
        "snapshot": f"{in_bytes(number(about.get('snapshot_bytes')))}, on {about.get('storage')}",
        "processes": about.get("ranks"),
        "began": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.history.begun)),
        "time": in_seconds(run.history.seconds),
    }
    return tag("dl", *(tag("div", tag("dt", n), tag("dd", v)) for n, v in entries.items() if v))


def tiles(run: RunView) -> Html:
    """What matters, in four tiles."""
    return tag(
        "div",
        *(t for t in (_gain_tile(run), _newest_tile(run), _spike_tile(run), _cost_tile(run))),
        class_="tiles",
    )


def _tile(what: str, value: object, more: object) -> Html:
    return tag("div", tag("span", what, class_="what"), tag("b", value), tag("span", more), class_="tile")


def _gain_tile(run: RunView) -> Html:
    metric = next((name for name in run.metrics if run.gains(name)), None)
    best = run.best(metric) if metric else None
    if best is None or metric is None:
        return _tile("best gain", MISSING, "no merge was validated")
    noise = run.noise(metric)
    clear = "" if not noise else f", {abs(best.gain) / noise:,.1f} times the noise"
    return _tile(
        f"best gain, {metric}",
        signed(best.gain),
        f"at step {best.step:,}: from {shown(best.live)} to {shown(best.merged)}{clear}",
    )


def _newest_tile(run: RunView) -> Html:
    if not run.emissions:
        return _tile("newest merge", MISSING, "nothing was published yet")
    newest = run.emissions[-1]
    count = len(newest.get("snapshots") or ())
    more = f"{newest.get('method')} of {count} snapshots ({newest.get('phase')} phase)"
    if validated := run.validated(newest):
        gains = [f"{signed(number(gain))} {name}" for name, gain in list(validated["gains"].items())[:1]]
        more += "".join(f"; gain {gain}" for gain in gains)
    return _tile("newest merge", f"step {newest['step']:,}", more)


def _spike_tile(run: RunView) -> Html:
    spikes, restores = run.history.of("spike"), run.restores
    if not spikes:
        return _tile("loss spikes", "none", "no loss spoke against the weights")
    word = f"{len(restores)} restore{'s' * (len(restores) != 1)}"
    count = f"{len(spikes)} event{'s' * (len(spikes) > 1)}"
    return _tile("loss spikes", word, f"{count}, the last at step {spikes[-1]['step']:,}")


def _cost_tile(run: RunView) -> Html:
    waited = run.stall + run.evaluation + run.restoring
    if not run.history.seconds or not run.snapshots:
        return _tile("cost", MISSING, "no snapshot was taken yet")
    return _tile(
        "cost",
        f"{shown(100 * run.stall / run.history.seconds, 2)} %",
        f"of the time for {len(run.snapshots):,} snapshots; merged validations and restores "
        f"{shown(100 * (waited - run.stall) / run.history.seconds, 2)} %",
    )


def events(run: RunView) -> Html:
    """Spikes, restores, resumes and advice, newest last: what was seen, what was decided, and why."""
    found: list[tuple[int, str, str, str]] = []
    for event in run.history.of("spike"):
        kind = str(event["record"].get("event"))
        found.append((event["step"], kind, _OUTCOMES.get(kind, kind), _sentence(event)))
    for event in run.history.of("resumed"):
        kept = ", ".join(f"{step:,}" for step in event.get("snapshots") or ()) or "none"
        found.append((event["step"], "resumed", "resumed", f"The snapshots of steps {kept} were back."))
    for event in run.history.of("advice"):
        found.append((event["step"], "advice", "advice", _sentence(event)))
    if not found:
        return tag("p", "No spike, no restore, no resume.", class_="note")
    rows = (
        tag(
            "div",
            tag("div", tag("span", word, class_=f"badge {kind.replace(' ', '-')}")),
            tag("p", tag("b", f"Step {step:,}. "), text),
            class_="event",
        )
        for step, kind, word, text in sorted(found, key=lambda row: row[0])
    )
    return tag("div", *rows, class_="card runs")


def _sentence(event: Event) -> str:
    text = str(event.get("text", "")).removeprefix("merge: ")
    return f"{text[:1].upper()}{text[1:]}"


def window(run: RunView) -> Html:
    """The snapshots that are in the window, and their weights in the newest merge."""
    if not run.snapshots:
        return Html()
    known = {event["step"]: event for event in run.snapshots}
    newest = run.emissions[-1] if run.emissions else {}
    shares = dict(zip(newest.get("snapshots") or (), newest.get("weights") or (), strict=False))
    rows = [
        (
            f"{step:,}",
            _count(e.get("tokens")),
            e.get("phase", MISSING),
            shown(number(e.get("lr"))),
            shown(shares.get(step)),
        )
        for step in run.snapshots[-1].get("window") or ()
        if (e := known.get(step, {})) is not None
    ]
    head = ("step", "tokens", "phase", "learning rate", "weight in the newest merge")
    steps = [row[0] for row in rows]
    text = f"The window holds {len(steps)} snapshots: steps {steps[0]} to {steps[-1]}." if steps else ""
    return tag("details", tag("summary", text), table(head, rows, "Snapshots in the window"), class_="runs")


def merges(run: RunView, target: Path) -> Html:
    """Every merge that was published; ``target`` is the folder that the page goes to, for its links."""
    if not run.emissions:
        return tag("p", "Nothing was published yet.", class_="note")
    metric = next((name for name in run.metrics if run.gains(name)), None)
    scores = ("live", "merged", "gain") if metric else ()
    head = ("step", "tokens", "phase", "method", "snapshots and weights", *scores, "size", "record")
    rows = [_merge_row(run, event, metric, target) for event in reversed(run.emissions[-_MOST:])]
    first, older = rows[:_SHOWN], rows[_SHOWN:_MOST]
    told = f"Newest first; scores in {metric}." if metric else "Newest first."
    parts = [table(head, first, told)]
    if older:
        parts.append(tag("details", tag("summary", f"{len(older):,} older ones"), table(head, older, told)))
    return tag("div", *parts, class_="card runs")


def candidates(run: RunView) -> Html:
    """What the candidates scored when they were compared last, and where the gain was largest."""
    compared = [event for event in run.validations if event.get("candidates")]
    if not compared:
        return Html()
    metric = next((name for name in run.metrics if run.gains(name)), None)
    best = run.best(metric) if metric else None
    shown = {event["step"]: event for event in compared if best and event["step"] == best.step}
    shown[compared[-1]["step"]] = compared[-1]
    tables = []
    for step, event in sorted(shown.items()):
        newest = "the newest" if event is compared[-1] else ""
        largest = f"the largest gain in {metric}" if best and step == best.step else ""
        which = " and ".join(filter(None, (newest, largest)))
        tables.append(_comparison(event, f"Step {step:,}: {which}."))
    return tag("div", tag("h3", "Candidates"), *tables, class_="card runs")


def _comparison(event: Event, told: str) -> Html:
    """The candidates of one validation, the best one first."""
    found = event["candidates"]
    metric, scores = str(found.get("select") or ""), found["scores"]
    sign = 1 if found.get("lower_is_better") else -1
    noise = number(found.get("spread"))

    def rank(one: Event) -> float:
        value = number(one["metrics"].get(metric))
        return math.inf if value is None else sign * value

    rows = []
    for one in sorted(scores, key=rank):
        gain = number(one["gains"].get(metric))
        is_chosen = one["name"] == found.get("selected")
        kind = None if gain is None or not noise or abs(gain) < noise else "good" if gain > 0 else "bad"
        is_running = "every_n_steps" in one["options"]
        rows.append(
            (
                tag("b", one["name"]) if is_chosen else one["name"],
                one["method"],
                MISSING if is_running else f"{one['snapshots']:,}",
                MISSING if is_running else one["order"],
                shown(number(one["metrics"].get(metric))),
                tag("span", signed(gain), class_=kind),
                "published" if is_chosen else "",
            )
        )
    if noise:
        told += f" The live {metric} scatters by {shown(noise, 2)} from one validation to the next."
    if batches := number(found.get("batches")):
        told += f" Compared on {batches:,.0f} batches of each data loader."
    head = ("candidate", "method", "snapshots", "order", metric or "score", "gain", "")
    return table(head, rows, told)


def _merge_row(run: RunView, event: Event, metric: str | None, target: Path) -> tuple[object, ...]:
    cells: list[object] = [
        f"{event['step']:,}",
        _count(event.get("tokens")),
        event.get("phase", MISSING),
        event.get("method", MISSING),
        _weights(event),
    ]
    if metric:
        found = run.validated(event) or {"scores": {}, "gains": {}}
        live, merged = (number(found["scores"].get(w, {}).get(metric)) for w in ("live", "merged"))
        gain = number(found["gains"].get(metric))
        is_clear = gain is not None and abs(gain) > 2 * (run.noise(metric) or 0.0)
        kind = None if not is_clear else "good" if gain and gain > 0 else "bad"
        cells += [shown(live), shown(merged), tag("span", signed(gain), class_=kind)]
    return (*cells, in_bytes(number(event.get("bytes"))), _record(run, event, target))


def _weights(event: Event) -> Html:
    steps, weights = event.get("snapshots") or (), event.get("weights")
    told = f"{len(steps)} from {min(steps):,} on" if len(steps) > 1 or weights else MISSING
    if not weights:
        return tag("span", told)
    most = max(map(abs, weights)) or 1.0
    label = "weights " + ", ".join(f"{weight:.3g}" for weight in weights)
    bars = (tag("i", style=f"height:{100 * abs(w) / most:.0f}%") for w in weights)
    return tag(
        "span", tag("span", *bars, class_="bars", role="img", aria_label=label, title=label), f" {told}"
    )


def record_of(run: RunView, event: Event) -> Path | None:
    """The file that tells where an emission is from; ``None`` if it is gone, or elsewhere."""
    name = str(event.get("path", ""))
    path = run.history.folder / name / PROVENANCE
    return path if name and name == Path(name).name and path.is_file() else None


def _record(run: RunView, event: Event, target: Path) -> object:
    if path := record_of(run, event):
        return tag("a", PROVENANCE, href=quote(os.path.relpath(path, target)))
    return "uploaded" if run.run.get("url") else "removed"


def costs(run: RunView) -> Html:
    """What the callback cost, in sum and by snapshot."""
    seconds = run.history.seconds or 1.0
    sums = [
        ("training waited for snapshots", run.stall, len(run.snapshots)),
        ("merged validations", run.evaluation, sum(e.get("seconds") is not None for e in run.validations)),
        ("restores", run.restoring, len(run.restores)),
        ("in the background", run.background, len(run.snapshots) + len(run.emissions)),
    ]
    rows = [
        (
            what,
            f"{count:,}",
            in_seconds(spent),
            in_seconds(spent / count),
            f"{shown(100 * spent / seconds, 2)} %",
        )
        for what, spent, count in sums
        if count
    ]
    total = table(
        ("what", "times", "in sum", "each", "of the run's time"),
        rows,
        f"{in_bytes(run.written)} were written.",
    )
    snapshots = [
        (
            f"{e['step']:,}",
            in_seconds(number(e.get("stall")) or 0),
            in_seconds(number(e.get("background")) or 0),
            in_bytes(number(e.get("bytes"))),
        )
        for e in run.snapshots[-_MOST:]
    ]
    every = table(("step", "training waited", "background", "bytes"), snapshots, "Each snapshot")
    return tag("div", total, tag("details", tag("summary", "Each snapshot"), every), class_="card runs")


def comparison(runs: Sequence[RunView]) -> Html:
    """Several runs in a table."""
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        metric = next((name for name in run.metrics if run.gains(name)), None)
        best = run.best(metric) if metric else None
        word, sentence = run.status
        rows.append(
            (
                run.name,
                tag("span", word, class_=f"badge {word}", title=sentence),
                f"{run.step:,}",
                f"{signed(best.gain)} {metric} at {best.step:,}" if best else MISSING,
                f"{len(run.emissions):,}",
                f"{len(run.restores):,}",
                in_seconds(run.history.seconds),
                f"{shown(100 * run.stall / (run.history.seconds or 1), 2)} %",
            )
        )
    head = ("run", "state", "steps", "best gain", "merges", "restores", "time", "waited")
    return tag("div", table(head, rows, "The runs"), class_="card runs")


def _count(value: object) -> str:
    found = number(value)
    return MISSING if found is None else compact(found)
