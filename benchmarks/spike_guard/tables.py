"""The decision tables in Markdown, made of the figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.spike_guard.plan import ARMS, DEFAULT, GUARDS, MODELS, POLICIES, WINDOWS, Record, arm_name


def tables(record: Record) -> str:
    """The decision tables in Markdown: per kind and model, and over all of them."""
    parts = []
    pooled: dict[str, list[Record]] = {}
    for model, kind, found in _each(record):
        parts.append(f"### {kind}, {model}\n\n{_origin(record, model, kind)}\n\n{_table(found)}")
        for arm, figures in found.items():
            pooled.setdefault(arm, []).append(figures)
    overall = {arm: _pool(figures) for arm, figures in pooled.items()}
    return "\n\n".join(
        [f"## Over all kinds and models\n\n{_table(overall)}\n\n{_marginals(overall)}", *parts]
    )


def _each(record: Record) -> Iterator[tuple[str, str, dict[str, Record]]]:
    for model in MODELS:
        for kind, found in record.get(model, {}).get("kinds", {}).items():
            yield model, kind, found["arms"]


def _origin(record: Record, model: str, kind: str) -> str:
    """What the cause does by itself."""
    found = record[model]["kinds"][kind]
    figures = found["arms"].get("no action")
    if figures is None:
        return ""
    text = ", ".join("not finite" if r is None else f"{r:.3f}" for r in figures["final_to_unbroken"])
    mild = found["seeds_not_broken"]
    return f"Without action final / unbroken is {text}." + (f" Not broken: seeds {mild}." if mild else "")


def _pool(figures: Sequence[Record]) -> Record:
    return {key: [value for found in figures for value in found[key]] for key in figures[0]}


def _table(found: dict[str, Record]) -> str:
    lines = [
        "| guard | pma_window | optimizer | recovered | final / unbroken: median, mean, worst "
        "| restored runs, restores | first restore after | steps back on trend | excess |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, figures in found.items():
        options = ARMS[arm]
        names = (
            ["-", "-", "no action"]
            if options.action == "warn"
            else [str(options.guard), str(options.pma_window), str(options.optimizer)]
        )
        if arm == arm_name(*DEFAULT):
            names = [f"**{name}**" for name in names]
        lines.append(f"| {' | '.join([*names, *_cells(figures)])} |")
    return "\n".join(lines)


def _cells(figures: Record) -> list[str]:
    ratios = [math.inf if r is None else r for r in figures["final_to_unbroken"]]
    share = statistics.fmean(figures["recovered"])
    count = sum(n > 0 for n in figures["restores"])
    return [
        f"{100 * share:.0f} %",
        f"{_number(statistics.median(ratios))}, {_number(statistics.fmean(ratios))}, {_number(max(ratios))}",
        f"{count} of {len(ratios)}, {sum(figures['restores'])}",
        _median(figures["delay"]),
        _median(figures["steps_back_on_trend"], count),
        _mean_percent(figures["excess_since_restore"]),
    ]


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if math.isfinite(ratio) else "∞"


def _median(steps: Sequence[int | None], out_of: int | None = None) -> str:
    """The median, and of how many if not of all; those that never come back count as the longest."""
    known = sorted(s for s in steps if s is not None)
    total = len(known) if out_of is None else out_of
    if not known:
        return "never" if total else "-"
    padded = [*map(float, known), *[math.inf] * (total - len(known))]
    middle = statistics.median_low(padded)
    text = f"{middle:.0f}" if math.isfinite(middle) else "never"
    return text if total == len(known) else f"{text} ({len(known)} of {total})"


def _mean_percent(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{100 * statistics.fmean(known):.2f} %" if known else "-"


def _marginals(found: dict[str, Record]) -> str:
    """Each option's values alone, averaged over the others."""
    lines = [
        "| option | value | recovered | mean final / unbroken of the finite | steps back on trend | excess |",
        "|---|---|---|---|---|---|",
    ]
    for option, values in (("guard", GUARDS), ("pma_window", WINDOWS), ("optimizer", POLICIES)):
        for value in values:
            arms = [a for a, o in ARMS.items() if o.action == "restore" and getattr(o, option) == value]
            if not (known := [found[arm] for arm in arms if arm in found]):
                continue
            pooled = _pool(known)
            ratios = [r for r in pooled["final_to_unbroken"] if r is not None]
            restored = sum(n > 0 for n in pooled["restores"])
            lines.append(
                f"| {option} | {value} | {100 * statistics.fmean(pooled['recovered']):.0f} % "
                f"| {statistics.fmean(ratios):.4f} | {_median(pooled['steps_back_on_trend'], restored)} "
                f"| {_mean_percent(pooled['excess_since_restore'])} |"
            )
    return "\n".join(lines)
