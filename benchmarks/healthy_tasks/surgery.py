"""Tasks in which the user changes the weights, by design and for the better in the end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from healthy_tasks.sources import CLASSES, INPUTS, Clusters, Wave, clusters, integers, normal, uniform, waves
from healthy_tasks.task import Batch, Healthy, held_out, mlp, task
from merge_callback import SpikeOptions


def frozen_copy(net: nn.Module) -> nn.ParameterList:
    """The weights of a network, not to be trained."""
    return nn.ParameterList([p.detach().clone() for p in net.parameters()]).requires_grad_(False)


@task("pruning", "most weights are pruned away, in four cuts: the loss jumps and heals")
class Pruning(Wave):
    """Magnitude pruning with fine-tuning."""

    learning_rate = 3e-3

    def build(self) -> None:
        self.net = mlp(INPUTS, 1, 64)
        self.register_buffer("mask", torch.ones(64, INPUTS))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        hidden = torch.tanh(F.linear(x, self.net[0].weight * self.mask, self.net[0].bias))
        return F.mse_loss(self.net[2](hidden), y)

    def score(self) -> float:
        return float(self.loss(waves(held_out(), 512)))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index in (600, 800, 1000, 1200):
            share = {600: 0.5, 800: 0.7, 1000: 0.85, 1200: 0.9}[index]
            size = (self.net[0].weight * self.mask).detach().abs()
            self.mask.copy_(size > size.flatten().quantile(share))
        return self.loss(batch)


@task("quantisation", "weights are rounded to 8, then 4, then 3 bits")
class Quantisation(Clusters):
    """Quantisation-aware training with straight-through gradients."""

    def rounded(self, bits: int) -> dict[str, Tensor]:
        found = {}
        for name, weight in self.net.named_parameters():
            unit = weight.detach().abs().max() / (2 ** (bits - 1) - 1)
            found[name] = weight + ((weight / unit).round() * unit - weight).detach()
        return found

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        bits = (32, 8, 4, 3, 2)[min(index // 300, 4)]
        weights = self.rounded(bits) if bits < 32 else dict(self.net.named_parameters())
        return F.cross_entropy(functional_call(self.net, weights, (x,)), labels)


@task("head_resets", "the last layer gets new random weights every 300 steps")
class HeadResets(Clusters):
    """As against the primacy bias in reinforcement learning."""

    learning_rate = 3e-3

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index % 300 == 200 and isinstance(self.net, nn.Sequential):
            self.net[-1].reset_parameters()
        return self.loss(batch)


@task("unfreezing", "first the head alone is trained, then all of a deeper network, at once")
class Unfreezing(Clusters):
    """Gradual unfreezing; the deeper layers are added to the network when they are unfrozen."""

    learning_rate = 5e-3

    def build(self) -> None:
        super().build()
        self.deep = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, INPUTS))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        return self.loss(batch if index < 700 else (self.deep(x), labels))

    def score(self) -> float:
        x, labels = clusters(held_out(), 512)
        return float(F.cross_entropy(self.net(self.deep(x)), labels))


@task("reptile", "meta-learning: a new task every 10 steps, some 1000 times harder than others")
@task("reptile_sorted", "the same, the tasks in the order of their difficulty", ordered=True)
class Reptile(Healthy):
    """Sine waves of many heights; after each task the start is moved towards where it ended."""

    ordered = False

    def build(self) -> None:
        self.automatic_optimization = False
        self.net = mlp(1, 1, 48)
        self.start = frozen_copy(self.net)

    def draw(self, index: int, g: Generator) -> Batch:
        which = index // 10
        of_task = Generator().manual_seed(which)
        share = which % 15 / 15 if self.ordered else float(uniform(of_task, 1))
        height, phase = 0.1 * 40**share, float(uniform(of_task, 1))
        x = 6 * uniform(g, 32, 1) - 3
        return x, height * torch.sin(x + phase)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, y = batch
        optimizer = self.optimizers()
        loss = F.mse_loss(self.net(x), y)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if index % 10 == 9:
            with torch.no_grad():
                for start, fast in zip(self.start, self.net.parameters(), strict=True):
                    fast.copy_(start.add_(0.2 * (fast - start)))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.02)

    def score(self) -> float:
        """The error of the start on the mean of many tasks."""
        x = torch.linspace(-3, 3, 100)[:, None]
        heights = [0.1 * 40 ** (k / 20) for k in range(21)]
        y = sum(h * torch.sin(x + 0.5) for h in heights) / len(heights)
        net = {name: p for (name, _), p in zip(self.net.named_parameters(), self.start, strict=True)}
        return float(F.mse_loss(functional_call(self.net, net, (x,)), y))


@task("federated", "clients with two classes each train 25 steps; four of them are then averaged")
class Federated(Clusters):
    """Federated averaging: each client begins at the server's weights."""

    learning_rate = 0.05

    def build(self) -> None:
        super().build()
        self.server = frozen_copy(self.net)
        self.arrived = [torch.zeros_like(p) for p in self.server]

    def draw(self, index: int, g: Generator) -> Batch:
        client = index // 25 % 20
        return clusters(g, 16, labels=(client + 3 * integers(g, 2, 16)) % CLASSES)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index and index % 25 == 0:
            self.next_client(index // 25)
        return self.loss(batch)

    @torch.no_grad()
    def next_client(self, client: int) -> None:
        for arrived, server, own in zip(self.arrived, self.server, self.net.parameters(), strict=True):
            arrived.add_(own / 4)
            if client % 4 == 0:
                server.copy_(arrived)
                arrived.zero_()
            own.copy_(server)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=self.learning_rate)

    def score(self) -> float:
        x, labels = clusters(held_out(), 512)
        net = {name: p for (name, _), p in zip(self.net.named_parameters(), self.server, strict=True)}
        return float(F.cross_entropy(functional_call(self.net, net, (x,)), labels))


@task("lbfgs", "L-BFGS with a closure, on new data every 60 steps")
class LBFGS(Wave):
    """Several evaluations a step; the loss of a step is that of its first one."""

    steps = 600

    def draw(self, index: int, g: Generator) -> Batch:
        return waves(g.manual_seed(index // 60), 512, 0.05)

    def configure_optimizers(self) -> Any:
        options: dict[str, Any] = {"max_iter": 2, "history_size": 5, "line_search_fn": "strong_wolfe"}
        return torch.optim.LBFGS(self.parameters(), lr=0.5, **options)  # without a search it does diverge

    def callback_options(self) -> dict[str, Any]:
        """The callback has to be told how to reset this optimizer; by default it refuses it."""
        return {"spike": SpikeOptions(optimizer=lambda optimizer: optimizer.state.clear())}


@task("perturbed_weights", "weights are perturbed every 200 steps to leave sharp minima")
class Perturbed(Wave):
    """Noise of about a third of a weight's size, which heals within steps."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index % 200 == 150:
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(0.3 / math.sqrt(INPUTS) * normal(Generator().manual_seed(index), *p.shape))
        return self.loss(batch)
