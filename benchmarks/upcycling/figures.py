"""The study's pictures, drawn from its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.upcycling.findings import NAMES
from benchmarks.upcycling.model import mean

COLOURS = ("#0072B2", "#D55E00", "#007A5E", "#8A4F7D", "#444444")
"""After Okabe and Ito, whose palette the colour-blind can tell apart; darkened if it is faint on white."""

Panel = Callable[[Axes, dict[str, Any]], None]


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the record has the figures for; returns the files."""
    pictures: dict[str, Sequence[Panel]] = {
        "upcycling_merges": (_full, _lora, _moerged),
        "upcycling_hard": (_forgotten, _loss, _left_out),
        "upcycling_training": (_ranks, _stopped_full, _stopped_lora),
    }
    return [
        _draw(record, finished, folder / f"{name}.png")
        for name, panels in pictures.items()
        if (finished := [panel for panel in panels if _is_finished(panel, record)])
    ]


def _is_finished(panel: Panel, record: dict[str, Any]) -> bool:
    try:
        panel(Figure().subplots(), record)
    except KeyError:
        return False
    return True


def _draw(record: dict[str, Any], panels: Sequence[Panel], path: Path) -> Path:
    # A figure with its own canvas, since pyplot would set the caller's global backend.
    figure = Figure(figsize=(4.6 * len(panels), 3.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        panel(axes, record)
    figure.savefig(path)
    return path


def _line(axes: Axes, curve: dict[str, list[float]], label: str, colour: str, style: str = "-o") -> None:
    """The mean over the seeds by step, and a band from the least to the greatest of them."""
    steps = [int(step) for step in curve]
    axes.plot(steps, [mean(v) for v in curve.values()], style, color=colour, label=label, markersize=3.5)
    least, most = [min(v) for v in curve.values()], [max(v) for v in curve.values()]
    axes.fill_between(steps, least, most, color=colour, alpha=0.15, linewidth=0)


def _steps(axes: Axes, title: str, y: str = "test accuracy, mean of the tasks [%]") -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_title(title)
    axes.set_xlabel("steps of each expert")
    axes.set_ylabel(y)
    axes.legend(fontsize=7.5, frameon=False)


def _merges(axes: Axes, record: dict[str, Any], kind: str, title: str) -> None:
    curve = record[f"merges/{kind}"]
    for (method, name), colour in zip(NAMES.items(), COLOURS, strict=True):
        style = "--" if method == "experts" else "-o"
        label = "experts, each on its task" if method == "experts" else name
        _line(axes, {step: at[method] for step, at in curve.items()}, label, colour, style)
    axes.axhline(mean(record["base"]), color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate("base", (2, mean(record["base"])), fontsize=8, color="#777777", va="bottom")
    _steps(axes, title)


def _full(axes: Axes, record: dict[str, Any]) -> None:
    _merges(axes, record, "full", "Merges, full fine-tuning")


def _lora(axes: Axes, record: dict[str, Any]) -> None:
    rank = record["study"]["rank"]
    _merges(axes, record, f"lora{rank}", f"Merges, LoRA of rank {rank}")


def _moerged(axes: Axes, record: dict[str, Any]) -> None:
    found = {step: scores for step, scores in record["moerged"].items() if step.isdigit()}
    for state, colour in zip(("trained", "by_arrow"), COLOURS, strict=False):
        label = "after training on the mixture" if state == "trained" else "by Arrow, not trained"
        _line(axes, {step: scores[state] for step, scores in found.items()}, label, colour)
    _steps(axes, "MoErged models")


def _forgotten(axes: Axes, record: dict[str, Any]) -> None:
    lost, last = record["bins"]["forgotten"], str(record["study"]["last"])
    for (method, steps), colour in zip(lost.items(), COLOURS, strict=False):
        axes.plot(
            range(1, 11),
            [mean(v) for v in steps[last]],
            "-o",
            color=colour,
            label=NAMES[method],
            markersize=3.5,
        )
    axes.set_title(f"Forgotten when experts of {last} steps are merged")
    _bins(axes, "share of the forgotten examples [%]")


def _bins(axes: Axes, y: str) -> None:
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("bin of EL2N, 10 is the hardest")
    axes.set_ylabel(y)
    axes.set_ylim(0)
    axes.legend(fontsize=8, frameon=False)


def _loss(axes: Axes, record: dict[str, Any]) -> None:
    shares = record["bins"]["loss"]
    for number, label, colour in (
        (9, "hardest 10 %", COLOURS[1]),
        (8, "next 10 %", COLOURS[3]),
        (0, "easiest 10 %", COLOURS[0]),
    ):
        _line(axes, {step: bins[number] for step, bins in shares.items()}, label, colour)
    axes.set_ylim(0)
    _steps(axes, "What the training loss consists of", "share of the training loss [%]")


def _left_out(axes: Axes, record: dict[str, Any]) -> None:
    curves = {"0": record["merges/full"], **record["left_out"]}
    steps = list(next(iter(record["left_out"].values())))
    for (share, curve), colour in zip(curves.items(), COLOURS[::-1], strict=False):
        label = f"without the hardest {100 * float(share):.0f} %" if float(share) else "all examples"
        _line(axes, {step: curve[step]["task_arithmetic"] for step in steps}, label, colour)
    _steps(axes, "Hard examples left out, task arithmetic")


def _ranks(axes: Axes, record: dict[str, Any]) -> None:
    for rank, colour in zip(sorted(record["study"]["ranks"]), COLOURS, strict=False):
        curve = record[f"merges/lora{rank}"]
        _line(axes, {step: at["ties"] for step, at in curve.items()}, f"rank {rank}", colour)
    _steps(axes, "TIES merges of LoRA experts, by rank")


def _stopped(axes: Axes, record: dict[str, Any], kind: str, title: str) -> None:
    """Each rule's merges, over the mean of the steps at which its experts stopped."""
    curve = record[f"merges/{kind}"]
    _line(
        axes, {step: at["task_arithmetic"] for step, at in curve.items()}, "all experts of s steps", "#999999"
    )
    rules = {
        "v0": "v0",
        "v1": "v1",
        "adaptive": "adaptive decay",
        "merged": "merged/val_acc, looks as v1",
        "merged_own": "the same, own task",
        "merged_v0": "merged/val_acc, looks as v0",
    }
    for (rule, label), colour, mark in zip(rules.items(), (*COLOURS, "#B8860B"), "s^Dv*P", strict=True):
        found = record[f"stopped/{kind}"][rule]
        at = mean([mean(each) for each in found["steps"]])
        axes.plot(at, mean(found["task_arithmetic"]), mark, color=colour, label=label, markersize=8)
    _steps(axes, title)


def _stopped_full(axes: Axes, record: dict[str, Any]) -> None:
    _stopped(axes, record, "full", "Stopping early, full fine-tuning, task arithmetic")


def _stopped_lora(axes: Axes, record: dict[str, Any]) -> None:
    _stopped(axes, record, f"lora{record['study']['rank']}", "Stopping early, LoRA, task arithmetic")
