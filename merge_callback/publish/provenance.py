"""What a published merge says about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from merge_callback.checkpoints.merge_record import versions
from merge_callback.merging import MergeMethod
from merge_callback.merging.running import RunningAverage
from merge_callback.snapshots.snapshot import Snapshot


def provenance(
    method: MergeMethod | RunningAverage,
    snapshots: Sequence[Snapshot],
    weights: Sequence[float] | None,
    diversity: Mapping[str, Any] | None,
    **more: Any,
) -> dict[str, Any]:
    """The content of ``merge.json``, all of it primitives.

    Args:
        method: how the snapshots were merged.
        snapshots: oldest first.
        weights: the normalised weight of each; ``None`` if the method is not linear.
        diversity: the record of the RMS diversity at the newest snapshot, if one was measured.
        **more: further entries (names copied, layout hash, run id, …).
    """
    newest, shares = snapshots[-1], repeat(None, len(snapshots)) if weights is None else weights
    return {
        "format": 1,
        "method": {"name": method.name, "options": method.options(), "reference": method.reference},
        "step": newest.step,
        "tokens": newest.tokens,
        "phase": newest.phase,
        "snapshots": [_weighted(s, w) for s, w in zip(snapshots, shares, strict=True)],
        "diversity": diversity,
        **more,
        "versions": versions(),
    }


def emission_name(method: str, step: int, tokens: int | None) -> str:
    """``step=…-tokens=…-<method>`` (no tokens if they are not counted): sorts by step, says what it is."""
    counted = "" if tokens is None else f"-tokens={tokens}"
    return f"step={step:08d}{counted}-{re.sub(r'[^A-Za-z0-9_.]', '_', method)}"


def _weighted(snapshot: Snapshot, weight: float | None) -> dict[str, Any]:
    # Only clean snapshots are merged; what turns out later may or may not be known when this is written.
    left_out = {"file", "frozen", "frozen_checksum", "in_spike"}
    record = {key: value for key, value in snapshot.record().items() if key not in left_out}
    return {**record, "weight": weight}
