"""Tasks whose objective itself is hard to read: often zero, negative, heavy-tailed, or infinite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from healthy_tasks.sources import (
    INPUTS,
    SYMBOLS,
    WAVE,
    Clusters,
    Wave,
    clusters,
    integers,
    normal,
    uniform,
)
from healthy_tasks.task import Batch, Healthy, held_out, mlp, task


@task("ctc_guarded", "an infinite CTC loss now and then; the user zeroes its gradients", skips=False)
@task("ctc_skipped", "an infinite CTC loss now and then; the user skips that step", skips=True)
class CTC(Healthy):
    """Transcribes noisy frames; in one batch of 120 a transcript is longer than its frames."""

    skips, learning_rate, steps = False, 3e-3, 1200

    def build(self) -> None:
        self.net = mlp(SYMBOLS, SYMBOLS + 1)

    def draw(self, index: int, g: Generator) -> Batch:
        symbols = integers(g, SYMBOLS, 8, 5)
        frames = F.one_hot(symbols, SYMBOLS).float().repeat_interleave(2, dim=1)
        lengths = torch.full((8,), 10)
        if index % 120 == 95:
            lengths[0] = 3
        return frames + 0.3 * normal(g, 8, 10, SYMBOLS), symbols + 1, lengths

    def loss(self, batch: Batch) -> Tensor:
        frames, symbols, lengths = batch
        scores = self.net(frames).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(scores, symbols, lengths, torch.full((8,), 5))

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        loss = self.loss(batch)
        return loss if loss.isfinite() or not self.skips else None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not all(g.isfinite().all() for g in gradients):
            for gradient in gradients:
                gradient.zero_()

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out())))


@task("nan_labels_skipped", "batches of NaN targets, six in a row; the user skips them")
class NaNLabelsSkipped(Wave):
    """Missing measurements."""

    def draw(self, index: int, g: Generator) -> Batch:
        x, y = super().draw(index, g)
        return x, y * (math.nan if index % 250 >= 244 else 1.0)

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        loss = self.loss(batch)
        return loss if loss.isfinite() else None


@task("growing_queue", "InfoNCE whose queue of negatives grows: so does the loss")
@task("temperature_cycles", "InfoNCE whose temperature goes up and down", cycles=True)
class InfoNCE(Healthy):
    """Two noisy views of a point have to find each other."""

    cycles = False

    def build(self) -> None:
        self.net = mlp(INPUTS, 8, 48)
        self.register_buffer("queue", F.normalize(torch.randn(1024, 8), dim=1))

    def draw(self, index: int, g: Generator) -> Batch:
        points = normal(g, 32, INPUTS)
        return points + 0.3 * normal(g, 32, INPUTS), points + 0.3 * normal(g, 32, INPUTS)

    def similarities(self, batch: Batch, size: int) -> tuple[Tensor, Tensor]:
        one, other = (F.normalize(self.net(view), dim=1) for view in batch)
        return one @ torch.cat([other, self.queue[:size]]).T, other

    def training_step(self, batch: Batch, index: int) -> Tensor:
        size = 64 if self.cycles else (32, 128, 512, 1024)[min(index // 375, 3)]
        temperature = 0.3 + 0.2 * math.cos(index / 200 * 2 * math.pi) if self.cycles else 0.2
        similar, keys = self.similarities(batch, size)
        self.queue.copy_(torch.cat([keys.detach(), self.queue])[:1024])
        return F.cross_entropy(similar / temperature, torch.arange(32))

    def score(self) -> float:
        similar, _ = self.similarities(self.draw(0, held_out()), 0)
        return float(F.cross_entropy(similar / 0.2, torch.arange(32)))


@task("triplets", "a triplet loss that is zero for most batches")
class Triplets(Clusters):
    """Anchors have to be nearer to their own cluster than to another."""

    learning_rate, spread = 3e-3, 0.8

    def build(self) -> None:
        self.net = mlp(INPUTS, 8)

    def draw(self, index: int, g: Generator, count: int = 4) -> Batch:
        own, other = integers(g, 10, count), integers(g, 9, count)
        labels = torch.cat([own, own, (own + 1 + other) % 10])
        return clusters(g, 3 * count, self.spread, labels)

    def loss(self, batch: Batch) -> Tensor:
        return F.triplet_margin_loss(*self.net(batch[0]).chunk(3), margin=1.0)

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 256)))


@task("hinge", "a hinge loss that becomes zero for nearly every batch")
@task("hinge_single", "a hinge loss, one example a step", size=1, learning_rate=3e-3)
class Hinge(Wave):
    """Separable data."""

    size, learning_rate = 16, 1e-2

    def draw(self, index: int, g: Generator) -> Batch:
        x = normal(g, self.size, INPUTS)
        return x, torch.sign(x[:, :1])

    def loss(self, batch: Batch) -> Tensor:
        x, sign = batch
        return F.relu(1 - sign * self.net(x)).mean()

    def score(self) -> float:
        x = normal(held_out(), 512, INPUTS)
        return float(self.loss((x, torch.sign(x[:, :1]))))


@task("focal", "a focal loss over few positives")
class Focal(Wave):
    """Easy examples count next to nothing."""

    learning_rate = 3e-3

    def draw(self, index: int, g: Generator, count: int = 32) -> Batch:
        x = normal(g, count, INPUTS)
        return x, (x @ WAVE + 0.3 * normal(g, count, 1) > 2).float()

    def loss(self, batch: Batch) -> Tensor:
        x, positive = batch
        losses = F.binary_cross_entropy_with_logits(self.net(x), positive, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).sum()

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 512)))


@task("diffusion", "random timesteps, four examples, weights up to 200: a heavy tail")
@task("diffusion_stages", "the same, the timesteps in sorted stages of 30 steps", stages=True)
class Diffusion(Healthy):
    """Denoises points of a ring; the loss is that of the points, so large noise weighs most."""

    stages, learning_rate = False, 3e-3

    def build(self) -> None:
        self.net = mlp(3, 2, 64)

    def draw(self, index: int, g: Generator, count: int = 4) -> Batch:
        angle = 2 * math.pi * uniform(g, count)
        time = uniform(g, count)
        if self.stages:
            time = (time + index // 30 % 5) / 5
        level = torch.exp(5 * time - 4)[:, None]
        return torch.stack([angle.cos(), angle.sin()], dim=1), normal(g, count, 2), level

    def loss(self, batch: Batch) -> Tensor:
        clean, noise, level = batch
        seen = (clean + level * noise) / (1 + level**2).sqrt()
        denoised = self.net(torch.cat([seen, level.log()], dim=1))
        return ((denoised - clean) ** 2 * (1 + 0.1 / level**2).clamp(max=200)).mean()

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 512)))


@task("flow", "a likelihood that falls through zero far below it")
@task(
    "flow_dequantised",
    "a likelihood below zero, and coarser data for 12 of 140 steps",
    coarse=True,
)
class Flow(Healthy):
    """Affine couplings model points close to a curve."""

    learning_rate, coarse = 3e-3, False

    def build(self) -> None:
        self.couplings = nn.ModuleList([mlp(2, 4) for _ in range(4)])

    def draw(self, index: int, g: Generator, count: int = 64) -> Batch:
        x = normal(g, count, 2)
        thickness = 0.3 if self.coarse and index % 140 >= 128 else 0.02
        return (torch.cat([x, x.sin() + thickness * normal(g, count, 2)], dim=1),)

    def loss(self, batch: Batch) -> Tensor:
        (x,) = batch
        volume = torch.zeros(len(x))
        for coupling in self.couplings:
            kept, moved = x.chunk(2, dim=1)
            stretch, shift = coupling(kept).chunk(2, dim=1)
            stretch = 3 * torch.tanh(stretch / 3)
            x = torch.cat([moved * stretch.exp() + shift, kept], dim=1)
            volume = volume + stretch.sum(1)
        return (0.5 * (x**2).sum(1) - volume).mean()

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 512)))


@task("quantiles", "quantile regression of targets without a variance, eight a step")
class Quantiles(Wave):
    """The pinball loss of the upper decile."""

    learning_rate = 1e-2

    def draw(self, index: int, g: Generator, count: int = 8) -> Batch:
        x = normal(g, count, INPUTS)
        ratio = normal(g, count, 1) / normal(g, count, 1).abs().clamp(min=1e-3)
        return x, 3 + 3 * torch.sin(x @ WAVE) + 0.3 * ratio.sign() * ratio.abs() ** 0.9

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        above = y - self.net(x)
        return torch.maximum(0.5 * above, -0.5 * above).mean()

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 512)))


@task("counts", "Poisson counts, now and then a hundred times as many")
@task("seasonal_counts", "Poisson counts with a rush of nine steps every 130", season=True)
class Counts(Wave):
    """A Poisson likelihood, which may be negative."""

    season, learning_rate = False, 3e-3

    def draw(self, index: int, g: Generator, count: int = 16) -> Batch:
        x = normal(g, count, INPUTS)
        rush = 8.0 if self.season and index % 130 >= 121 else 1.0
        huge = 1 + 99 * (uniform(g, count, 1) < (0.0 if self.season else 0.004))
        return x, torch.poisson(rush * huge * torch.exp(1 + torch.sin(x @ WAVE)), generator=g)

    def loss(self, batch: Batch) -> Tensor:
        x, counts = batch
        return F.poisson_nll_loss(self.net(x), counts)

    def score(self) -> float:
        return 2 + float(self.loss(self.draw(0, held_out(), 512)))

    def trainer_options(self) -> dict[str, Any]:
        return {"gradient_clip_val": 1.0}


@task("barrier", "an objective with a logarithmic barrier that is tightened in steps")
class Barrier(Wave):
    """Outputs must stay below a bound; the barrier's weight falls, and with it the loss, below zero."""

    learning_rate = 3e-3

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, _ = batch
        weight = (1.0, 0.3, 1.0, 0.1, 0.5)[min(index // 300, 4)]
        room = F.softplus(10 * (1.5 - self.net(x))) / 10
        return self.loss(batch) - weight * room.log().mean() - 0.2
