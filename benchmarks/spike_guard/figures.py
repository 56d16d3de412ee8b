"""The figures of each way, computed from its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.spike_guard.cache import Cache
from benchmarks.spike_guard.plan import PLAN, Record
from benchmarks.spike_guard.runs import Run, brief

WITHIN = 1.02
"""A loss this close to the unbroken run's counts as recovered."""
SMOOTH = 10
"""Steps over whose mean training losses are compared; few, as the batches are the same."""
REAL = 1.03
"""A cause that leaves the run less than this far above the unbroken one has not really broken it."""


def since_restore(run: Run, unbroken: Run) -> list[float]:
    """The losses from the first restore on as multiples of the unbroken run's, on the same batches."""
    if not run.restores:
        return []
    after = run.restores[0]["restored_at"] - PLAN.trunk  # losses begin at the checkpoint
    pairs = zip(run.losses[after:], unbroken.losses[after:], strict=not run.stopped)
    return [loss / trend for loss, trend in pairs]


def back_on_trend(ratios: Sequence[float]) -> int | None:
    """Steps until ten losses in a row are near the unbroken run's, in the mean; the ten count as well."""
    ends = range(SMOOTH, len(ratios) + 1)
    return next((end for end in ends if statistics.fmean(ratios[end - SMOOTH : end]) <= WITHIN), None)


def judge(runs: Sequence[tuple[Run, Run]]) -> Record:
    """The figures of one way, a list entry per seed; each comes with the unbroken run."""
    ratios = [run.final / unbroken.final for run, unbroken in runs]
    restores = [run.restores for run, _ in runs]
    since = [since_restore(run, unbroken) for run, unbroken in runs]
    excess = [statistics.fmean(s) - 1 if s else None for s in since]
    return {
        "final_to_unbroken": [round(r, 4) if math.isfinite(r) else None for r in ratios],
        "recovered": [r <= WITHIN for r in ratios],
        "restores": [len(found) for found in restores],
        "delay": [found[0]["restored_at"] - PLAN.onset if found else None for found in restores],
        "first_outlier": [run.events[0]["onset"] - PLAN.onset if run.events else None for run, _ in runs],
        "steps_back_on_trend": [back_on_trend(s) for s in since],
        "excess_since_restore": [round(e, 4) if e is not None and math.isfinite(e) else None for e in excess],
        "restored_snapshots": [[s["step"] for s in f[-1]["snapshots"]] if f else [] for f in restores],
        "stopped": [run.stopped for run, _ in runs],
        "events": [brief(run) for run, _ in runs],
    }


def collect(
    cache: Cache, models: Iterable[str], kinds: Sequence[str], arms: Sequence[str], seeds: int
) -> Record:
    """The figures of all runs: by model, kind and arm."""
    figures: Record = {}
    for model in models:
        unbroken = [cache.load(model, seed, "", "unbroken") for seed in range(seeds)]
        figures[model] = {
            "unbroken": {
                "final": [round(run.final, 4) for run in unbroken],
                "events": [brief(run) for run in unbroken],
            },
            "kinds": {},
        }
        for kind in kinds:
            runs = {arm: [cache.load(model, seed, kind, arm) for seed in range(seeds)] for arm in arms}
            found = {arm: judge(list(zip(r, unbroken, strict=True))) for arm, r in runs.items()}
            ratios = found["no action"]["final_to_unbroken"] if "no action" in found else []
            mild = [seed for seed, r in enumerate(ratios) if r is not None and r <= REAL]
            figures[model]["kinds"][kind] = {"seeds_not_broken": mild, "arms": found}
    return figures
