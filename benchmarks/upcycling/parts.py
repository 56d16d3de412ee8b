"""Everything that the study computes, part by part, in the order in which it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from benchmarks.upcycling.experts import Trajectory, train_expert
from benchmarks.upcycling.hardness import (
    el2n_scores,
    forgotten_by_bin,
    loss_by_bin,
    memorised_by_bin,
    without_hardest,
)
from benchmarks.upcycling.merges import METHODS, merged, tuned
from benchmarks.upcycling.model import Task, Weights, accuracies, dense, make_task, pretrain
from benchmarks.upcycling.moerging import moerged
from benchmarks.upcycling.setup import Cache, Part, Study
from benchmarks.upcycling.stopping import (
    BY_MERGE,
    RULES,
    adaptive,
    best_before_stop,
    merge_look,
    stop_by_merge,
)
from merge_callback.analysis.interference import (
    interference,
    magnitude_ratio,
    overlap,
    pair_mean,
    sign_conflict,
    variance,
)

LEFT_OUT = (0.1, 0.3, 0.5)
"""Shares of the hardest training examples that experts of Fig. 4 do without."""

STEP = 1.0
"""The cost of one step of an expert, that of all other parts is told in."""


class Work:
    """The parts of one study.

    Args:
        study: its size.
        cache: holds what is finished.
    """

    def __init__(self, study: Study, cache: Cache) -> None:
        self.study, self.cache = study, cache
        self.load = lru_cache(maxsize=40)(cache.get)

    def parts(self, seeds: int) -> list[Part]:
        """All of them, seed after seed."""
        base = Part("base", 4 * self.study.pretraining, partial(pretrain, self.study.pretraining))
        return [base, *(part for seed in range(seeds) for part in self._of_seed(seed))]

    def _of_seed(self, seed: int) -> Iterator[Part]:
        study = self.study
        for name in study.tasks:
            yield Part(f"{seed}/task/{name}", 500, partial(self.task, seed, name))
        for kind in study.kinds[:2]:
            yield from self._merging(seed, kind)
            yield from self._stopping(seed, kind)
        yield from self._moerging(seed, study.kinds[1])
        yield from self._hardness(seed)
        for kind in study.kinds[2:]:
            yield from self._merging(seed, kind)

    def _merging(self, seed: int, kind: str) -> Iterator[Part]:
        study = self.study
        for name in study.tasks:
            make = partial(self.expert, seed, kind, name)
            yield Part(f"{seed}/expert/{kind}/{name}", 1.3 * study.last, make)
        for step in study.powers:
            yield Part(f"{seed}/curve/{kind}/{step}", 1000, partial(self.curve, seed, kind, step))

    def _stopping(self, seed: int, kind: str) -> Iterator[Part]:
        for name in self.study.tasks:
            yield Part(f"{seed}/adaptive/{kind}/{name}", 600, partial(self.adaptive, seed, kind, name))
        for rule in BY_MERGE:
            yield Part(f"{seed}/{rule}/{kind}", 2000, partial(self.merge_stops, seed, kind, rule))
        for rule in (*RULES, "adaptive", *BY_MERGE):
            yield Part(f"{seed}/stopped/{kind}/{rule}", 600, partial(self.stopped, seed, kind, rule))

    def _hardness(self, seed: int) -> Iterator[Part]:
        study, tasks = self.study, self.study.tasks
        yield Part(f"{seed}/interference", 200, partial(self.interference, seed))
        for name in tasks:
            yield Part(f"{seed}/el2n/{name}", 60 * study.el2n_seeds, partial(self.el2n, seed, name))
        yield Part(f"{seed}/bins", 800, partial(self.bins, seed))
        for share in LEFT_OUT:
            for name in tasks:
                make = partial(self.easier_expert, seed, share, name)
                yield Part(f"{seed}/easier/{share}/{name}", 1.2 * self.easy_steps[-1], make)
            yield Part(f"{seed}/easier/{share}/merges", 1200, partial(self.easier_merges, seed, share))

    def _moerging(self, seed: int, kind: str) -> Iterator[Part]:
        for source in (*self.study.powers, *RULES, "adaptive", "merged"):
            make = partial(self.moerged, seed, kind, source)
            yield Part(f"{seed}/moerged/{source}", 5 * self.study.moerge_steps, make)

    @property
    def base(self) -> Weights:
        """θ_0."""
        weights: Weights = self.load("base")
        return weights

    @property
    def easy_steps(self) -> list[int]:
        """The steps that experts without hard examples are looked at."""
        return [s for s in self.study.powers if self.study.last // 32 <= s <= self.study.last // 4]

    def task(self, seed: int, name: str) -> Task:
        """Samples a task's examples and fits its head."""
        return make_task(name, self.study, self.base, seed)

    def tasks(self, seed: int) -> list[Task]:
        """All tasks of a seed."""
        return [self.load(f"{seed}/task/{name}") for name in self.study.tasks]

    def trajectories(self, seed: int, kind: str) -> list[Trajectory]:
        """Of all tasks."""
        return [self.load(f"{seed}/expert/{kind}/{name}") for name in self.study.tasks]

    def expert(self, seed: int, kind: str, name: str) -> Trajectory:
        """Trains one expert to the end."""
        study = self.study
        at = sorted({*study.powers, *(study.looks if kind in study.kinds[:2] else ())})
        return train_expert(study, kind, self.base, self.load(f"{seed}/task/{name}"), seed, at)

    def curve(self, seed: int, kind: str, step: int) -> dict[str, Any]:
        """The experts at one step, and their merges."""
        methods = METHODS if kind in self.study.kinds[:2] else METHODS[:3]
        trajectories = self.trajectories(seed, kind)
        weights = [each.weights(step, self.base) for each in trajectories]
        found = tuned(self.base, weights, self.tasks(seed), methods)
        return {"experts": [each.test[step] for each in trajectories], "merges": found}

    def adaptive(self, seed: int, kind: str, name: str) -> Any:
        """Trains one expert under `WarmupAdaptiveDecay`."""
        return adaptive(self.study, kind, self.base, self.load(f"{seed}/task/{name}"), seed)

    def merge_stops(self, seed: int, kind: str, rule: str) -> list[dict[str, Any]]:
        """Where each expert stops by the accuracy of its merge with the others, which v1 has stopped."""
        of, own = BY_MERGE[rule]
        tasks, trajectories = self.tasks(seed), self.trajectories(seed, kind)
        finished = [dense(kind, state, self.base) for state in self.states(seed, kind, "v1")]
        found = []
        for i, trajectory in enumerate(trajectories):
            siblings = [*finished[:i], *finished[i + 1 :]]
            look = merge_look(self.base, siblings, [tasks[i]] if own else tasks)
            step, values = stop_by_merge(trajectory, self.base, RULES[of], look)
            found.append({"step": step, "values": values})
        return found

    def stop_steps(self, seed: int, kind: str, rule: str | int) -> list[int]:
        """The step of each expert that a rule takes."""
        if isinstance(rule, int):
            return [rule] * len(self.study.tasks)
        if rule == "adaptive":
            return [self.load(f"{seed}/adaptive/{kind}/{name}").step for name in self.study.tasks]
        if rule in RULES:
            values = [each.validation for each in self.trajectories(seed, kind)]
            return [best_before_stop(each, *RULES[rule]) for each in values]
        return [each["step"] for each in self.load(f"{seed}/{rule}/{kind}")]

    def states(self, seed: int, kind: str, rule: str | int) -> list[Mapping[str, Any]]:
        """What each expert that a rule takes has learnt."""
        if rule == "adaptive":
            return [self.load(f"{seed}/adaptive/{kind}/{name}").state for name in self.study.tasks]
        both = zip(self.trajectories(seed, kind), self.stop_steps(seed, kind, rule), strict=True)
        return [trajectory.states[step] for trajectory, step in both]

    def stopped(self, seed: int, kind: str, rule: str) -> dict[str, Any]:
        """The experts that a rule takes, and their merges."""
        tasks = self.tasks(seed)
        weights = [dense(kind, state, self.base) for state in self.states(seed, kind, rule)]
        scores = [accuracies(w, [task], "test")[0] for w, task in zip(weights, tasks, strict=True)]
        return {
            "steps": self.stop_steps(seed, kind, rule),
            "experts": scores,
            "merges": tuned(self.base, weights, tasks, METHODS),
        }

    def interference(self, seed: int) -> dict[int, dict[str, float]]:
        """The four measures of the experts' task vectors, by step."""
        trajectories, found = self.trajectories(seed, "full"), {}
        for step in self.study.powers:
            counts = interference([each.states[step] for each in trajectories], self.base)
            found[step] = {
                "sign_conflict": pair_mean(sign_conflict(counts)),
                "overlap": pair_mean(overlap(counts)),
                "magnitude_ratio": pair_mean(magnitude_ratio(counts)),
                "variance": variance(counts),
            }
        return found

    def el2n(self, seed: int, name: str) -> Any:
        """How hard each training example of a task is."""
        return el2n_scores(self.study, self.base, self.load(f"{seed}/task/{name}"), seed)

    def bins(self, seed: int) -> dict[str, Any]:
        """What is forgotten, what the loss is made of, and what is memorised, by bin of difficulty."""
        study = self.study
        scores = [self.load(f"{seed}/el2n/{name}") for name in study.tasks]
        common = self.trajectories(seed, "full"), self.tasks(seed), scores
        lost: dict[str, dict[int, list[float]]] = {}
        for step in study.powers[-6:]:
            weights = [each.states[step] for each in common[0]]
            for method, found in self.load(f"{seed}/curve/full/{step}")["merges"].items():
                merge = merged(self.base, weights, method, found.scale, found.density)
                lost.setdefault(method, {})[step] = forgotten_by_bin(*common, step, merge)
        return {
            "forgotten": lost,
            "loss": {step: loss_by_bin(*common, step) for step in study.powers},
            "memorised": memorised_by_bin(*common, study.last // 8, study.last),
        }

    def easier_expert(self, seed: int, share: float, name: str) -> Trajectory:
        """Trains one expert without the hardest of its examples."""
        task = self.load(f"{seed}/task/{name}")
        examples = without_hardest(task, self.load(f"{seed}/el2n/{name}"), share)
        return train_expert(self.study, "full", self.base, task, seed, self.easy_steps, examples)

    def easier_merges(self, seed: int, share: float) -> dict[int, dict[str, Any]]:
        """The experts that were trained without hard examples, and their merges, by step."""
        trajectories: Sequence[Trajectory] = [
            self.load(f"{seed}/easier/{share}/{name}") for name in self.study.tasks
        ]
        found: dict[int, dict[str, Any]] = {}
        for step in self.easy_steps:
            weights = [each.weights(step, self.base) for each in trajectories]
            merges = tuned(self.base, weights, self.tasks(seed), METHODS[:2])
            found[step] = {"experts": [each.test[step] for each in trajectories], "merges": merges}
        return found

    def moerged(self, seed: int, kind: str, source: str | int) -> dict[str, list[float]]:
        """A MoErged model of the experts at a step, or of those that a rule takes."""
        return moerged(self.study, self.base, self.states(seed, kind, source), self.tasks(seed), seed)
