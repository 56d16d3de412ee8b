"""The table that the demo prints at its end: one row of numbers per validation."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from merge_callback.metrics import DIVERSITY_CHANGE, DIVERSITY_RMS, GAIN, MERGED, PHASE, TOKENS, WINDOW

PHASES = ("warmup", "stable", "decay")
"""Names of the codes that the callback logs as `merge/phase`."""

NOTHING = "–"  # noqa: RUF001 (tables show a dash for a missing value)

HEADINGS = ("tokens", "phase", "LR", "live loss", "merged loss", "gain", "diversity")


@dataclass(frozen=True)
class Row:
    """One validation; None for values that do not exist yet. Losses are in nats per byte."""

    step: int
    tokens: int | None
    phase: str | None
    learning_rate: float
    live_loss: float
    merged_loss: float | None
    gain: float | None
    diversity_rms: float | None
    diversity_change: float | None
    snapshots: int | None


class Recorder(Callback):
    """Keeps a row per validation and the learning rate of every step.

    It must come after the `CheckpointMergeCallback`, which writes `merged/…` in the same hook.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.learning_rates: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Notes the rate that this step applies, before the scheduler changes it."""
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds a row."""
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        tokens, phase = metrics.get(TOKENS), metrics.get(PHASE)
        gain = metrics.get(f"{GAIN}val_loss")
        row = Row(
            step=trainer.global_step,
            tokens=None if tokens is None else int(tokens),
            phase=None if phase is None else PHASES[int(phase)],
            learning_rate=self.learning_rates[-1],
            live_loss=metrics["val_loss"],
            # Before there is a merge, the callback repeats the live loss here, so a monitor finds its key.
            merged_loss=None if gain is None else metrics[f"{MERGED}val_loss"],
            gain=gain,
            diversity_rms=metrics.get(DIVERSITY_RMS),
            diversity_change=metrics.get(DIVERSITY_CHANGE),
            snapshots=int(metrics.get(WINDOW, 0)),
        )
        self.rows.append(row)


def format_table(rows: Sequence[Row], limit: int = 30) -> str:
    """Formats rows as a table; of more than `limit` rows, every second, third, … up to the last."""
    every = max(1, math.ceil(len(rows) / limit))
    shown = [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % every == 0]
    cells = [HEADINGS, *(_cells(row) for row in shown)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        _cell(None if row.tokens is None else row.tokens / 1e6, ".2f", " M"),
        row.phase or NOTHING,
        _cell(row.learning_rate, ".1e"),
        _cell(row.live_loss, ".3f"),
        _cell(row.merged_loss, ".3f"),
        _cell(row.gain, "+.3f"),
        _cell(row.diversity_rms, ".4f"),
    )


def _cell(value: float | None, spec: str, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:{spec}}{unit}"


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes all rows as a JSON list of objects."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
