"""The demo: trains, merges, and shows the gain of the merges."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from merge_callback import CheckpointMergeCallback
from merge_callback.demo.crops import DemoData
from merge_callback.demo.curves import Run, draw_curves
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.processes import cpu_options, new_version, share_cores
from merge_callback.demo.record import Recorder, Row, format_table, write_rows
from merge_callback.demo.schedule import WSDSchedule

MOE = GPTConfig(experts=4)
"""The mixture-of-experts variant."""


@dataclass(frozen=True)
class DemoPlan:
    """The lengths of a demo run, in optimizer steps; the defaults are those of the pilot run."""

    schedule: WSDSchedule = field(default_factory=WSDSchedule)
    validate_every: int = 200
    snapshot_every: int = 40

    @classmethod
    def scaled(cls, scale: float) -> "DemoPlan":
        """Scales all lengths of the pilot run by the same factor."""
        pilot = (200, 4000, 1200, 200, 40)
        warmup, stable, decay, validate, snapshot = (max(1, round(steps * scale)) for steps in pilot)
        return cls(WSDSchedule(warmup, stable, decay), validate, snapshot)


PILOT = DemoPlan()


@dataclass(frozen=True)
class DemoResult:
    """The results of a demo run."""

    rows: list[Row]
    folder: Path

    @property
    def picture(self) -> Path:
        """The curves."""
        return self.folder / "curves.png"

    @property
    def table(self) -> Path:
        """The rows, as JSON."""
        return self.folder / "rows.json"

    @property
    def merges(self) -> Path:
        """The callback's folder."""
        return self.folder / "merges"


def run_demo(
    output: str | Path = "demo_run",
    plan: DemoPlan = PILOT,
    moe: bool = False,
    seed: int = 0,
    storage: str = "auto",
    strategy: str = "auto",
    devices: int = 1,
) -> DemoResult:
    """Trains the demo model with a `CheckpointMergeCallback`, prints the table and draws the curves.

    Args:
        output: Folder of all demo runs; each run takes a new `version_…` folder in it.
        plan: The lengths of the run.
        moe: Train the mixture-of-experts variant.
        seed: Seed of the initial weights and the training batches.
        storage: The callback's storage of its window.
        strategy: How several processes train together: `auto`, `ddp` or `fsdp2`.
        devices: Number of processes. They split the batches that a single process would train on.

    Raises:
        ValueError: If a batch can't be split evenly over the processes.
    """
    data = DemoData(seed=seed, epoch_batches=plan.schedule.steps)
    data.check_divisible(devices)
    share_cores(devices)
    # Lightning 2.6 on torch 2.13 causes it; a reader of the demo can't do anything about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(output, name="", version=new_version(output))
    result = DemoResult([], Path(logger.log_dir))
    recorder = Recorder()
    merging = CheckpointMergeCallback(
        every_n_steps=plan.snapshot_every,
        dirpath=result.merges,
        storage=storage,
        exclude=("*.router_bias",) if moe else (),
    )
    trainer = _make_trainer(plan, logger, [merging, recorder], cpu_options(strategy, devices))
    module = DemoModule(MOE if moe else None, plan.schedule)
    trainer.fit(module, datamodule=data)
    result.rows.extend(recorder.rows)
    if trainer.is_global_zero:
        write_rows(result.rows, result.table)
        tokens_per_step = data.batch_size * data.context
        draw_curves(Run(result.rows, recorder.learning_rates, tokens_per_step), result.picture)
        print(_summary(result, Path(output)))
    return result


def _make_trainer(
    plan: DemoPlan, logger: TensorBoardLogger, callbacks: list[Callback], processes: dict[str, Any]
) -> Trainer:
    checkpoint = ModelCheckpoint(
        Path(logger.log_dir) / "checkpoints", every_n_train_steps=3 * plan.validate_every
    )
    return Trainer(
        max_steps=plan.schedule.steps,
        gradient_clip_val=1.0,
        val_check_interval=plan.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        # Logging or redrawing at every step would cost as much as the model.
        log_every_n_steps=min(25, plan.validate_every),
        logger=logger,
        callbacks=[*callbacks, TQDMProgressBar(refresh_rate=25), checkpoint],
        enable_model_summary=False,
        **processes,
    )


def _summary(result: DemoResult, output: Path) -> str:
    return "\n".join(
        [
            "",
            format_table(result.rows),
            "",
            "gain = live loss - merged loss in nats per byte; diversity = RMS distance between snapshots",
            "",
            f"TensorBoard     tensorboard --logdir {output}",
            f"curves          {result.picture}",
            f"the same rows   {result.table}",
            f"merged weights  {result.merges / 'latest' / 'model.safetensors'}",
        ]
    )
