"""Tasks whose loss jumps or rises because a schedule says so."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from healthy_tasks.sources import (
    CENTRES,
    CLASSES,
    INPUTS,
    SYMBOLS,
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
from healthy_tasks.task import Batch, Healthy, held_out, mlp, task


@task("warm_restarts", "a cosine learning rate that restarts every 250 steps", shape="restarts")
@task("rate_step_up", "a learning rate that becomes 40 times as large at half time", shape="step")
@task("cyclic_rate", "a learning rate that cycles between 0.001 and 0.05", shape="cycles")
@task("rate_found_by_trial", "the learning rate is tripled every 200 steps, twice thirded", shape="stairs")
class Rates(Text):
    """Adam with a learning rate that does not only fall."""

    shape = "restarts"

    def factor(self, step: int) -> float:
        """Times 0.001."""
        if self.shape == "restarts":
            return 10 * (1 + math.cos(math.pi * (step % 250) / 250))
        if self.shape == "step":
            return 1.0 if step < 750 else 40.0
        if self.shape == "stairs":
            return (1, 3, 9, 27, 9, 27, 9, 3)[min(step // 200, 7)]
        return 1 + 49 * (1 - abs(step % 100 / 50 - 1))

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.parameters(), lr=1e-3)
        schedule = lr_scheduler.LambdaLR(adam, self.factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@task("edge_of_stability", "full-batch descent with a learning rate at the edge of what is stable")
class EdgeOfStability(Wave):
    """The loss rises in bumps while it falls."""

    learning_rate = 0.4

    def build(self) -> None:
        self.net = mlp(INPUTS, 1, 64)

    def draw(self, index: int, g: Generator) -> Batch:
        return waves(g.manual_seed(self.seed), 256)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@task("dropout_late", "dropout of a half from half time on")
class DropoutLate(Clusters):
    """It is switched on when the loss is low."""

    def build(self) -> None:
        self.dropout = nn.Dropout(0.0)
        self.net = nn.Sequential(nn.Linear(INPUTS, 64), nn.Tanh(), self.dropout, nn.Linear(64, CLASSES))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.dropout.p = 0.5 if index >= 700 else 0.0
        return self.loss(batch)


@task("label_smoothing_late", "label smoothing of 0.3 from step 700 on", smoothing=0.3)
@task("mixup_late", "mixup from step 700 on", mixed=True)
@task("mixup_now_and_then", "mixup for 12 of every 130 steps", mixed=True, every=130)
class Augmented(Clusters):
    """Regularisation that is switched on when the loss is low."""

    smoothing, mixed, every = 0.0, False, 0
    learning_rate = 3e-3

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        if (index < 700 and not self.every) or (self.every and index % self.every >= 12):
            return self.loss(batch)
        if not self.mixed:
            return F.cross_entropy(self.net(x), labels, label_smoothing=self.smoothing)
        share = float(torch.rand(())) / 2
        logits = self.net((1 - share) * x + share * x.flip(0))
        return (1 - share) * F.cross_entropy(logits, labels) + share * F.cross_entropy(logits, labels.flip(0))


@task("denoising_schedule", "a denoiser whose inputs get noisier in four steps")
class DenoisingSchedule(Clusters):
    """A denoising autoencoder."""

    def build(self) -> None:
        self.net = mlp(INPUTS, INPUTS, 48)

    def draw(self, index: int, g: Generator) -> Batch:
        x, _ = clusters(g, 32, 0.2)
        return x + (0.1, 0.4, 0.8, 1.5)[min(index // 350, 3)] * normal(g, 32, INPUTS), x

    def loss(self, batch: Batch) -> Tensor:
        noisy, clean = batch
        return F.mse_loss(self.net(noisy), clean)

    def score(self) -> float:
        return float(self.loss(self.draw(500, held_out())))


@task("progressive_resizing", "images of 8, then 12, then 24 pixels")
class ProgressiveResizing(Clusters):
    """Gratings in noise, told apart by a small convolution."""

    learning_rate = 5e-3

    def build(self) -> None:
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )

    def image(self, g: Generator, count: int, size: int) -> Batch:
        labels = integers(g, 4, count)
        angle = labels[:, None, None] * math.pi / 4
        down, right = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        phase = 16 / size * (down * torch.cos(angle) + right * torch.sin(angle)) + 6 * uniform(g, count, 1, 1)
        return (torch.sin(phase) + 0.5 * normal(g, count, size, size))[:, None], labels

    def draw(self, index: int, g: Generator) -> Batch:
        return self.image(g, 16, 8 if index < 500 else 12 if index < 1000 else 24)

    def score(self) -> float:
        return float(self.loss(self.image(held_out(), 256, 24)))


@task("mask_rate_schedule", "a masked language model; 15 % are masked, then 40 %, then 80 %")
class MaskRate(Text):
    """Predicts masked symbols from their neighbours; the mask is one symbol more."""

    def build(self) -> None:
        self.embed = nn.Embedding(SYMBOLS + 1, 16)
        self.mix, self.head = nn.Conv1d(16, 48, 5, padding=2), nn.Linear(48, SYMBOLS)

    def draw(self, index: int, g: Generator, rate: float | None = None) -> Batch:
        symbols = text(g, 16, 16)
        masked = uniform(g, 16, 16) < (rate or (0.15, 0.4, 0.8)[min(index // 500, 2)])
        masked[:, 7] = True
        return symbols, masked

    def loss(self, batch: Batch) -> Tensor:
        symbols, masked = batch
        seen = self.embed(symbols.masked_fill(masked, SYMBOLS)).mT
        return F.cross_entropy(self.head(F.gelu(self.mix(seen)).mT)[masked], symbols[masked])

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 0.2)))


@task("distillation", "the temperature of the teacher goes from 1 to 4 and back to 2, the loss by its square")
class Distillation(Clusters):
    """The teacher is the true posterior of the clusters."""

    def teacher(self, x: Tensor) -> Tensor:
        return -(torch.cdist(x, CENTRES) ** 2) / 2

    def training_step(self, batch: Batch, index: int) -> Tensor:
        temperature = 1.0 if index < 500 else 4.0 if index < 1000 else 2.0
        x, _ = batch
        targets = (self.teacher(x) / temperature).log_softmax(1)
        student = (self.net(x) / temperature).log_softmax(1)
        return temperature**2 * F.kl_div(student, targets, log_target=True, reduction="batchmean")


@task("adversarial_training", "FGSM examples from step 700 on")
@task("adversarial_bouts", "FGSM examples for 10 of every 90 steps", bouts=True)
class AdversarialTraining(Clusters):
    """Trains on the inputs that raise the loss most."""

    bouts, learning_rate = False, 3e-3

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        if index % 90 >= 10 if self.bouts else index < 700:
            return self.loss(batch)
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(self.loss((x, labels)), x)
        return self.loss((x.detach() + 0.35 * slope.sign(), labels))


@task("penalty_ramp", "the weight of an L1 penalty grows until it is most of the loss")
class PenaltyRamp(Wave):
    """The total loss rises for most of the run."""

    learning_rate = 3e-3

    def training_step(self, batch: Batch, index: int) -> Tensor:
        penalty = sum(p.abs().sum() for p in self.parameters())
        return self.loss(batch) + 4e-3 * max(0.0, index / self.steps - 0.3) * penalty


@task("vae_warm_up", "the weight of the KL divergence grows from 0 to 1 over 600 steps")
@task("vae_cycles", "the weight of the KL divergence falls to 0 and grows again, every 300 steps", cycle=300)
@task("vae_switch", "the weight of the KL divergence is switched from 0 to 1", switch=500)
class VAE(Clusters):
    """A variational autoencoder of the clusters."""

    cycle, switch, learning_rate = 0, 0, 3e-3

    def build(self) -> None:
        self.encoder, self.decoder = mlp(INPUTS, 8), mlp(4, INPUTS)

    def beta(self, index: int) -> float:
        if self.switch:
            return float(index >= self.switch)
        return min(1.0, index % self.cycle / 150 if self.cycle else index / 600)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self.bound(batch, self.beta(index))

    def bound(self, batch: Batch, beta: float) -> Tensor:
        x, _ = batch
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        code = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return (4 * ((self.decoder(code) - x) ** 2).sum(1) + beta * divergence).mean()

    def score(self) -> float:
        return float(self.bound(clusters(held_out(), 512), 1.0))


@task("rollout_horizon", "predictions are rolled out 1, 2, 4, 8, then 16 steps")
class RolloutHorizon(Healthy):
    """Learns the steps of a pendulum."""

    learning_rate = 3e-3

    def build(self) -> None:
        self.net = mlp(2, 2)

    def draw(self, index: int, g: Generator, horizon: int = 0) -> Batch:
        horizon = horizon or 2 ** min(index // 300, 4)
        states = [normal(g, 32, 2)]
        for _ in range(horizon):
            angle, speed = states[-1].unbind(1)
            speed = speed - 0.2 * torch.sin(angle)
            states.append(torch.stack([angle + 0.2 * speed, speed], dim=1))
        return (torch.stack(states),)

    def loss(self, batch: Batch) -> Tensor:
        (states,) = batch
        state, total = states[0], torch.zeros(())
        for true in states[1:]:
            state = state + self.net(state)
            total = total + F.mse_loss(state, true)
        return total

    def score(self) -> float:
        return float(self.loss(self.draw(0, held_out(), 8)))


@task("hardest_examples", "only the hardest quarter of a batch counts, from step 600 on")
class HardestExamples(Clusters):
    """Online mining of hard examples; some labels are wrong."""

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 32, wrong=0.05)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x, labels = batch
        losses = F.cross_entropy(self.net(x), labels, reduction="none")
        return losses.topk(8).values.mean() if index >= 600 else losses.mean()


@task("loss_weights", "the weight of the boundary of an equation goes 1, 10, 100, 1")
class LossWeights(Healthy):
    """A physics-informed network: u'' = -4 u with u(0) = 0 and u'(0) = 2, so u = sin 2x."""

    learning_rate, steps = 3e-3, 1200

    def build(self) -> None:
        self.net = mlp(1, 1)

    def draw(self, index: int, g: Generator) -> Batch:
        return (3 * uniform(g, 64, 1),)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x = batch[0].requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        origin = torch.zeros(1, 1, requires_grad=True)
        (first,) = torch.autograd.grad(self.net(origin).sum(), origin, create_graph=True)
        boundary = self.net(origin).square().sum() + (first - 2).square().sum()
        return (curvature + 4 * u).square().mean() + (1, 10, 100, 1)[min(index // 300, 3)] * boundary

    def score(self) -> float:
        x = torch.linspace(0, 3, 100)[:, None]
        return float(F.mse_loss(self.net(x), torch.sin(2 * x)))


@task("uneven_micro_batches", "four micro-batches of 1 to 64 examples in a step")
class UnevenMicroBatches(Clusters):
    """Gradient accumulation; the mean of the means is a noisy number."""

    steps = 1000

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 2 ** int(integers(g, 7, 1)), wrong=0.1)

    def trainer_options(self) -> dict[str, Any]:
        return {"accumulate_grad_batches": 4}


@task("accumulation_schedule", "one micro-batch in a step, then two, then four")
class AccumulationSchedule(Clusters):
    """The first micro-batches of an epoch are the hard ones."""

    epoch, steps = 300, 1000

    def draw(self, index: int, g: Generator) -> Batch:
        return clusters(g, 16, spread=1.3 if index < 24 else 0.6)

    def trainer_options(self) -> dict[str, Any]:
        return {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]}
