"""The demo's model on the demo's text, with merges that are validated, in the stable phase and the decay."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.gpu_check.checks import Outcome, Section
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import folder, quiet
from benchmarks.record import QUIET
from merge_callback import CheckpointMergeCallback
from merge_callback.demo import DemoData, DemoModule, WSDSchedule

SECTION = Section("demo", 60)


class Validations(Callback):
    """The live and the merged loss of each validation."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        if "merged/val_loss" in metrics:
            live, merged = float(metrics["val_loss"]), float(metrics["merged/val_loss"])
            self.losses.append((trainer.global_step, live, merged))


@SECTION.check(
    "the demo's fit", "merges before the decay score better than the live weights, in the mean", 15
)
def demo(machine: Machine) -> Outcome:
    schedule = WSDSchedule(2, 12, 4) if machine.is_dry else WSDSchedule(100, 1100, 300)
    every, snapshots = (6, 2) if machine.is_dry else (200, 20)
    seed_everything(0, verbose=False)
    validations = Validations()
    with folder() as path, quiet():
        merging = CheckpointMergeCallback(every_n_steps=snapshots, dirpath=path)
        given = {**machine.trainer(), **QUIET, "num_sanity_val_steps": 0, "max_steps": schedule.steps}
        if machine.is_dry:
            given["limit_val_batches"] = 1
        trainer = Trainer(
            **given,
            callbacks=[merging, validations],
            gradient_clip_val=1.0,
            val_check_interval=every,
            check_val_every_n_epoch=None,
        )
        few: dict[str, Any] = {"batch_size": 2} if machine.is_dry else {}
        data = DemoData(seed=0, epoch_batches=schedule.steps, **few)
        trainer.fit(DemoModule(schedule=schedule), datamodule=data)
        assert (path / "latest" / "model.safetensors").exists(), "nothing was published"
    begins = schedule.steps - schedule.decay
    gains = [live - merged for step, live, merged in validations.losses if every < step <= begins]
    assert gains, f"merges were validated at {validations.losses}"
    assert all(torch.tensor(validations.losses).isfinite().flatten()), f"{validations.losses}"
    told = "; ".join(f"{step}: {live:.3f} / {merged:.3f}" for step, live, merged in validations.losses)
    return Outcome(f"live / merged {told}", machine.is_dry or sum(gains) > 0, {"losses": validations.losses})
