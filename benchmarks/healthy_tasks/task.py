"""What a healthy task is, and the register of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, ...]


class Healthy(LightningModule, ABC):
    """A module with its own data, loss and final score. Subclasses say what is difficult about them.

    Class attributes are the options of a task: ``task`` sets them by keyword for a variant.
    """

    steps = 1500
    """Batches of the run."""
    epoch = 0
    """Batches of an epoch, each epoch the same ones; 0 means that no batch comes twice."""
    learning_rate = 1e-3
    seed = 0
    """Of the data."""
    loss: Callable[[Any], Tensor]
    """The training loss of a batch; a task with a training step of its own has none."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            if not hasattr(type(self), name):
                raise ValueError(f"{type(self).__name__} has no option {name!r}")
            setattr(self, name, value)
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Makes the networks."""

    @abstractmethod
    def draw(self, index: int, g: Generator) -> Batch:
        """The batch of this index, with the generator that belongs to it."""

    @abstractmethod
    def score(self) -> float:
        """How good the module is, on data it was not trained on; lower is better."""

    def trainer_options(self) -> dict[str, Any]:
        """What the Trainer needs beside the number of steps."""
        return {}

    def callback_options(self) -> dict[str, Any]:
        """What the callback can't do without for this task."""
        return {}

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(Draws(self), batch_size=None)

    def training_step(self, batch: Batch, index: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Draws(Dataset[Batch]):
    """The batches of a task, each a function of its index."""

    def __init__(self, module: Healthy) -> None:
        self.module = module

    def __len__(self) -> int:
        return self.module.epoch or self.module.steps * 8  # more than any run takes

    def __getitem__(self, index: int) -> Batch:
        return self.module.draw(index, Generator().manual_seed(1_000_003 * (self.module.seed + 1) + index))


@dataclass(frozen=True)
class Task:
    """One entry of the register."""

    name: str
    hard: str
    kind: type[Healthy]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> Healthy:
        """The module, with weights from the global random state."""
        return self.kind(seed=seed, **self.options)


TASKS: dict[str, Task] = {}

_Kind = TypeVar("_Kind", bound=type[Healthy])


def task(name: str, hard: str, /, **options: Any) -> Callable[[_Kind], _Kind]:
    """Registers a class as a task.

    Args:
        name: of the task.
        hard: what is difficult about its loss.
        options: attributes of the class that this task sets.
    """

    def register(kind: _Kind) -> _Kind:
        if name in TASKS:
            raise ValueError(f"there are two tasks {name!r}")
        TASKS[name] = Task(name, hard, kind, options)
        return kind

    return register


def mlp(inputs: int, outputs: int, width: int = 32) -> nn.Sequential:
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def held_out() -> Generator:
    """For data that no task trains on."""
    return Generator().manual_seed(77)
