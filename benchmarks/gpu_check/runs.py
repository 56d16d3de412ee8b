"""Small fits whose forward and backward passes are deterministic on a GPU."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from benchmarks.gpu_check.machines import Machine
from benchmarks.record import QUIET

CLASSES = 10


class Classifier(LightningModule):
    """Residual layers on random features.

    Args:
        width: of the layers.
        layers: how many.
        norm: ``nn.BatchNorm1d`` has buffers that a forward pass writes to.
        optimizer: makes it, of the parameters.
        poison: steps whose loss is NaN.
        shows: logs the loss to the progress bar.
        compiled: the mode of ``torch.compile``; ``None`` without.
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        optimizer: Callable[[Any], Optimizer] = AdamW,
        poison: tuple[int, ...] = (),
        shows: bool = False,
        compiled: str | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        parts = [[norm(width), nn.Linear(width, width), nn.GELU()] for _ in range(layers)]
        self.net = nn.Sequential(*[part for layer in parts for part in layer], nn.Linear(width, CLASSES))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.optimizer, self.poison, self.shows, self.compiled = optimizer, poison, shows, compiled
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        if self.compiled and not hasattr(self.net, "_orig_mod"):
            self.net = torch.compile(self.net, **COMPILATION[self.compiled])  # type: ignore[assignment]

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.global_step in self.poison:
            loss = loss * torch.nan
        if self.shows:
            self.log("train_loss", loss.detach(), prog_bar=True)
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


COMPILATION: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "dry": {"backend": "eager"},
}


def fused(parameters: Any) -> Optimizer:
    """AdamW in one kernel."""
    return AdamW(parameters, lr=1e-3, fused=True)


@dataclass
class Fit:
    """What a fit ended with, on the host: its losses and its weights."""

    module: LightningModule
    losses: list[float]
    weights: dict[str, Tensor]


def fit(
    machine: Machine,
    *callbacks: Callback,
    module: Callable[[], LightningModule] = Classifier,
    steps: int = 24,
    width: int = 64,
    batch: int = 16,
    validates: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Fit:
    """Trains. On a pretended GPU this has to be within ``machine.trains()``."""
    made = module()
    made = machine.put(made)  # type: ignore[assignment]
    given = {**machine.trainer(), **QUIET, "num_sanity_val_steps": 0, "max_steps": steps, **options}
    trainer = Trainer(**given, callbacks=list(callbacks))
    accumulated = options.get("accumulate_grad_batches", 1)
    with quiet():
        trainer.fit(
            made,
            batches(steps * accumulated, batch, width, 1),
            batches(2, batch, width, 2) if validates else None,
            ckpt_path=ckpt_path,
        )
    machine.synchronize()
    losses = [float(loss) for loss in getattr(made, "losses", [])]
    return Fit(made, losses, weights_of(made))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights in host memory, under the names of the module that nobody has compiled."""
    return {name.replace("_orig_mod.", ""): plain(tensor) for name, tensor in module.state_dict().items()}


def plain(tensor: Tensor) -> Tensor:
    """A copy in host memory; none of one on a pretended GPU is noted as a wait."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().cpu().clone().as_subclass(Tensor)


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The name of a tensor that is not the same, bit for bit; empty if all are."""
    names = (n for n, tensor in expected.items() if n not in found or not torch.equal(found[n], tensor))
    return next(names, "")


def batches(count: int, size: int, width: int, seed: int) -> DataLoader[list[Tensor]]:
    """So many batches, of which every ninth is the first one again; they are made beforehand."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        [
            torch.randn(size, width, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        ]
        for _ in range(min(8, count))
    ]
    return DataLoader([made[i % 8] for i in range(count)], batch_size=None)  # type: ignore[arg-type]


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for a run, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        yield Path(name)


@contextmanager
def deterministic() -> Iterator[None]:
    """Within, an operation that is not deterministic raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, Lightning says nothing that is no error."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
