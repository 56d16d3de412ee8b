"""How functional diversity goes with the learning rate in the demo's training, and what it costs.

Trains the demo once with ``probe="validation"`` and draws RMS and functional diversity under the learning
rate ("Practical Guidelines", Fig. 9). Then times the probe beside a training step: of the demo's model, of
one of 124 million parameters, and of one of 20,000 tensors, in seconds of the thread's own, since others may
use the machine. Writes ``results/functional_diversity.json`` and ``.png``; ``--costs`` only times again::

    python benchmarks/functional_diversity.py [--costs]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from record import QUIET, RESULTS, write
from torch import Tensor, nn

from merge_callback import CheckpointMergeCallback, CheckpointMerger
from merge_callback.demo.crops import DemoData
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.engine.probe import Probe

EVERY = 40
MEASURES = {
    "rms": ("RMS distance of the weights", "#8A4F7D"),
    "logits": ("cosine distance of the logits", "#0072B2"),
    "probabilities": ("KL divergence of the probabilities (nats)", "#D55E00"),
    "activations": ("cosine distance of the activations", "#007A5E"),
}


class Curves(Logger):
    """Keeps what is logged at snapshots, by step."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keeps none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps those of the merging."""
        found = {name.removeprefix("merge/"): v for name, v in metrics.items() if name.startswith("merge/")}
        if "diversity_rms" in found and step is not None:
            self.rows[step + 1] = found


@contextmanager
def timed(kind: type, *names: str) -> Iterator[dict[str, list[float]]]:
    """Yields the seconds of every call of some methods of a class, in this context."""
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def timing(name: str, present: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        try:
            return present(*args)
        finally:
            seconds[name].append(time.thread_time() - start)

    kept = {name: getattr(kind, name) for name in names}
    for name, present in kept.items():
        bound = partial(timing, name, present)
        setattr(kind, name, lambda *args, bound=bound: bound(*args))
    try:
        yield seconds
    finally:
        for name, present in kept.items():
            setattr(kind, name, present)


def milliseconds(seconds: Sequence[float]) -> float:
    """The median, which a compilation or a first allocation does not move."""
    return round(1e3 * statistics.median(seconds), 3)


def demo(folder: Path) -> dict[str, Any]:
    """The demo's training with the probe: all snapshots, and what the probe took."""
    seed_everything(0, verbose=False)
    schedule, curves = WSDSchedule(), Curves()
    callback = CheckpointMergeCallback(
        every_n_steps=EVERY, dirpath=folder, emit_every=0, evaluate=False, probe="validation"
    )
    trainer = Trainer(
        **{**QUIET, "logger": curves},
        max_steps=schedule.steps,
        gradient_clip_val=1.0,
        val_check_interval=schedule.steps,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        log_every_n_steps=10**9,
        callbacks=[callback],
        accelerator="cpu",
        devices=1,
    )
    with timed(Probe, "run") as seconds:
        start = time.thread_time()
        trainer.fit(DemoModule(schedule=schedule), datamodule=DemoData(epoch_batches=schedule.steps))
        whole = time.thread_time() - start
    rows = [
        {"step": step, **{name: row[name] for name in ("lr_ratio", "phase")}}
        | {name: row.get(f"diversity_{name}") for name in MEASURES}
        for step, row in sorted(curves.rows.items())
    ]
    return {
        "stall_share": round(sum(seconds["run"]) / whole, 5),
        "changes": changes(rows),
        "snapshots": rows,
    }


def changes(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Each measure at the end, and its median in the decay, as shares of its median in the stable phase."""
    found: dict[str, dict[str, float]] = {}
    for name in MEASURES:
        stable, decay = (
            [r[name] for r in rows if r["phase"] == code and r[name] is not None] for code in (1, 2)
        )
        usual = statistics.median(stable)
        found[name] = {
            "stable": usual,
            "decay": round(statistics.median(decay) / usual, 4),
            "end": round(decay[-1] / usual, 5),
        }
    return found


class Block(nn.ModuleList):
    """100 layers with a weight and a bias each."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8) for _ in range(100))

    def forward(self, x: Tensor) -> Tensor:
        """Adds up all layers."""
        for layer in self:
            x = x + 1e-3 * layer(x)
        return x


class Many(nn.Module):
    """100 such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(100))

    def forward(self, x: Tensor) -> Tensor:
        """Runs one block after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


def cost(folder: Path, model: nn.Module, batch: Tensor, probe: Tensor, steps: int) -> dict[str, float]:
    """Medians of a training step and of what the probe takes at each snapshot, in a plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    options = {"every_n_steps": 1, "window": 3, "storage": "cpu", "durable": False, "emit_every": 0}
    took: list[float] = []
    with (
        timed(Probe, "run", "compare") as seconds,
        CheckpointMerger(model, optimizer, dirpath=folder, probe=(probe,), **options) as merger,
    ):
        for _ in range(steps):
            start = time.thread_time()
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            took.append(time.thread_time() - start)
            merger.step()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "sequences_of_a_step": len(batch),
        "step_ms": milliseconds(took),
        "stall_ms": milliseconds(seconds["run"]),
        "background_ms": milliseconds(seconds["compare"]),
    }


def costs(folder: Path) -> dict[str, dict[str, float]]:
    """What the probe costs other models."""
    small = torch.randint(256, (DemoData().batch_size, 128))
    config = GPTConfig(vocabulary=50_304, context=128, width=768, layers=12, heads=12)
    tokens = torch.randint(config.vocabulary, (8, config.context))
    return {
        "the demo's": cost(folder / "small", GPT(), small, small[:8], 20),
        "124M, 8 sequences of 128": cost(folder / "large", GPT(config), tokens, tokens, 3),
        "20,000 tensors": cost(folder / "many", Many(), torch.randn(8, 8), torch.randn(8, 8), 5),
    }


def draw(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws every measure as a share of its median in the stable phase, over the learning rate."""
    figure = Figure(figsize=(8.0, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    steps = [row["step"] for row in rows]
    for name, (label, color) in MEASURES.items():
        points = [(row["step"], row[name]) for row in rows if row[name] is not None]
        usual = statistics.median(row[name] for row in rows if row["phase"] == 1 and row[name] is not None)
        top.plot(
            [step for step, _ in points],
            [value / usual for _, value in points],
            color=color,
            label=label,
            lw=1.6,
        )
    top.set(ylabel="share of the stable phase's median", ylim=(0, 3))
    top.legend(loc="upper right", framealpha=0.9, edgecolor="none")
    top.set_title(
        "Functional diversity falls with the learning rate, as the RMS does", loc="left", fontsize=12
    )
    bottom.plot(steps, [row["lr_ratio"] for row in rows], color="#444444", lw=1.6)
    bottom.set(ylabel="learning rate / peak", xlabel="optimizer step", ylim=(0, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    figure.savefig(path)


def main() -> None:
    """Measures, draws and writes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"costs": costs(Path(folder))}
        if "--costs" in sys.argv[1:]:
            found["demo"] = json.loads((RESULTS / "functional_diversity.json").read_text())["demo"]
        else:
            found["demo"] = demo(Path(folder, "demo"))
    draw(found["demo"]["snapshots"], RESULTS / "functional_diversity.png")
    print(write("functional_diversity", found))


if __name__ == "__main__":
    main()
