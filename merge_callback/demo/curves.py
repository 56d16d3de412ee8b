"""The demo's picture: losses, gain, diversity and learning rate over the run, with the phases shaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from merge_callback.demo.record import Row

LIVE, MERGED, GAIN, DIVERSITY, RATE = "#0072B2", "#D55E00", "#007A5E", "#8A4F7D", "#444444"
"""After Okabe and Ito, whose palette the colour-blind can tell apart; darkened if it is faint on white."""

SHADES = {"warmup": "#F6EAC8", "stable": "#FFFFFF", "decay": "#DFEAF3"}
PHASE_NAMES = {"warmup": "warm-up", "stable": "stable", "decay": "decay"}

Field = Literal["live_loss", "merged_loss", "gain", "diversity_rms"]


@dataclass(frozen=True)
class Run:
    """What is drawn: a row per validation, a learning rate per step, and the number of tokens per step."""

    rows: Sequence[Row]
    learning_rates: Sequence[float]
    tokens_per_step: int

    def millions(self, step: float) -> float:
        """Converts optimizer steps to millions of tokens."""
        return step * self.tokens_per_step / 1e6

    def phases(self) -> Iterator[tuple[str, float, float]]:
        """Yields each phase with its start and end in millions of tokens.

        A row stands for the steps since the previous row.
        """
        start = 0.0
        for phase, group in groupby(self.rows, key=lambda row: row.phase):
            end = self.millions(list(group)[-1].step)
            if phase is not None:
                yield phase, start, end
            start = end


def draw_curves(run: Run, path: Path) -> None:
    """Draws the run as a PNG."""
    # A figure with its own canvas, since pyplot would set the caller's global backend.
    figure = Figure(figsize=(8.0, 8.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gain, diversity, rate = figure.subplots(4, sharex=True, height_ratios=(2.4, 1.3, 1.3, 0.8))
    _draw_losses(losses, run)
    _draw_gain(gain, run)
    _draw_diversity(diversity, run)
    _draw_learning_rate(rate, run)
    for axes in (losses, gain, diversity, rate):
        _shade_phases(axes, run)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    _name_phases(losses, run)
    figure.align_ylabels()
    figure.savefig(path)


def _draw_losses(axes: Axes, run: Run) -> None:
    _draw_series(axes, run, "live_loss", LIVE, "live weights")
    _draw_series(axes, run, "merged_loss", MERGED, "merged weights")
    axes.set_title("What the merge is worth while training goes on", fontsize=12, loc="left", pad=22)
    axes.set_ylabel("validation loss\n(nats per byte)")
    axes.legend(frameon=False, loc="upper right")
    axes.set_ylim(_loss_limits(run.rows))


def _loss_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Leaves out the fall from the random start, which would flatten the interesting part."""
    top = max(row.live_loss for row in rows[len(rows) // 8 :])
    bottom = min(min(row.live_loss, row.merged_loss or row.live_loss) for row in rows)
    margin = 0.05 * (top - bottom) or 0.05
    return bottom - margin, top + margin


def _draw_gain(axes: Axes, run: Run) -> None:
    axes.axhline(0, color="#888888", linewidth=0.8)
    _draw_series(axes, run, "gain", GAIN)
    axes.set_ylabel("gain\n(nats per byte)")


def _draw_diversity(axes: Axes, run: Run) -> None:
    _draw_series(axes, run, "diversity_rms", DIVERSITY)
    axes.set_ylabel("diversity\n(RMS distance)")
    axes.set_ylim(bottom=0)


def _draw_learning_rate(axes: Axes, run: Run) -> None:
    steps = range(1, len(run.learning_rates) + 1)
    axes.plot([run.millions(step) for step in steps], run.learning_rates, color=RATE, linewidth=1.8)
    axes.set(ylabel="learning rate", xlabel="tokens seen (millions)")
    axes.set_ylim(bottom=0)


def _draw_series(axes: Axes, run: Run, field: Field, color: str, label: str | None = None) -> None:
    points = [(run.millions(row.step), y) for row in run.rows if (y := getattr(row, field)) is not None]
    x, y = zip(*points, strict=True) if points else ((), ())
    axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.margins(y=0.15)


def _shade_phases(axes: Axes, run: Run) -> None:
    for phase, start, end in run.phases():
        axes.axvspan(start, end, color=SHADES[phase], linewidth=0, zorder=0)
    axes.set_xlim(0, run.millions(run.rows[-1].step))


def _name_phases(axes: Axes, run: Run) -> None:
    for phase, start, end in run.phases():
        above = ((start + end) / 2, 1.02)
        axes.annotate(
            PHASE_NAMES[phase], above, xycoords=("data", "axes fraction"), ha="center", color="#555555"
        )
