"""RMS diversity: the distance between snapshots of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merge_callback.diversity.distance import rms_per_tensor, squared_distances
from merge_callback.sharding.live import as_real
from merge_callback.torch_metric import Metric


def rms_diversity(theta_1: Mapping[str, Tensor], theta_2: Mapping[str, Tensor]) -> float:
    """The model's RMS diversity: the mean of ``rms_per_tensor`` over its tensors (eq. 5)."""
    real = ((name, as_real(tensor)) for name, tensor in theta_1.items())
    metric = RMSDiversity({name: tensor.numel() for name, tensor in real if tensor.is_floating_point()})
    metric.update(squared_distances(theta_1, theta_2))
    return float(metric.compute())


class RMSDiversity(Metric):
    """RMS diversity of a pair of snapshots, by tensor and for the model.

    Each ``update`` takes a new pair (or a shard of one: sums add up over updates and ranks until
    ``reset``). ``first`` keeps the first value ever computed, across resets, for ``change``.

    Args:
        numel: number of elements of each tensor that counts, by name.
        **kwargs: see ``torchmetrics.Metric``.

    Example::

        >>> import torch
        >>> a, b = {"w": torch.zeros(4)}, {"w": torch.full((4,), 0.5)}
        >>> metric = RMSDiversity({"w": 4})
        >>> metric.update(squared_distances(a, b))
        >>> round(float(metric.compute()), 6)
        0.5
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False
    squares: Tensor
    numel: Tensor

    def __init__(self, numel: Mapping[str, int], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.names: Sequence[str] = tuple(numel)
        self.first: float | None = None
        self._counts = torch.tensor(list(numel.values()), dtype=torch.int64)
        self.add_state("squares", torch.zeros(len(numel), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("numel", torch.zeros(len(numel), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, squares: Mapping[str, float]) -> None:
        """Adds the pair's sums of squared differences (what ``squared_distances`` returns)."""
        values = torch.tensor([squares[name] for name in self.names], dtype=torch.float64)
        self.squares += values.to(self.squares.device)
        self.numel += self._counts.to(self.numel.device)

    def compute(self) -> Tensor:
        """The model's value: an fp64 scalar, the mean over tensors."""
        value = rms_per_tensor(self.squares, self.numel).mean()
        if self.first is None:
            self.first = float(value)
        return value

    def per_tensor(self) -> dict[str, float]:
        """The RMS distance of each tensor of the last pair."""
        return dict(zip(self.names, rms_per_tensor(self.squares, self.numel).tolist(), strict=True))

    def change(self) -> float:
        """Percentage change of the model's value from the first one, e.g. −80.0 late in a decay."""
        value = float(self.compute())
        return 100 * (value / self.first - 1) if self.first else 0.0
