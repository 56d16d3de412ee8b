"""One run: a small GPT with a cause that breaks it, and what is noted of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.record import QUIET
from benchmarks.spike_guard.causes import Cause
from benchmarks.spike_guard.plan import PLAN, Record
from merge_callback import CheckpointMergeCallback, SpikeOptions, TrainingDivergedError
from merge_callback.demo.crops import Batch, DemoData
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.demo.spike import read_events


@dataclass
class Run:
    """What one run was like, from the trunk on."""

    losses: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0
    """Of processor time, in all threads."""

    @property
    def final(self) -> float:
        """The mean of the last validations; infinite where the run did not get there with finite weights."""
        if self.stopped or not all(map(math.isfinite, self.validations)):
            return math.inf
        return statistics.fmean(self.validations)

    @property
    def restores(self) -> list[Record]:
        """The restores among the events."""
        return [event for event in self.events if event["event"] == "restore"]


class BreakingModule(DemoModule):
    """The demo's module with a cause; it logs nothing, which saves a tenth of the time."""

    def __init__(self, gpt: GPTConfig, schedule: WSDSchedule, cause: Cause | None) -> None:
        super().__init__(gpt, schedule)
        self.cause = cause
        self.before: Tensor | None = None

    @property
    def active(self) -> Cause | None:
        """The cause, while it lasts."""
        return self.cause if self.cause and self.cause.is_on(self.trainer.global_step) else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._mean_loss(self.active.batch(batch, self.trainer.global_step) if self.active else batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        configured = super().configure_optimizers()
        scheduler = LambdaLR(configured["optimizer"], self._factor)
        return {
            "optimizer": configured["optimizer"],
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.active:
            self.active.gradients(self, self.trainer.global_step)
        if not self.active or self.active.clips():
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        active = self.active  # the step counts while it is taken
        with torch.no_grad():
            before = parameters_to_vector(self.parameters()) if active and active.remembers else None
        super().optimizer_step(*args, **kwargs)
        if active:
            with torch.no_grad():
                active.weights(self, before)

    def _factor(self, step: int) -> float:
        factor = self.schedule.factor(step)
        return factor * self.cause.learning_rate(step) if self.cause and self.cause.is_on(step) else factor


class Recorder(Callback):
    """Fills a `Run`, and ends the cause once the run is restored."""

    def __init__(self, run: Run, cause: Cause | None, folder: Path) -> None:
        self.run, self.cause, self.folder = run, cause, folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.run.losses.append(float(outputs["loss"]))
        if self.cause and self.cause.mends and not self.cause.ended:
            self.cause.ended = any(event["event"] == "restore" for event in read_events(self.folder))
            if self.cause.ended:  # the scheduler has set the next step's rate already
                for group in trainer.optimizers[0].param_groups:
                    factor = pl_module.schedule.factor(trainer.global_step)  # type: ignore[operator]
                    group["lr"] = pl_module.learning_rate * factor
        if trainer.global_step in PLAN.validations:
            self.run.validations.append(validation_loss(trainer, pl_module))


@torch.no_grad()
def validation_loss(trainer: Trainer, module: Any) -> float:
    """The mean loss on the held-out crops: without Lightning's loop, which takes as long as 20 steps."""
    module.eval()
    batches = list(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
    joined: Batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}  # type: ignore
    loss = float(module._mean_loss(joined))
    module.train()
    return loss


def train(
    model: str,
    seed: int,
    folder: Path,
    spike: SpikeOptions,
    cause: Cause | None = None,
    resume_from: Path | None = None,
    callbacks: Sequence[Callback] = (),
    steps: int = PLAN.steps,
) -> Run:
    """Trains once, from the beginning or from the checkpoint, with the merge callback in ``folder``."""
    seed_everything(seed, verbose=False)
    start, run = time.process_time(), Run()
    moe = model == "moe"
    merging = CheckpointMergeCallback(
        window=PLAN.window,
        every_n_steps=PLAN.every,
        dirpath=folder,
        emit_every=0,
        evaluate=False,
        exclude=("*.router_bias",) if moe else (),
        spike=spike,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[merging, Recorder(run, cause, folder), *callbacks],
        **QUIET,
    )
    gpt = GPTConfig(context=PLAN.context, width=PLAN.width, layers=2, qk_norm=False, experts=4 if moe else 0)
    module = BreakingModule(gpt, WSDSchedule(PLAN.warmup, PLAN.steps, 0), cause)
    data = DemoData(PLAN.batch_size, PLAN.context, seed, PLAN.steps, PLAN.validation_batches)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    except TrainingDivergedError:
        run.stopped = True
    run.events = read_events(folder)
    run.seconds = time.process_time() - start
    return run


def brief(run: Run) -> str:
    """The events of a run in one line."""
    said = [
        f"{e['event']}({e['onset']}, {e.get('restored_at', e['step'])})"
        for e in run.events
        if e["event"] != "drift"
    ]
    return " ".join(said) + (" stopped" if run.stopped else "")
