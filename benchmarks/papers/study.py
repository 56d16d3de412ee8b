"""What a claim is given: sizes, seeds, the runs, and the scores of weights on held-out texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.papers.runs import Run, State, built, load, loaded
from benchmarks.papers.spec import Merge, Snapshot, Spec, Weights, digest
from benchmarks.papers.text import Part, held_out
from merge_callback.demo.gpt import GPT

Model = Literal["dense", "moe"]
T = TypeVar("T", Snapshot, Merge, Weights)

MODELS: tuple[Model, ...] = ("dense", "moe")

LENGTHS, DECAY = (800, 1600, 2400), 0.25
"""Lengths of training, in steps at full size, that decays begin after; a decay takes this share more."""


@dataclass(frozen=True)
class Size:
    """How large everything is. Claims count in steps of the full size; ``Study.steps`` scales them.

    Args:
        scale: of all numbers of steps.
        width: of the dense model; the experts' is half of it.
        context: tokens per sequence.
        crops: held-out sequences of a score.
    """

    scale: float = 1.0
    width: int = 64
    context: int = 64
    crops: int = 256


SIZES = {"full": Size(), "quick": Size(0.1, 16, 32, 32), "large": Size(2.0, 128, 128, 256)}


class Score(NamedTuple):
    """How well weights predict the next byte of a held-out text."""

    loss: float
    """nats per byte"""
    accuracy: float
    """percent"""


class Study:
    """The runs of some seeds at one size, and the scores of what is made from them.

    Args:
        cache: folder of all runs; a size has its own.
        seeds: how many, or which.
        size: a key of ``SIZES``.
    """

    def __init__(self, cache: Path, seeds: int | Iterable[int] = 5, size: str = "full") -> None:
        self.cache, self.size, self.name = cache / size, SIZES[size], size
        self.seeds = list(range(seeds) if isinstance(seeds, int) else seeds)

    def steps(self, full: float) -> int:
        """A number of steps at this size, at least 1."""
        return max(1, round(full * self.size.scale))

    def trunk(self, model: Model, seed: int, **changes: Any) -> Spec:
        """A run at a constant learning rate: 2,400 steps at full size; ``changes`` are fields of ``Spec``."""
        shape: dict[str, Any] = {"width": self.size.width, "context": self.size.context}
        if model == "moe":
            shape = {**shape, "width": self.size.width // 2, "experts": 4}
        lengths = {name: self.steps(full) for name, full in _LENGTHS.items()}
        return Spec(**{"seed": seed, **shape, **lengths, **changes})

    def decay(self, model: Model, seed: int, length: int, **changes: Any) -> Spec:
        """The fork that leaves the trunk after one of ``LENGTHS`` and decays by 1-sqrt."""
        changes = {"schedule": "1-sqrt", **changes}
        return self.trunk(model, seed).fork(self.steps(length), self.steps(length * DECAY), **changes)

    def standard(self, seed: int) -> list[Spec]:
        """The trunks of both models and their decays, which most claims are about."""
        return [
            spec
            for model in MODELS
            for spec in (self.trunk(model, seed), *(self.decay(model, seed, length) for length in LENGTHS))
        ]

    def run(self, spec: Spec) -> Run:
        """A run of the cache, trained if it is not there."""
        return Run(spec, self.cache).train()

    def train(self, specs: Iterable[Spec]) -> None:
        """Trains what is missing, in this order, and shows the time left."""
        missing = [spec for spec in _with_parents(specs) if not Run(spec, self.cache).is_done]
        with tqdm(total=sum(spec.steps for spec in missing), unit="step", smoothing=0.02) as bar:
            for spec in missing:
                bar.set_description(spec.key)
                Run(spec, self.cache).train(bar.update)

    def is_ready(self, specs: Iterable[Spec]) -> bool:
        """Whether all of these runs are there."""
        return all(Run(spec, self.cache).is_done for spec in specs)

    def weights(self, target: Weights) -> State:
        """The state dict of a snapshot or a merge."""
        return loaded(target, self.cache)

    def score(self, target: Weights, part: Part = "score", mix: str | None = None) -> Score:
        """The score of a snapshot or a merge on a held-out text; kept in the cache.

        Args:
            target: what is scored.
            part: ``"choose"`` for whatever is chosen, ``"score"`` for the figures that are told.
            mix: another one than the run's.
        """
        spec = _spec(target)
        mix = mix or spec.mix
        kept = self._kept(spec)
        key = digest([digest(target), part, mix, self._crops(part)])
        if key not in kept:
            kept[key] = self.evaluate(spec, self.weights(target), part, mix)
            with self._scores(spec).open("a") as file:
                file.write(json.dumps([key, *kept[key]]) + "\n")
        return kept[key]

    @torch.inference_mode()
    def evaluate(self, spec: Spec, weights: State, part: Part = "score", mix: str | None = None) -> Score:
        """The score of any weights for a run's model; nothing is kept."""
        model = _model(spec)
        load(model, weights)
        losses, right, count = 0.0, 0, 0
        for batch in held_out(mix or spec.mix, part, spec.context, self._crops(part)):
            logits, labels = model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
            losses += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        return Score(losses / count, 100 * right / count)

    def gain(self, target: Merge, part: Part = "score", mix: str | None = None) -> Score:
        """By how much a merge is better than its newest snapshot: less loss, more accuracy."""
        live, merged = self.score(target.parts[-1], part, mix), self.score(target, part, mix)
        return Score(live.loss - merged.loss, merged.accuracy - live.accuracy)

    def gains(self, make: Callable[[int], Merge]) -> dict[str, list[float]]:
        """The gains of a merge on the text for figures, one of each seed; ``make`` names it for a seed."""
        found = [self.gain(make(seed)) for seed in self.seeds]
        return {"loss": [gain.loss for gain in found], "accuracy": [gain.accuracy for gain in found]}

    def best(self, targets: Iterable[T]) -> T:
        """The one with the least loss on the text for choices."""
        return min(targets, key=lambda target: self.score(target, "choose").loss)

    def _crops(self, part: Part) -> int:
        """Choices are made on half as much text, as they would be while a run trains."""
        return self.size.crops // (2 if part == "choose" else 1)

    @cached_property
    def _memory(self) -> dict[Path, dict[str, Score]]:
        return {}

    def _kept(self, spec: Spec) -> dict[str, Score]:
        path = self._scores(spec)
        if path not in self._memory:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines() if path.exists() else []
            self._memory[path] = {key: Score(*found) for key, *found in map(json.loads, lines)}
        return self._memory[path]

    def _scores(self, spec: Spec) -> Path:
        return self.cache / "scores" / f"{spec.key}.jsonl"


_LENGTHS = {"steps": 2400, "warmup": 100, "every": 10, "stored": 200}
"""Of a trunk, in steps."""


def _spec(target: Weights) -> Spec:
    return target.spec if isinstance(target, Snapshot) else target.parts[-1].spec


def _with_parents(specs: Iterable[Spec]) -> list[Spec]:
    """Each run once, after those it needs."""
    found: dict[Spec, None] = {}
    for spec in specs:
        if spec.parent is not None:
            found.update(dict.fromkeys(_with_parents([spec.parent.spec])))
        if spec.weights is not None:
            found.update(dict.fromkeys(_with_parents(part.spec for part in spec.weights.parts)))
        found[spec] = None
    return list(found)


@cache
def _model(spec: Spec) -> GPT:
    return built(spec).eval()
