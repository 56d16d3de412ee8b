"""A training loop of the user's own, as the engine sees it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from merge_callback.engine.charts import Charts
from merge_callback.engine.kept_state import PythonState, kept_weights, put_back, reset_metrics
from merge_callback.engine.random_state import RandomState
from merge_callback.metrics import SPIKE_TEXT
from merge_callback.signals.host import HeldBatch, Host, LossOf, Rehearsal, UnrepeatableStepError

log = logging.getLogger(__name__)

ComputeLoss = Callable[[Any], Tensor | float]


class LoopHost(Host):
    """A training loop of the user's own, as the engine sees it; the arguments are ``CheckpointMerger``'s."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        total_steps: int | None,
        log: Any,
        compute_loss: ComputeLoss | None,
        scaler: GradScaler | None,
        log_every: int,
    ) -> None:
        # Fabric's wrapper holds what DDP or FSDP have made of the model.
        self.root: nn.Module = vars(model).get("_modules", {}).get("_forward_module") or model
        self.module: nn.Module = self.root
        if isinstance(self.root, nn.parallel.DistributedDataParallel):
            self.module = self.root.module
        several = [optimizer] if hasattr(optimizer, "param_groups") else list(optimizer)
        self.optimizers = [_unwrapped(one) for one in several]
        self.device = compute_device(self.root)
        self.scaler, self.log_every = scaler, log_every
        self.default_folder = "merges"
        self.processes = int(
            os.environ.get("LOCAL_WORLD_SIZE") or (dist.get_world_size() if _is_distributed() else 1)
        )
        self.steps_taken, self.should_stop = 0, False
        self.metrics: dict[str, float] = {}
        self.scalars: dict[str, Tensor | float] = {}
        self._total, self._log, self._compute_loss = total_steps, log, compute_loss
        self._charts = Charts()
        self._fabrics = model if model is not self.root else None  # wrapper, which sees to the precision

    @property
    def step(self) -> int:
        """Calls of ``CheckpointMerger.step``, since the run began."""
        return self.steps_taken

    @property
    def total_steps(self) -> int | None:
        """As the user says."""
        return self._total

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands scalars to the user's function or ``SummaryWriter``, on the first rank."""
        self.metrics.update(metrics)
        if self._log is None or not _is_first():
            return
        if hasattr(self._log, "add_scalar"):
            for name, value in metrics.items():
                self._log.add_scalar(name, value, step)
            self._charts.show(self._log, metrics)
        else:
            self._log(dict(metrics), step)

    def expose(self, metrics: Mapping[str, float]) -> None:
        """Keeps scalars in ``CheckpointMerger.metrics``."""
        self.metrics.update(metrics)

    def log_text(self, text: str, step: int) -> None:
        """Shows an event in a ``SummaryWriter``."""
        if hasattr(self._log, "add_text") and _is_first():
            try:
                self._log.add_text(SPIKE_TEXT, text, step)
            except Exception:
                log.exception("merge: %s could not show the event; training goes on", type(self._log))

    def stop(self) -> None:
        """Sets ``CheckpointMerger.should_stop``."""
        self.should_stop = True

    def logged_scalars(self, patterns: Sequence[str]) -> Callable[[], Mapping[str, Tensor | float]]:
        """What ``CheckpointMerger.step`` is handed."""

        def matching() -> dict[str, Tensor | float]:
            return {
                name: value
                for name, value in self.scalars.items()
                if any(fnmatchcase(name, pattern) for pattern in patterns)
            }

        return matching

    def forward_pass(self) -> AbstractContextManager[Callable[..., Any]]:
        """Calls what Fabric has made of the model, or else the model as it is, without autocast."""
        return nullcontext(self._fabrics) if self._fabrics is not None else super().forward_pass()

    def rehearse(self, source: str) -> Rehearsal:
        """Calls ``compute_loss`` again."""
        if source != "batch" or self._compute_loss is None:
            raise UnrepeatableStepError("pass compute_loss= and step(batch=…) to have it computed")
        return self._rehearsed(self._compute_loss)

    @contextmanager
    def _rehearsed(self, compute_loss: ComputeLoss) -> Iterator[LossOf]:
        random, state = RandomState(), PythonState(self.module, self.optimizers)
        with ExitStack() as stack:
            stack.callback(random.restore)
            stack.callback(state.restore)
            stack.enter_context(kept_weights(self.module, self.root, self.spare))
            buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]

            def loss(batches: Sequence[HeldBatch]) -> float:
                if not batches:
                    raise UnrepeatableStepError("no batch of it is left: pass step(batch=…)")
                state.restore()
                for buffer, kept in buffers:
                    put_back(buffer, kept)
                reset_metrics(self.module)
                random.restore()
                losses = [float(compute_loss(held.batch)) for held in batches]
                return math.fsum(losses) / len(losses)

            stack.enter_context(torch.no_grad())
            yield loss


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_first() -> bool:
    return not _is_distributed() or dist.get_rank() == 0


def compute_device(root: nn.Module) -> torch.device:
    """The device that a model computes on. FSDP may keep the shards of its parameters in host memory."""
    if isinstance(device := getattr(root, "compute_device", None), torch.device):  # FSDP 1
        return device
    first = next(root.parameters(), torch.empty(0, device="cpu"))
    kind = getattr(getattr(first, "device_mesh", None), "device_type", first.device.type)
    if kind == first.device.type:
        return first.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _unwrapped(optimizer: Any) -> Optimizer:
    """The ``torch.optim.Optimizer`` inside what Fabric or Accelerate make of one.

    Raises:
        TypeError: if there is none.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: a torch.optim.Optimizer is needed, not a {type(optimizer).__qualname__}")
    return optimizer
