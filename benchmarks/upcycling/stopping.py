"""Ways to stop an expert early: v0, v1, adaptive decay, and the accuracy of its merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.record import QUIET
from benchmarks.upcycling.experts import Trajectory
from benchmarks.upcycling.merges import GRIDS, merged, search
from benchmarks.upcycling.model import Task, Weights, accuracies, mean, new_expert, trained_state
from benchmarks.upcycling.setup import Study
from merge_callback import WarmupAdaptiveDecay

RULES = {"v0": (100, 5), "v1": (50, 3)}
"""Steps between two looks, and looks without a new best value that end the training."""

BY_MERGE = {"merged": ("v1", False), "merged_own": ("v1", True), "merged_v0": ("v0", False)}
"""Ways to watch the merge: by which rule, and whether only on the expert's own validation examples."""


def best_before_stop(values: Mapping[int, float], every: int, patience: int) -> int:
    """The step of the best value by the time that training stops.

    Args:
        values: by step, in order; those that are no multiple of `every` are passed over.
        every: steps between two looks.
        patience: looks in a row without a new best value.
    """
    looks = [step for step in values if step % every == 0]
    best = looks[0]
    for step in looks:
        if values[step] > values[best]:
            best = step
        elif step - best >= every * patience:
            break
    return best


def merge_look(
    base: Weights, siblings: Sequence[Weights], tasks: Sequence[Task]
) -> Callable[[Weights], float]:
    """What a validation of a live expert's merge with its finished siblings gives: `merged/val_acc`.

    The merge is task arithmetic. λ is searched for on the whole grid at first, then from the last best on, as
    long as a neighbour is better.

    Args:
        base: of all of them.
        siblings: the finished experts of the other tasks.
        tasks: whose validation examples are taken.
    """
    grid, last = GRIDS["task_arithmetic"][0], list[float]()

    def look(live: Weights) -> float:
        @cache
        def score(scale: float) -> float:
            weights = merged(base, [*siblings, live], "task_arithmetic", scale)
            return mean(accuracies(weights, tasks, "validation"))

        best = last.pop() if last else search(grid, score)[1]
        while (near := max(_neighbours(grid, best), key=score)) != best:
            best = near
        last.append(best)
        return score(best)

    return look


def _neighbours(grid: Sequence[float], value: float) -> Sequence[float]:
    """A value of a grid, first, and those next to it."""
    at = grid.index(value)
    return [value, *grid[max(0, at - 1) : at], *grid[at + 1 : at + 2]]


def stop_by_merge(
    trajectory: Trajectory, base: Weights, rule: tuple[int, int], look: Callable[[Weights], float]
) -> tuple[int, dict[int, float]]:
    """Where the merge's accuracy peaks, under a rule, and that accuracy by step."""
    every, patience = rule
    values: dict[int, float] = {}
    for step in range(every, max(trajectory.states) + 1, every):
        values[step] = look(trajectory.weights(step, base))
        best = best_before_stop(values, every, patience)
        if step - best >= every * patience:
            break
    return best, values


@dataclass(frozen=True)
class Adaptive:
    """An expert of `WarmupAdaptiveDecay`.

    Args:
        state: of the best validation.
        step: of the best validation.
        trained: steps until the rate was below its minimum.
    """

    state: Mapping[str, Any]
    step: int
    trained: int


class _Expert(LightningModule):
    def __init__(self, model: Any, task: Task, rate: float) -> None:
        super().__init__()
        self.model, self.head, self.rate = model, task.head, rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        contexts, labels = batch
        return F.cross_entropy(self.head(self.model.last(contexts)), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        contexts, labels = batch
        right = self.head(self.model.last(contexts)).argmax(-1) == labels
        self.log("val_acc", right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, self.rate, weight_decay=0.0)


class _KeepBest(Callback):
    def __init__(self, kind: str) -> None:
        self.kind, self.value, self.step = kind, -1.0, 0
        self.state: Mapping[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = float(trainer.callback_metrics["val_acc"])
        if value > self.value and not trainer.sanity_checking:
            self.value, self.step = value, trainer.global_step
            self.state = trained_state(self.kind, pl_module.model)


def adaptive(study: Study, kind: str, base: Weights, task: Task, seed: int) -> Adaptive:
    """Trains an expert under `WarmupAdaptiveDecay` with the paper's settings."""
    torch.manual_seed(seed)
    module = _Expert(new_expert(kind, base), task, study.rates[kind != "full"])
    best = _KeepBest(kind)
    train, validation = (
        TensorDataset(task.parts[part].contexts, task.parts[part].labels) for part in ("train", "validation")
    )
    trainer = Trainer(
        **QUIET,
        accelerator="cpu",
        max_steps=study.last,
        num_sanity_val_steps=0,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        callbacks=[WarmupAdaptiveDecay(monitor="val_acc"), best],
    )
    trainer.fit(
        module, DataLoader(train, study.batch, shuffle=True, drop_last=True), DataLoader(validation, 200)
    )
    return Adaptive(best.state, best.step, trainer.global_step)
