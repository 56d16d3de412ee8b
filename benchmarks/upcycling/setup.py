"""How large the study is, and where its finished parts are kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.upcycling.tasks import TASKS


@dataclass(frozen=True)
class Study:
    """The size of everything.

    Args:
        tasks: the experts' tasks.
        last: steps of the longest training, a power of two.
        ranks: of the LoRA experts.
        rank: the one that all of the LoRA part is about.
        pretraining: steps of the base model.
        train: examples per task; the first `probe` of them fit the head.
        probe: few, as a zero-shot head is no perfect one.
        validation: examples per task, which λ, density and the end of training are chosen on.
        test: examples per task.
        batch: examples per step.
        rates: learning rates of AdamW, constant, for full fine-tuning, LoRA and MoErged models.
        el2n_seeds: that the difficulty of an example is the mean over.
        moerge_steps: on the mixture of all tasks.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    last: int = 2048
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    rank: int = 16
    pretraining: int = 4000
    train: int = 2000
    probe: int = 500
    validation: int = 200
    test: int = 500
    batch: int = 16
    rates: tuple[float, float, float] = (2e-4, 1e-3, 1e-4)
    el2n_seeds: int = 10
    moerge_steps: int = 300

    @property
    def powers(self) -> list[int]:
        """The steps s that experts are merged at."""
        return [2**i for i in range(1, self.last.bit_length())]

    @property
    def looks(self) -> list[int]:
        """The steps that stopping early may stop at."""
        return list(range(50, self.last + 1, 50))

    @property
    def kinds(self) -> list[str]:
        """Ways to fine-tune, the two main ones first."""
        return ["full", f"lora{self.rank}", *(f"lora{r}" for r in self.ranks if r != self.rank)]


QUICK = replace(
    Study(),
    tasks=tuple(TASKS)[:3],
    last=128,
    ranks=(4, 16),
    pretraining=400,
    train=500,
    probe=200,
    validation=100,
    test=200,
    el2n_seeds=2,
    moerge_steps=20,
)


class Cache:
    """Finished parts, one file each, so that a killed study goes on with the part it was at.

    Args:
        folder: is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def get(self, name: str, make: Callable[[], Any] | None = None) -> Any:
        """A part, made if it is not there yet."""
        path = self._path(name)
        if make is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_suffix(f".{os.getpid()}")
            torch.save(make(), half)
            half.replace(path)
        return torch.load(path, weights_only=False)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


@dataclass(frozen=True)
class Part:
    """One thing to compute.

    Args:
        name: in the cache.
        cost: in any unit, to tell the time left.
        make: computes it; parts that it needs come earlier.
    """

    name: str
    cost: float
    make: Callable[[], Any]


def run(parts: list[Part], cache: Cache) -> None:
    """Makes the parts that are missing, in order, and tells the time left after each."""
    missing = [part for part in parts if part.name not in cache]
    left, done, begun = sum(part.cost for part in missing), 0.0, time.monotonic()
    for number, part in enumerate(missing, 1):
        cache.get(part.name, part.make)
        done, left = done + part.cost, left - part.cost
        minutes = (time.monotonic() - begun) * left / done / 60
        print(f"{number}/{len(missing)} {part.name}: about {minutes:.0f} minutes left", flush=True)
