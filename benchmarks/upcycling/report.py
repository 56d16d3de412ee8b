"""Gathers what is finished of a study into one record of plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.upcycling.model import accuracies, mean
from benchmarks.upcycling.parts import LEFT_OUT, Work
from benchmarks.upcycling.stopping import BY_MERGE, RULES

Numbers = list[float]
"""One for each seed."""

RULE_NAMES = (*RULES, "adaptive", *BY_MERGE)


def gathered(work: Work, seeds: int) -> dict[str, Any]:
    """All figures; each section is of the seeds that have all of it, and is missing if there is none.

    Accuracies are means over the tasks, in percent, of test examples unless it says otherwise.

    Args:
        work: whose cache is read.
        seeds: that were asked for.
    """
    study = work.study
    record: dict[str, Any] = {"study": asdict(study), "seeds": {}}

    def section(name: str, parts: Sequence[str], make: Callable[[int], Any]) -> None:
        finished = [s for s in range(seeds) if all(f"{s}/{part}" in work.cache for part in parts)]
        if finished:
            record["seeds"][name] = finished
            record[name] = _side_by_side([make(seed) for seed in finished])

    names = [f"task/{name}" for name in study.tasks]
    section("base", names, lambda seed: mean(accuracies(work.base, work.tasks(seed), "test")))
    for kind in study.kinds:
        parts = [f"curve/{kind}/{step}" for step in study.powers]
        section(f"merges/{kind}", parts, lambda seed, kind=kind: _curves(work, seed, kind))
    for kind in study.kinds[:2]:
        parts = [f"stopped/{kind}/{rule}" for rule in RULE_NAMES]
        section(f"stopped/{kind}", parts, lambda seed, kind=kind: _stopped(work, seed, kind))
    section("interference", ["interference"], lambda seed: work.load(f"{seed}/interference"))
    section("bins", ["bins"], lambda seed: work.load(f"{seed}/bins"))
    parts = [f"easier/{share}/merges" for share in LEFT_OUT]
    section("left_out", parts, lambda seed: _left_out(work, seed))
    sources = (*study.powers, *RULES, "adaptive", "merged")
    parts = [f"moerged/{source}" for source in sources]
    section("moerged", parts, lambda seed: _moerged(work, seed, sources))
    return record


def _side_by_side(seeds: Sequence[Any]) -> Any:
    """Equal trees of numbers as one tree, with a list of the seeds' numbers at each place."""
    if isinstance(seeds[0], dict):
        return {str(key): _side_by_side([seed[key] for seed in seeds]) for key in seeds[0]}
    if isinstance(seeds[0], list):
        return [_side_by_side(list(each)) for each in zip(*seeds, strict=True)]
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in seeds]


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    merges = found["merges"].values()
    return {
        "experts": mean(found["experts"]),
        **{m.method: mean(m.test) for m in merges},
        "validation": {m.method: m.validation for m in merges},
        "scale": {m.method: m.scale for m in merges},
        "density": {m.method: m.density for m in merges},
    }


def _curves(work: Work, seed: int, kind: str) -> dict[int, Any]:
    return {step: _scores(work.load(f"{seed}/curve/{kind}/{step}")) for step in work.study.powers}


def _stopped(work: Work, seed: int, kind: str) -> dict[str, Any]:
    found = {}
    for rule in RULE_NAMES:
        stopped = work.load(f"{seed}/stopped/{kind}/{rule}")
        found[rule] = {"steps": [float(step) for step in stopped["steps"]], **_scores(stopped)}
    return found


def _left_out(work: Work, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for share in LEFT_OUT:
        merges = work.load(f"{seed}/easier/{share}/merges")
        found[str(share)] = {step: _scores(merges[step]) for step in merges}
    return found


def _moerged(work: Work, seed: int, sources: Sequence[int | str]) -> dict[str, Any]:
    found = {}
    for source in sources:
        scores = work.load(f"{seed}/moerged/{source}")
        found[str(source)] = {state: mean(values) for state, values in scores.items()}
    return found
