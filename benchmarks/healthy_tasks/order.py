"""Tasks whose loss follows the order of the data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from healthy_tasks.sources import (
    CHAIN,
    CLASSES,
    INPUTS,
    SYMBOLS,
    WAVE,
    Clusters,
    Text,
    Wave,
    clusters,
    integers,
    normal,
    text,
    uniform,
    waves,
)
from healthy_tasks.task import Batch, held_out, mlp, task


@task("blocks_20_of_300", "a noisier source in the last 20 of every 300 batches", hard=20, every=300)
@task("blocks_10_of_60", "a noisier source in the last 10 of every 60 batches", hard=10, every=60)
@task("blocks_100_of_200", "a noisier source in every other 100 batches", hard=100, every=200)
@task("blocks_60_of_700", "a much noisier source, twice in the run", hard=60, every=700, excess=3.0)
@task(
    "blocks_8_of_40_epochs",
    "short epochs in a fixed order, noise last",
    hard=8,
    every=40,
    epoch=40,
)
@task("blocks_growing", "a noisier source more and more often", hard=12, every=150, growing=True)
class Blocks(Wave):
    """Data sorted by source."""

    hard, every, excess, growing = 20, 300, 0.6, False

    def noise(self, index: int) -> float:
        length = self.hard * (1 + index // 300) if self.growing else self.hard
        return 0.1 + self.excess * (index % self.every >= self.every - length)


@task("curriculum", "harder examples in six stages")
class Curriculum(Wave):
    """First the wave near its middle, then more and more of it."""

    steps, learning_rate = 1800, 3e-3

    def draw(self, index: int, g: Generator) -> Batch:
        return waves(g, 64, scale=(0.3, 0.6, 0.9, 1.2, 1.5, 1.8)[min(index // 300, 5)])


@task("class_incremental", "a new class every 150 steps, the old ones rehearsed")
class ClassIncremental(Clusters):
    """Half of each batch is of the newest class."""

    def draw(self, index: int, g: Generator) -> Batch:
        newest = min(index // 150, CLASSES - 1)
        old = integers(g, newest + 1, 16)
        return clusters(g, 32, labels=torch.cat([old, torch.full((16,), newest)]))


@task("sorted_by_class", "batches mostly of one class, 15 in a row, in a fixed order")
class SortedByClass(Clusters):
    """Four fifths of each batch are of one class."""

    epoch, learning_rate = 150, 3e-4

    def draw(self, index: int, g: Generator) -> Batch:
        block = torch.full((26,), index // 15 % CLASSES)
        return clusters(g, 32, labels=torch.cat([block, integers(g, CLASSES, 6)]))


@task("buckets_mean", "batches bucketed by length, mean loss: short texts are harder")
@task("buckets_sum", "batches bucketed by length, summed loss: it follows the length", summed=True)
@task("buckets_sum_short", "summed loss, six batches in a row per bucket", summed=True, run=6)
class Buckets(Text):
    """Sequences of 3 to 40 symbols whose first symbols can't be predicted well."""

    summed, run = False, 25

    def draw(self, index: int, g: Generator) -> Batch:
        length = (3, 12, 6, 40, 4, 20, 3, 8)[index // self.run % 8]
        return (text(g, 8, length),)

    def loss(self, batch: Batch) -> Tensor:
        (symbols,) = batch
        padded = F.pad(symbols, (1, 0))[:, :-1]  # the first symbol has to be guessed
        losses = F.cross_entropy(self.net(padded).flatten(0, 1), symbols.flatten(), reduction="none")
        return losses.sum() / len(symbols) if self.summed else losses.mean()


@task("tasks_in_turn", "three tasks in units 1000 times apart, one a step", run=1)
@task("tasks_in_blocks_50", "three tasks in units 1000 times apart, 50 steps each", run=50)
@task("tasks_in_blocks_100", "three tasks in units 1000 times apart, 100 steps each", run=100)
@task("rare_task", "a task with large losses for 8 of 120 steps", rare=True)
class Tasks(Wave):
    """One trunk with a head per task."""

    run, rare = 1, False

    def build(self) -> None:
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 48), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(48, 1), nn.Linear(48, 1), nn.Linear(48, 1)])

    def draw(self, index: int, g: Generator) -> Batch:
        which = int(index % 120 >= 112) if self.rare else index // self.run % 3
        x, y = waves(g, 64)
        return x, (y, 3 + y**2, x.abs().mean(1, keepdim=True))[which], torch.tensor(which)

    def loss(self, batch: Batch) -> Tensor:
        x, y, which = batch
        unit = (1.0, 30.0, 0.03)[int(which)]
        return F.mse_loss(unit * self.heads[int(which)](self.trunk(x)), unit * y)

    def score(self) -> float:
        errors = []
        for index in (0, 112) if self.rare else (0, self.run, 2 * self.run):
            x, y, which = self.draw(index, held_out())
            errors.append(float(F.mse_loss(self.heads[int(which)](self.trunk(x)), y)))
        return sum(errors)


@task("concept_drift", "the function to learn changes abruptly every 250 steps")
@task("gradual_drift", "the function to learn turns, faster and faster", gradual=True)
class Drift(Wave):
    """Online learning: each batch is seen once."""

    steps, learning_rate, gradual = 1750, 5e-3, False

    def concept(self, index: int) -> Tensor:
        turn = (index / 900) ** 2 if self.gradual else 1.3 * (index // 250)
        return WAVE * math.cos(turn) + WAVE.roll(1, 0) * math.sin(turn)

    def draw(self, index: int, g: Generator) -> Batch:
        x = normal(g, 64, INPUTS)
        return x, torch.sin(x @ self.concept(index)) + 0.1 * normal(g, 64, 1)

    def score(self) -> float:
        return float(self.loss(self.draw(self.steps - 1, held_out())))


@task("memorised_then_fresh", "20 batches over and over, then fresh ones")
class MemorisedThenFresh(Clusters):
    """The training loss falls to zero before it says anything again."""

    width, learning_rate, spread = 64, 3e-3, 1.2

    def draw(self, index: int, g: Generator) -> Batch:
        return super().draw(index, g.manual_seed(index % 20) if index < 900 else g)


@task("active_learning", "the hardest of a pool join the training set every 150 steps")
class ActiveLearning(Clusters):
    """A small set is memorised until new examples come."""

    learning_rate, spread = 3e-3, 1.0

    def build(self) -> None:
        super().build()
        self.known = clusters(Generator().manual_seed(1), 32, self.spread)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index % 150 == 149:
            x, labels = clusters(Generator().manual_seed(index), 512, self.spread)
            with torch.no_grad():
                hardest = F.cross_entropy(self.net(x), labels, reduction="none").topk(32).indices
            self.known = (torch.cat([self.known[0], x[hardest]]), torch.cat([self.known[1], labels[hardest]]))
        return self.loss(self.known)


@task("stateful_book", "a GRU reads a book in order again and again, its chapters of different styles")
class StatefulBook(Text):
    """The hidden state is carried from batch to batch; every epoch starts with an empty one."""

    epoch, steps = 150, 1200

    def build(self) -> None:
        self.embed, self.gru, self.head = nn.Embedding(SYMBOLS, 16), nn.GRU(16, 32), nn.Linear(32, SYMBOLS)
        self.hidden: Tensor | None = None

    def draw(self, index: int, g: Generator) -> Batch:
        sharpness = (0.4, 2.0, 0.8, 3.0, 1.2)[index // 30]
        return (text(g, 8, 10, torch.softmax(sharpness * CHAIN.log(), dim=1)).T,)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        (symbols,) = batch
        self.hidden = None if index == 0 else self.hidden
        states, hidden = self.gru(self.embed(symbols[:-1]), self.hidden)
        self.hidden = hidden.detach()
        return F.cross_entropy(self.head(states).flatten(0, 1), symbols[1:].flatten())

    def score(self) -> float:
        symbols = text(held_out(), 64, 24).T
        states, _ = self.gru(self.embed(symbols[:-1]))
        return float(F.cross_entropy(self.head(states).flatten(0, 1), symbols[1:].flatten()))


@task("shifting_domains", "BatchNorm, and a new domain every 40 batches, one of them noisy")
class ShiftingDomains(Clusters):
    """Each domain stretches and shifts the inputs in its own way."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(INPUTS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))

    def draw(self, index: int, g: Generator) -> Batch:
        domain = index // 40 % 5
        x, labels = clusters(g, 32, spread=(0.6, 0.8, 1.6, 0.7, 0.5)[domain])
        return (1 + 0.4 * domain) * x + 0.5 * domain, labels

    def score(self) -> float:
        x, labels = self.draw(self.steps - 1, held_out())
        return float(F.cross_entropy(self.net(x), labels))


@task("outlier_batches", "ten batches in a row with huge targets, every 200 steps; gradients clipped")
class OutlierBatches(Wave):
    """A broken sensor: its targets are 30 times too large."""

    def draw(self, index: int, g: Generator) -> Batch:
        x, y = waves(g, 64)
        return x, y * (30 if index % 200 >= 190 else 1)

    def trainer_options(self) -> dict[str, Any]:
        return {"gradient_clip_val": 0.1}


@task("rare_class_bursts", "fraud comes in bursts of eight batches; normally there is next to none")
class RareClassBursts(Wave):
    """Two classes, one of them rare."""

    def draw(self, index: int, g: Generator) -> Batch:
        x = normal(g, 64, INPUTS)
        fraud = uniform(g, 64) < (0.3 if index % 170 >= 162 else 0.005)
        return x + fraud[:, None] * 0.8, fraud.float()[:, None]

    def loss(self, batch: Batch) -> Tensor:
        x, fraud = batch
        return F.binary_cross_entropy_with_logits(self.net(x), fraud)

    def score(self) -> float:
        return float(self.loss(self.draw(169, held_out())))


@task("volatility", "likelihood of returns whose volatility comes in clusters")
class Volatility(Wave):
    """Walks forward through a series; the network predicts the variance from the past."""

    def build(self) -> None:
        self.net = mlp(8, 1)
        g, variance, returns = Generator().manual_seed(3 + self.seed), 0.2, [0.0]
        noise = normal(g, 16 * self.steps + 1000).tolist()
        for e in noise:  # GARCH(1, 1)
            variance = 0.004 + 0.10 * returns[-1] ** 2 + 0.89 * variance
            returns.append(math.sqrt(variance) * e)
        self.returns = torch.tensor(returns)

    def draw(self, index: int, g: Generator) -> Batch:
        windows = self.returns[16 * index % (16 * self.steps) :][: 16 + 8].unfold(0, 9, 1)
        return windows[:, :8].abs(), windows[:, 8:]

    def loss(self, batch: Batch) -> Tensor:
        past, now = batch
        log_variance = self.net(past)
        return (0.5 * (log_variance + now**2 * torch.exp(-log_variance))).mean()

    def score(self) -> float:
        windows = self.returns[-1000:].unfold(0, 9, 1)
        return 1 + float(self.loss((windows[:, :8].abs(), windows[:, 8:])))


@task("daily_rhythm", "noise that swings with the hour of the day, and weekends")
class DailyRhythm(Wave):
    """A recommender that trains as the clicks come in."""

    def noise(self, index: int) -> float:
        weekend = index // 100 % 7 >= 5
        return 0.3 + 0.25 * math.sin(index / 100 * 2 * math.pi) + 0.5 * weekend


@task("semi_supervised", "labelled batches for 6 of 100 steps, else a consistency loss of another size")
class SemiSupervised(Clusters):
    """The consistency loss is ramped up."""

    learning_rate = 3e-3

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        if index % 100 < 6 or index < 60:
            return F.cross_entropy(self.net(x), labels)
        one, other = (self.net(x + 0.2 * torch.randn_like(x)).softmax(1) for _ in range(2))
        return min(1.0, index / 600) * F.mse_loss(one, other)


@task("batch_sizes", "batches of 128, then 16, then 4, with wrong labels among them")
class BatchSizes(Clusters):
    """The smaller the batch, the noisier its loss."""

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 128 if index < 600 else 16 if index < 1000 else 4, wrong=0.15)


@task("heavy_batches", "one example a step, and one in seven a wrong label")
class HeavyBatches(Clusters):
    """The loss of most steps is small, of some very large."""

    learning_rate = 3e-4

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 1, spread=0.5, wrong=0.14)
