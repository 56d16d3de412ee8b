"""``El2n``: how hard examples are, over seeds and ranks. Only this part needs torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from merge_callback.analysis.difficulty import Scores, el2n
from merge_callback.torch_metric import Metric


class El2n(Metric):
    """EL2N, ``E_seeds ‖p(θ, x) − onehot(y)‖₂`` of each example (*Less Is More*, §2.4).

    An example that several ranks saw under one seed, as samplers pad, counts once.

    Example::

        hardness = El2n()
        for seed, model in enumerate(models):  # each fine-tuned for 32 steps with another seed
            for x, labels, ids in data:
                hardness.update(model(x), labels, ids, seed)
        ids, scores = hardness.compute()
        bins = difficulty_bins(scores)
    """

    full_state_update = False
    higher_is_better = None
    ids: list[Tensor]
    seeds: list[Tensor]
    scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("ids", "seeds", "scores"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, ids: Tensor, seed: int = 0) -> None:
        """Adds a batch.

        Args:
            logits: ``(examples, classes)``, floating point.
            labels: ``(examples,)`` int64.
            ids: ``(examples,)`` int64, the same for an example under every seed.
            seed: of the model that the logits are of.
        """
        self.ids.append(ids)
        self.seeds.append(torch.full_like(ids, seed))
        self.scores.append(el2n(logits.detach(), labels))

    def compute(self) -> Scores:
        """The mean over seeds, of all ranks' examples."""
        from torchmetrics.utilities.data import dim_zero_cat

        pairs = torch.stack([dim_zero_cat(self.ids), dim_zero_cat(self.seeds)])
        (ids, _), once = _means(pairs, dim_zero_cat(self.scores))
        return Scores(*_means(ids, once))


def _means(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The different keys (columns), sorted, and the mean of each one's values."""
    unique, place, count = torch.unique(keys, dim=-1, return_inverse=True, return_counts=True)
    return unique, values.new_zeros(len(count)).index_add(0, place, values) / count
