"""Modules whose validation does what real ones do: keeps state, draws numbers, steps schedulers."""

import math
import random
from collections import Counter

import numpy as np
import torch
from torch import nn
from torchmetrics import MeanMetric, Metric, MetricCollection, MetricTracker
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running
from training_runs import (
    Classifier,
)


class Scored(Classifier):
    """Logs a metric object in training and in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.train_acc, self.val_acc = MulticlassAccuracy(4), MulticlassAccuracy(4)

    def training_step(self, batch, batch_idx):
        self.train_acc(self(batch[0]), batch[1])
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.val_acc(self(batch[0]), batch[1])
        self.log("val_acc", self.val_acc)


class Collected(Scored):
    """Collections whose metrics share their states; the first one is updated in training as well."""

    def __init__(self) -> None:
        super().__init__()
        parts = {
            "precision": MulticlassPrecision(4),
            "recall": MulticlassRecall(4),
            "f1": MulticlassF1Score(4),
        }
        self.shared = MetricCollection(parts, prefix="both/")
        self.scores = self.shared.clone(prefix="val/")

    def training_step(self, batch, batch_idx):
        self.shared.update(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.shared.compute())
        self.shared.reset()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.scores.update(self(batch[0]), batch[1])
        self.log_dict(self.scores)


class Ranked(Scored):
    """A metric that keeps lists, one of them in use over the whole run."""

    def __init__(self) -> None:
        super().__init__()
        self.val_auroc, self.ever = MulticlassAUROC(4), CatMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.ever.update(loss.detach())
        self.log("ever", self.ever.compute().sum())
        return loss

    def validation_step(self, batch, batch_idx):
        self.val_auroc(self(batch[0]).softmax(1), batch[1])
        self.log("val_auroc", self.val_auroc)
        self.ever.update(self.loss(batch))
        self.log("ever_in_validation", self.ever.compute().sum())


class Wrapped(Scored):
    """Wrappers around metrics that keep lists; training updates them across validations."""

    def __init__(self) -> None:
        super().__init__()
        self.classwise = ClasswiseWrapper(MulticlassAUROC(4, average=None))
        self.extremes, self.recent = MinMaxMetric(CatSum()), Running(MeanMetric(), window=3)
        self.composed = MeanMetric() + CatSum()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.see(batch, loss)
        self.log("composed", self.composed.compute())
        self.log_dict({f"extremes_{k}": v for k, v in self.extremes.compute().items()})
        self.log("recent", self.recent.compute())
        return loss

    def see(self, batch, loss) -> None:
        self.classwise.update(self(batch[0]).softmax(1), batch[1])
        for metric in (self.composed, self.extremes, self.recent):
            metric.update(loss.detach())

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.classwise.compute())

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.see(batch, self.loss(batch))


class CatSum(Metric):
    """A sum that keeps all of its terms."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("terms", [], dist_reduce_fx="cat")

    def update(self, value) -> None:
        self.terms.append(value)

    def compute(self):
        return torch.stack(self.terms).sum()


class Tracked(Classifier):
    """Keeps the metric of every validation, and logs the best."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = MetricTracker(MulticlassAccuracy(4))

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.tracker.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val_best", float(self.tracker.best_metric()))

    def on_train_epoch_end(self) -> None:
        self.log("validations", float(self.tracker.n_steps))


class TwoLoaders(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))
        self.log(f"alone_{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)


class Combined(Classifier):
    """Batches of a CombinedLoader: a dictionary, in which an exhausted loader gives None."""

    def validation_step(self, batch, batch_idx):
        losses = [self.loss(part) for part in batch.values() if part is not None]
        self.log("val_loss", torch.stack(losses).mean(), batch_size=1)


class Forked(Classifier):
    """Logs in every way there is."""

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("val_last", loss, on_step=True, on_epoch=False)
        self.log("val_worst", loss, reduce_fx="max")
        self.log("val_quiet", loss, logger=False)

    def on_validation_epoch_end(self) -> None:
        self.log("val_twice", self.trainer.callback_metrics["val_loss"] * 2)


class Rolling(Classifier):
    """Draws from every random generator, in training and in validation, where dropout stays on."""

    def roll(self, batch):
        self.net.train()
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return self.loss(batch) + noise

    def training_step(self, batch, batch_idx):
        return self.roll(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.roll(batch))


class BatchIterating(Classifier):
    def validation_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss(batch), batch_size=1)


class Forces(Classifier):
    """Needs gradients in validation, as models of forces do."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            (force,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            self.log("val_force_error", force.square().mean())


class Normed(Classifier):
    """A batch norm that is in evaluation mode in training, and in training mode in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.moving = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(8), persistent=False)

    def forward(self, x):
        return self.net(self.moving(self.frozen(x)) + self.cache)

    def training_step(self, batch, batch_idx):
        assert self.training
        self.frozen.eval()
        assert self.moving.training
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert not self.training
        assert not self.frozen.training
        self.moving.train()
        self.seen += 1
        self.cache.add_(0.01)
        super().validation_step(batch, batch_idx)


class Reassigning(Classifier):
    """Counts its validations in buffers that it replaces rather than writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)

    def training_step(self, batch, batch_idx):
        late = 0 if self.late is None else self.late
        return super().training_step(batch, batch_idx) * (1 + self.seen + self.cache + late)

    def validation_step(self, batch, batch_idx):
        self.seen = self.seen + 0.01
        self.cache = self.cache + 0.01
        self.late = torch.zeros(()) if self.late is None else self.late + 0.01
        super().validation_step(batch, batch_idx)


class Remembering(Classifier):
    """Keeps plain attributes from the start of a validation to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.validations, self.best = 0, math.inf

    def on_validation_start(self) -> None:
        self.total = 0.0

    def validation_step(self, batch, batch_idx):
        self.losses.append(self.loss(batch))
        self.total += float(self.losses[-1])
        self.log("val_loss", self.losses[-1])

    def on_validation_epoch_end(self) -> None:
        self.validations += 1
        self.best = min(self.best, float(torch.stack(self.losses).mean()))
        self.losses.clear()

    def on_validation_end(self) -> None:
        del self.total

    def on_train_epoch_end(self) -> None:
        self.log("validations", float(self.validations))
        self.log("best", self.best)


class Diffusing(Classifier):
    """Owns generators, from which training and validation draw."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)
        self.numpy, self.python = np.random.default_rng(1), random.Random(1)
        self.legacy = np.random.RandomState(1)

    def loss(self, batch):
        noise = torch.rand((), generator=self.noise) + self.numpy.random() + self.python.random()
        return super().loss(batch) * (1 + 0.1 * noise + 0.1 * self.legacy.rand())


class Refusing(dict):
    """A dictionary that can't be updated, such as the outputs of Hugging Face's models."""

    def update(self, *args, **kwargs):
        raise TypeError("this is read only")


class Holding(Classifier):
    """Holds hyperparameters, its last output, and views whose elements share memory."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weights = torch.ones(1).expand(4)
        self.output, self.validations = Refusing(), [0]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * (1 + self.validations[0] / 100)
        self.output = Refusing(loss=loss.detach() * self.weights)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.output = Refusing(loss=self.loss(batch))
        self.validations[0] += 1
        self.hparams.width *= 2
        self.log("width", self.hparams.width, reduce_fx="max")


class OwnAverage(Classifier):
    """Validates a moving average of its weights, which it swaps in and out itself."""

    def __init__(self) -> None:
        super().__init__()
        self.average = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *_) -> None:
        for average, parameter in zip(self.average, self.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.5)

    def on_validation_start(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters()]
        self.load(self.average)

    def on_validation_end(self) -> None:
        self.load(self.kept)

    @torch.no_grad()
    def load(self, weights) -> None:
        for parameter, weight in zip(self.parameters(), weights, strict=True):
            parameter.copy_(weight)


class OwnSchedule(Classifier):
    """Steps its scheduler by hand on what it validates, as in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.optimizers().step()
        self.log("train_loss", loss)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "fit":
            self.lr_schedulers().step(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        # Each call without a record halves the rate, and no loss above 0 is one.
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=1.0
        )
        return [optimizer], [scheduler]


class Impatient(Classifier):
    """Stops the run itself when it is asked to validate twice at one step."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: Counter = Counter()

    def on_validation_epoch_end(self) -> None:
        self.rounds[self.trainer.global_step] += 1
        if self.rounds[self.trainer.global_step] == 2:
            self.trainer.should_stop = True


class OwnLogging(Classifier):
    """Writes to its logger itself."""

    def on_validation_epoch_end(self) -> None:
        self.logger.log_metrics({"own": float(self.net[0].weight.sum())}, step=0)


class OwnAxis(Classifier):
    """Logs over its own axis: Lightning takes a metric named ``step`` for the logger's step."""

    def on_validation_epoch_end(self) -> None:
        self.log("step", 100.0 + self.trainer.current_epoch)
