"""Trains the experts, each once and to the end, with copies on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.upcycling.model import (
    Task,
    Weights,
    accuracy,
    dense,
    logits,
    new_expert,
    steps,
    trained_state,
)
from benchmarks.upcycling.setup import Study
from benchmarks.upcycling.tasks import Examples


@dataclass
class Trajectory:
    """One expert over its training.

    Args:
        kind: `full`, `lora16` and so on.
        states: what it had learnt, by step.
        validation: accuracy in percent, by step.
        test: accuracy in percent, at powers of two.
        train_logits: of all its training examples at powers of two, under full fine-tuning.
    """

    kind: str
    states: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    test: dict[int, float] = field(default_factory=dict)
    train_logits: dict[int, Tensor] = field(default_factory=dict)

    def weights(self, step: int, base: Weights) -> dict[str, Tensor]:
        """Of the whole model at a step."""
        return dense(self.kind, self.states[step], base)


def train_expert(
    study: Study,
    kind: str,
    base: Weights,
    task: Task,
    seed: int,
    at: Sequence[int],
    examples: Examples | None = None,
) -> Trajectory:
    """Trains to the last of the steps `at`, and keeps what the expert is at each of them.

    Args:
        study: gives rate and batch.
        kind: of fine-tuning.
        base: where it begins.
        task: what it learns.
        seed: of adapters and of the order of examples.
        at: steps.
        examples: other than all of the task's.
    """
    torch.manual_seed(seed)
    model, found = new_expert(kind, base), Trajectory(kind)
    rate, examples = study.rates[kind != "full"], examples or task.parts["train"]
    for step in steps(model, task, examples, max(at), study.batch, rate, seed):
        if step in at:
            found.states[step] = trained_state(kind, model)
            found.validation[step] = accuracy(model, task, "validation")
            if step in study.powers:
                found.test[step] = accuracy(model, task, "test")
                if kind == "full":
                    found.train_logits[step] = logits(model, task, "train")
    return found
