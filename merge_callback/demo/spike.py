"""The demo of a run that diverges: an excessive learning rate, no qk-norm, no z-loss (arXiv 2309.14322)."""

import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.demo.crops import DemoData
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.processes import cpu_options, new_version, share_cores
from merge_callback.demo.schedule import ExcessiveSchedule
from merge_callback.demo.spike_curves import draw_spike, format_spike_table

RUNS = ("unbroken", "with the callback", "without it")
"""One run keeps the stable learning rate; in the two others the learning rate goes wrong."""


@dataclass(frozen=True)
class SpikePlan:
    """The lengths of a run in optimizer steps, and how it breaks."""

    steps: int = 1800
    warmup: int = 200
    excess: float = 25.0
    excess_from: int = 800
    excess_steps: int = 40
    validate_every: int = 100
    snapshot_every: int = 40

    @classmethod
    def scaled(cls, scale: float) -> "SpikePlan":
        """Scales all lengths by the same factor, except the length of the excess."""
        plan = cls()
        lengths = ("steps", "warmup", "excess_from", "validate_every", "snapshot_every")
        return replace(plan, **{name: max(1, round(getattr(plan, name) * scale)) for name in lengths})

    def schedule(self, broken: bool) -> ExcessiveSchedule:
        """A warm-up, then a constant learning rate that is far too high for a while if `broken`."""
        stable, excess = self.steps - self.warmup, self.excess if broken else 1.0
        return ExcessiveSchedule(
            self.warmup,
            stable,
            0,
            excess=excess,
            excess_from=self.excess_from,
            excess_steps=self.excess_steps,
        )


@dataclass
class SpikeRun:
    """The record of one run: loss and applied learning rate by step, validations, the callback's events."""

    name: str
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The last validation loss, in nats per byte."""
        return self.validations[-1][1]


class RunRecorder(Callback):
    """Fills a `SpikeRun`."""

    def __init__(self, run: SpikeRun, callback: CheckpointMergeCallback | None) -> None:
        self.run, self.callback = run, callback

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Notes the learning rate that this step applies: the schedule's, times the callback's factor."""
        session = self.callback.session if self.callback else None
        factor = session.lr_factor(trainer.global_step) if session else 1.0
        self.run.learning_rates.append(optimizer.param_groups[0]["lr"] * factor)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Notes the loss of the whole batch."""
        # A copy, because the reduction is in place.
        self.run.losses.append(float(trainer.strategy.reduce(outputs["loss"].clone(), reduce_op="mean")))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the validation loss."""
        self.run.validations.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


def train(
    name: str,
    folder: Path,
    plan: SpikePlan,
    callback: CheckpointMergeCallback | None,
    broken: bool = True,
    moe: bool = False,
    seed: int = 0,
    **trainer_options: Any,
) -> SpikeRun:
    """Trains the demo model without qk-norm once.

    Args:
        name: the run's name.
        folder: Lightning's root folder.
        plan: how long to train and how to break the run.
        callback: the callback that merges and restores, if any.
        broken: whether the learning rate goes wrong.
        moe: train the mixture-of-experts variant.
        seed: seed of the initial weights and the batches.
        **trainer_options: further options for the Trainer and its fit.
    """
    seed_everything(seed, verbose=False)
    run = SpikeRun(name)
    callbacks = [
        *([callback] if callback else []),
        RunRecorder(run, callback),
        *trainer_options.pop("callbacks", []),
    ]
    resume_from = trainer_options.pop("ckpt_path", None)
    options = {
        **cpu_options("auto", 1),
        "max_steps": plan.steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        **trainer_options,
    }
    trainer = Trainer(
        gradient_clip_val=1.0,
        val_check_interval=plan.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )
    gpt = GPTConfig(qk_norm=False, experts=4 if moe else 0)
    data = DemoData(seed=seed, epoch_batches=plan.steps)
    trainer.fit(DemoModule(gpt, plan.schedule(broken)), datamodule=data, ckpt_path=resume_from)
    return run


def merging(
    dirpath: Path, plan: SpikePlan, moe: bool, spike: SpikeOptions | None = None
) -> CheckpointMergeCallback:
    """The callback for such a run; it publishes only at the end."""
    return CheckpointMergeCallback(
        every_n_steps=plan.snapshot_every,
        dirpath=dirpath,
        emit_every=0,
        evaluate=False,
        exclude=("*.router_bias",) if moe else (),
        spike=spike,
    )


def read_events(dirpath: Path) -> list[dict[str, Any]]:
    """The events that the callback recorded."""
    record = dirpath / "spikes.jsonl"
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def run_spike_demo(
    output: str | Path = "demo_run",
    plan: SpikePlan | None = None,
    moe: bool = False,
    seed: int = 0,
    strategy: str = "auto",
    devices: int = 1,
) -> list[SpikeRun]:
    """Trains three times; the learning rate breaks two runs, one of which has the callback.

    Prints a table, draws the curves, and returns the runs in the order of `RUNS`.

    Args:
        output: Folder of all demo runs; this one takes a new `version_…` folder in it.
        plan: How long to train and how to break the run.
        moe: Train the mixture-of-experts variant.
        seed: Seed of the initial weights and the training batches.
        strategy: How several processes train together: `auto`, `ddp` or `fsdp2`.
        devices: Number of processes. They split the batches that a single process would train on.

    Raises:
        ValueError: If a batch can't be split evenly over the processes.
    """
    plan = plan or SpikePlan()
    DemoData().check_divisible(devices)
    share_cores(devices)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    folder = Path(TensorBoardLogger(output, name="", version=new_version(output)).log_dir)
    runs = []
    for name in RUNS:
        rank_zero_only(print)(f"\n{name}:")
        logs = _logs_of(name, folder)
        callback = merging(logs / "merges", plan, moe) if name == "with the callback" else None
        runs.append(
            train(
                name,
                logs,
                plan,
                callback,
                broken=name != "unbroken",
                moe=moe,
                seed=seed,
                logger=TensorBoardLogger(folder, name=logs.name, version=""),
                callbacks=[TQDMProgressBar(refresh_rate=25)],
                log_every_n_steps=min(25, plan.validate_every),
                **cpu_options(strategy, devices),
            )
        )
    _show(runs, folder, Path(output))
    return runs


@rank_zero_only
def _show(runs: list[SpikeRun], folder: Path, output: Path) -> None:
    for run in runs:
        run.events = read_events(_logs_of(run.name, folder) / "merges")
    (folder / "runs.json").write_text(json.dumps([asdict(run) for run in runs]) + "\n")
    draw_spike(runs, folder / "spike.png")
    print(_summary(runs, folder, output))


def _logs_of(name: str, folder: Path) -> Path:
    return folder / name.replace(" ", "_")


def _summary(runs: list[SpikeRun], folder: Path, output: Path) -> str:
    unbroken = runs[0].final
    finals = [f"{run.name} {run.final:.3f} ({100 * (run.final / unbroken - 1):+.1f} %)" for run in runs[1:]]
    return "\n".join(
        [
            "",
            format_spike_table(runs),
            "",
            f"final validation loss: unbroken {unbroken:.3f}, " + ", ".join(finals),
            "",
            f"TensorBoard  tensorboard --logdir {output}",
            f"curves       {folder / 'spike.png'}",
            f"events       {folder / 'with_the_callback' / 'merges' / 'spikes.jsonl'}",
        ]
    )
