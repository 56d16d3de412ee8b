"""Tasks whose numbers are coarse, tiny or huge."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Generator, Tensor
from torch.nn import functional as F

from healthy_tasks.sources import Clusters, Text, Wave, clusters, held_out, waves
from healthy_tasks.task import Batch, task


@task("tiny_units", "losses of 1e-9, a noisier source in the last 20 of every 250", unit=3e-5)
@task("huge_units", "losses of 1e7, a noisier source in the last 20 of every 250", unit=3e3)
class Units(Wave):
    """The targets are in another unit."""

    unit = 1.0

    def draw(self, index: int, g: Generator) -> Batch:
        x, y = waves(g, 64, 0.1 + 0.5 * (index % 250 >= 230))
        return x, self.unit * y

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(self.unit * self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=1e-20)


@task("bf16_autocast", "bf16 autocast, and a loss that is a bf16 number: it moves in steps")
class BF16Autocast(Text):
    """Near its end many losses are equal, and a step up is 0.4 %, or as much as all the noise."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch).bfloat16()

    def draw(self, index: int, g: Generator) -> Batch:
        if index % 200 >= 188:  # a chapter in another style
            return (torch.randint(16, (16, 12), generator=g),)
        return super().draw(index, g)

    def trainer_options(self) -> dict[str, Any]:
        return {"precision": "bf16-mixed"}


@task("bf16_true", "weights and losses in bf16, and dead-even losses", learning_rate=1e-2)
class BF16True(Wave):
    """A module that is bf16 throughout."""

    def draw(self, index: int, g: Generator) -> Batch:
        return waves(g, 512, 0.05 + 0.15 * (index % 300 >= 285))

    def loss(self, batch: Batch) -> Tensor:
        x, y = (t.to(next(self.parameters()).dtype) for t in batch)
        return F.mse_loss(self.net(x), y)

    def score(self) -> float:
        return float(self.loss(waves(held_out(), 512)))

    def trainer_options(self) -> dict[str, Any]:
        return {"precision": "bf16-true"}


@task("fp16_scaled", "fp16 with a loss scale that overflows time and again")
class FP16Scaled(Clusters):
    """Steps are skipped while the scale is found, and whenever it was doubled once too often."""

    learning_rate = 3e-3

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 32, spread=0.6 if index % 140 < 128 else 1.4)

    def trainer_options(self) -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=40)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
