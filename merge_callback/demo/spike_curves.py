"""The table and the plot of a run that diverged, with the same run restored and an unbroken one."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from merge_callback.demo.curves import GAIN, LIVE, MERGED, RATE

COLORS = (RATE, LIVE, MERGED)
SMOOTH = 25
"""Steps over which the median is drawn, since single batches of text differ more than the models."""


class Drawn(Protocol):
    """The parts of a run that are drawn; see `SpikeRun`."""

    name: str
    losses: list[float]
    learning_rates: list[float]
    validations: list[tuple[int, float]]
    events: list[dict[str, Any]]


def format_spike_table(runs: Sequence[Drawn]) -> str:
    """Formats the validation losses of all runs, one line per validation, and the callback's events."""
    by_step = [dict(run.validations) for run in runs]
    notes = {event["step"]: event["event"] for run in runs for event in run.events}
    widths = [max(9, len(run.name)) for run in runs]
    lines = [f"{'step':>7}  " + "  ".join(f"{run.name:>{w}}" for run, w in zip(runs, widths, strict=True))]
    before = 0
    for step in sorted(by_step[0]):
        losses = [
            f"{b[step]:>{w}.3f}" if step in b else " " * w for b, w in zip(by_step, widths, strict=True)
        ]
        happened = [f"{what} at step {at}" for at, what in notes.items() if before < at <= step]
        lines.append(f"{step:>7}  " + "  ".join(losses) + "".join(f"   {note}" for note in happened))
        before = step
    return "\n".join(["validation loss (nats per byte)", *lines])


def draw_spike(runs: Sequence[Drawn], path: Path) -> None:
    """Draws training loss and applied learning rate of all runs as a PNG."""
    figure = Figure(figsize=(8.0, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(2.6, 1.0))
    for run, color in zip(runs, COLORS, strict=True):
        steps, values = smoothed(run.losses)
        losses.plot(steps, values, color=color, linewidth=1.6, label=run.name)
        rates.plot(range(1, len(run.learning_rates) + 1), run.learning_rates, color=color, linewidth=1.4)
        _mark(losses, run.events)
    losses.set_title("A divergence, and the same one restored by PMA-init", fontsize=12, loc="left")
    losses.set_ylabel(f"training loss\n(nats per byte, median of {SMOOTH})")
    settled = [value for run in runs for value in smoothed(run.losses)[1][len(run.losses) // 8 :]]
    if settled:
        losses.set_ylim(min(settled) - 0.1, max(settled) + 0.1)
    losses.legend(frameon=False, loc="upper right")
    rates.set(ylabel="applied\nlearning rate", xlabel="optimizer step", yscale="log")
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    figure.align_ylabels()
    figure.savefig(path)


def smoothed(losses: Sequence[float], width: int = SMOOTH) -> tuple[list[int], list[float]]:
    """The running median over the last `width` steps, and its steps."""
    ends = range(width, len(losses) + 1)
    return list(ends), [median(losses[end - width : end]) for end in ends]


def _mark(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    for number, event in enumerate(e for e in events if e["event"] == "restore"):
        axes.axvline(
            event["restored_at"],
            color=GAIN,
            linewidth=1.0,
            linestyle="--",
            label=None if number else "restored",
        )
