"""Advice for the user: how much a merge gains, and when merging stops paying."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsFloat

from merge_callback.metrics import GAIN
from merge_callback.signals.host import Host, report
from merge_callback.signals.lr_phase import Phase


def gains(
    live: Mapping[str, SupportsFloat], merged: Mapping[str, SupportsFloat], lower: Mapping[str, bool | None]
) -> dict[str, float]:
    """How much better the merged weights score, by metric: positive is better whichever way it improves.

    Args:
        live: what the live weights score.
        merged: what the merged weights score.
        lower: whether lower is better, by metric; a metric with ``None`` has no gain.
    """
    return {
        name: (float(live[name]) - float(merged[name])) * (1 if lower[name] else -1)
        for name in merged
        if name in live and lower.get(name) is not None
    }


def report_scores(host: Host, metrics: Mapping[str, float], gained: Mapping[str, float]) -> None:
    """Logs what a merge scores, by the names in the loggers, and its gains, by metric."""
    report(host, {**metrics, **{f"{GAIN}{name}": gain for name, gain in gained.items()}})


def advice(phase: Phase, since: int, change_percent: float | None, given: list[str]) -> str | None:
    """One line for the user when merging stops paying; each is given once per segment (``given`` is updated).

    Source: the gain of a merge follows its diversity, and both die with the learning rate ("Practical
    Guidelines for Model Merging in LLMs Pre-Training", Tab. 2 and Fig. 3).
    """
    if phase is Phase.DECAY and f"decay {since}" not in given:
        given.append(f"decay {since}")
        return (
            f"merge: the learning rate decays since step {since}: the gain of merging will fade with it. "
            "Merges of the stable phase preview what this decay will reach; they are never mixed with it."
        )
    if change_percent is not None and change_percent <= -90 and "spent" not in given:
        given.append("spent")
        return (
            f"merge: the snapshots lie {-change_percent:.0f} % closer together than at first: merging has "
            "little left to gain, the live weights score about the same."
        )
    return None
