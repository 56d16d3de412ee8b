"""MoErged models of LoRA experts, as they begin by Arrow and after training on the mixture of all tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.optim import AdamW

from benchmarks.upcycling.model import Factors, Task, Weights, accuracy, batches, take, with_weights
from benchmarks.upcycling.setup import Study
from merge_callback.moerge import moerge

PER_TASK = 8
"""Examples of each task in a step."""


def moerged(
    study: Study, base: Weights, experts: Sequence[Factors], tasks: Sequence[Task], seed: int
) -> dict[str, list[float]]:
    """The test accuracy of each task, `by_arrow` and `trained`, and the latter's on `validation` examples."""
    model = moerge(with_weights(base), experts, k=2)
    scores = {"by_arrow": [accuracy(model, task, "test") for task in tasks]}
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], study.rates[2], weight_decay=0.0)
    orders = [
        batches(len(task.parts["train"]), study.moerge_steps, PER_TASK, seed + 10 * number)
        for number, task in enumerate(tasks)
    ]
    for chosen in zip(*orders, strict=True):
        parts = [task.parts["train"][which] for task, which in zip(tasks, chosen, strict=True)]
        features = model.last(torch.cat([part.contexts for part in parts])).split(PER_TASK)
        losses = [
            F.cross_entropy(task.head(x), part.labels)
            for task, x, part in zip(tasks, features, parts, strict=True)
        ]
        take(optimizer, torch.stack(losses).mean())
    for name, part in (("trained", "test"), ("validation", "validation")):
        scores[name] = [accuracy(model, task, part) for task in tasks]
    return scores
