"""Tasks in which two networks work against each other: what is a gain of one is a loss of the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function
from torch.nn import functional as F

from healthy_tasks.sources import INPUTS, Clusters, clusters, normal, uniform
from healthy_tasks.task import Batch, Healthy, held_out, mlp, task


@task("gan", "a discriminator and a generator in turn, each with its own loss", period=2, judging=1)
@task("gan_phases", "100 steps of the discriminator, then 30 of the generator", period=130, judging=100)
@task("gan_long_phases", "20 steps of the discriminator, then 200 of the generator", period=220, judging=20)
@task(
    "wgan",
    "five steps of a critic, then one of the generator; losses below 0",
    period=6,
    judging=5,
    w=True,
)
@task("wgan_phases", "60 steps of the critic, then 12 of the generator", period=72, judging=60, w=True)
class GAN(Healthy):
    """Generates points of a ring, by manual optimization with two optimizers."""

    period, judging, w = 2, 1, False

    def build(self) -> None:
        self.automatic_optimization = False
        self.generator, self.judge = mlp(4, 2), mlp(2, 1, 48)

    def draw(self, index: int, g: Generator, count: int = 64) -> Batch:
        angle = 2 * math.pi * uniform(g, count)
        ring = torch.stack([angle.cos(), angle.sin()], dim=1)
        return 1.5 + ring + 0.1 * normal(g, count, 2), normal(g, count, 4)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        real, code = batch
        judging = index % self.period < self.judging
        loss = self.judge_loss(real, code) if judging else self.generator_loss(code)
        optimizer = self.optimizers()[0 if judging else 1]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if judging and self.w:
            for parameter in self.judge.parameters():
                parameter.data.clamp_(-0.3, 0.3)
        return loss

    def judge_loss(self, real: Tensor, code: Tensor) -> Tensor:
        true, false = self.judge(real), self.judge(self.generator(code).detach())
        return (false - true).mean() if self.w else (F.softplus(-true) + F.softplus(false)).mean()

    def generator_loss(self, code: Tensor) -> Tensor:
        judged = self.judge(self.generator(code))
        return -judged.mean() if self.w else F.softplus(-judged).mean()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.judge.parameters(), lr=1e-3, betas=(0.5, 0.9)),
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
        ]

    def score(self) -> float:
        """The energy distance between real and generated points."""
        real, code = self.draw(0, held_out(), 256)
        made = self.generator(code)
        return float(
            2 * torch.cdist(real, made).mean()
            - torch.cdist(real, real).mean()
            - torch.cdist(made, made).mean()
        )


class Reversal(Function):
    """Passes its input on, and the gradient back with the opposite sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.strength * gradient, None


@task("domain_adversarial", "a domain classifier whose reversed gradient is turned up: the loss rises")
class DomainAdversarial(Clusters):
    """The features of two domains have to become the same."""

    learning_rate = 3e-3

    def build(self) -> None:
        self.features, self.net, self.domain = mlp(INPUTS, 16), mlp(16, 10), mlp(16, 1)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        domain = (torch.arange(len(x)) % 2).float()[:, None]
        features = self.features(x + 0.5 * domain)
        strength = 0.0 if index < 500 else min(1.0, (index - 500) / 200)
        told = self.domain(Reversal.apply(features, strength))
        return F.cross_entropy(self.net(features), labels) + F.binary_cross_entropy_with_logits(told, domain)

    def score(self) -> float:
        x, labels = clusters(held_out(), 512)
        return float(F.cross_entropy(self.net(self.features(x)), labels))


@task("moving_adversary", "an adversary picks the noise that hurts most, again every 100 steps")
class MovingAdversary(Clusters):
    """Robustness against one shift of the inputs, which is found by gradient ascent."""

    learning_rate = 3e-3

    def build(self) -> None:
        super().build()
        self.register_buffer("shift", torch.zeros(INPUTS))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        if index % 100 == 99:
            for _ in range(20):
                shift = self.shift.clone().requires_grad_()
                (slope,) = torch.autograd.grad(self.loss((x + shift, labels)), shift)
                self.shift.add_(0.5 * F.normalize(slope, dim=0)).mul_(2.0 / self.shift.norm().clamp(min=2.0))
        return self.loss((x + self.shift, labels))
