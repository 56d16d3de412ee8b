"""Where the data come from: a wave, clusters, a Markov chain, a corridor."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from healthy_tasks.task import Batch, Healthy, held_out, mlp

INPUTS = 16
CLASSES = 10
SYMBOLS = 16

_FIXED = Generator().manual_seed(5)
WAVE = F.normalize(torch.randn(INPUTS, 1, generator=_FIXED), dim=0) * 1.5
CENTRES = torch.randn(CLASSES, INPUTS, generator=_FIXED)
CHAIN = torch.softmax(2.5 * torch.randn(SYMBOLS, SYMBOLS, generator=_FIXED), dim=1)


def normal(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def uniform(g: Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g)


def integers(g: Generator, below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=g)


def waves(g: Generator, count: int, noise: float = 0.1, scale: float = 1.0) -> Batch:
    """Points and the height of a wave there, with noise; a larger scale sees more of the wave."""
    x = scale * normal(g, count, INPUTS)
    return x, torch.sin(x @ WAVE) + noise * normal(g, count, 1)


def clusters(
    g: Generator, count: int, spread: float = 0.7, labels: Tensor | None = None, wrong: float = 0.0
) -> Batch:
    """Points of ten clusters, and which one each is of; a share of the labels is wrong."""
    labels = integers(g, CLASSES, count) if labels is None else labels
    x = CENTRES[labels] + spread * normal(g, count, INPUTS)
    mistaken = uniform(g, count) < wrong
    return x, torch.where(mistaken, integers(g, CLASSES, count), labels)


def text(g: Generator, count: int, length: int, chain: Tensor = CHAIN) -> Tensor:
    """Sequences of a Markov chain."""
    symbols = [integers(g, SYMBOLS, count)]
    for _ in range(length - 1):
        symbols.append(torch.multinomial(chain[symbols[-1]], 1, generator=g)[:, 0])
    return torch.stack(symbols, dim=1)


class Wave(Healthy):
    """Regression of the wave; subclasses make the data difficult."""

    def build(self) -> None:
        self.net = mlp(INPUTS, 1)

    def noise(self, index: int) -> float:
        """Of the targets of this batch."""
        return 0.1

    def draw(self, index: int, g: Generator) -> Batch:
        return waves(g, 64, self.noise(index))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def score(self) -> float:
        return float(F.mse_loss(self.net((batch := waves(held_out(), 512))[0]), batch[1]))


class Clusters(Healthy):
    """Classification of the clusters; subclasses make it difficult."""

    spread = 0.7
    width = 32

    def build(self) -> None:
        self.net: nn.Module = mlp(INPUTS, CLASSES, self.width)

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 32, self.spread)

    def loss(self, batch: Batch) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.net(x), labels)

    def score(self) -> float:
        x, labels = clusters(held_out(), 512, self.spread)
        return float(F.cross_entropy(self.net(x), labels))


class Text(Healthy):
    """Next-symbol prediction on the Markov chain."""

    learning_rate = 3e-3

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Embedding(SYMBOLS, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, SYMBOLS)
        )

    def draw(self, index: int, g: Generator) -> Batch:
        return (text(g, 16, 12),)

    def loss(self, batch: Batch) -> Tensor:
        (symbols,) = batch
        return F.cross_entropy(self.net(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())

    def score(self) -> float:
        symbols = text(held_out(), 64, 24)
        return float(F.cross_entropy(self.net(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten()))
