"""A second training stage from the merge of the first one's last snapshots, or from its last weights.

    python benchmarks/second_stage.py             # 5 minutes on one idle core
    python benchmarks/second_stage.py --seeds 1

The demo's model trains at a constant learning rate, with the callback. Then three runs train on with other
text (torch's own source files), from the same batches, each with a new optimizer and a warm-up: from the last
weights, from the callback's last merge, of ten snapshots, and from the merge of the last three. Loss and
gradient norm of every step are compared.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from record import QUIET, RESULTS, write
from torch import Tensor

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.demo import DemoData, DemoModule, GradientNorm, WSDSchedule

FIRST, SECOND, EVERY = 1200, 300, 40
"""Steps of the stages, and between the snapshots of the first."""

RATE, WARMUP = 4e-3, 20
"""The second stage's learning rate, half of the first's, and its warm-up in steps."""

SPANS = {"steps 1-5": (0, 5), "steps 6-20": (5, 20), "steps 21-100": (20, 100), "steps 201-300": (200, 300)}


STARTS = {
    "last": ("from the last weights", "tab:blue"),
    "merge": ("from the merge of ten", "tab:orange"),
    "merge of 3": ("from the merge of three", "tab:green"),
}
"""What the second stage begins with, and how it is drawn."""


class Curves(Callback):
    """Keeps the training loss and the gradient norm of every step; comes after ``GradientNorm``."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.grad_norm: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads both."""
        self.loss.append(float(outputs["loss"]))
        self.grad_norm.append(float(trainer.callback_metrics["grad_norm"]))


def fit(module: DemoModule, data: DemoData, steps: int, *callbacks: Callback) -> None:
    """Trains, without validations."""
    options = {**QUIET, "limit_val_batches": 0, "accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0}
    Trainer(max_steps=steps, callbacks=list(callbacks), **options).fit(module, datamodule=data)


@torch.no_grad()
def held_out(module: DemoModule, data: DemoData) -> float:
    """The loss on the second stage's validation text."""
    module.eval()
    return float(torch.stack([module._mean_loss(batch) for batch in data.val_dataloader()]).mean())


def first_stage(seed: int) -> dict[str, dict[str, Tensor]]:
    """The last weights, and the merges of the last ten and three snapshots."""
    seed_everything(seed, verbose=False)
    module = DemoModule(schedule=WSDSchedule(200, FIRST - 200, 0))
    with TemporaryDirectory() as folder:
        merging = CheckpointMergeCallback(every_n_steps=EVERY, dirpath=folder, evaluate=False)
        fit(module, DemoData(seed=seed), FIRST, merging)
        few = merging.merge(last=3)
        assert few is not None
        return {"last": module.state_dict(), "merge": load_merge(Path(folder, "latest")), "merge of 3": few}


def second_stage(seed: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The curves of a run that begins with some weights."""
    seed_everything(seed, verbose=False)
    module = DemoModule(schedule=WSDSchedule(WARMUP, SECOND - WARMUP, 0), learning_rate=RATE)
    module.load_state_dict(weights)
    data, curves = DemoData(seed=seed + 1000, package="torch"), Curves()
    data.setup("fit")
    before = held_out(module, data)
    module.train()
    fit(module, data, SECOND, GradientNorm(), curves)
    return {
        "held_out": {"before": before, "after": held_out(module, data)},
        "loss": curves.loss,
        "grad_norm": curves.grad_norm,
    }


def summary(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over spans of steps by start, and the differences to those of the last weights, by seed."""
    found = {
        f"{curve}, {span}": _compared(
            [{s: statistics.mean(c[curve][slice(*ends)]) for s, c in run.items()} for run in runs]
        )
        for curve in ("loss", "grad_norm")
        for span, ends in SPANS.items()
    }
    for when in ("before", "after"):
        found[f"held-out loss {when}"] = _compared(
            [{s: c["held_out"][when] for s, c in r.items()} for r in runs]
        )
    return found


def _compared(runs: list[dict[str, float]]) -> dict[str, Any]:
    """The mean of each start over the seeds, and its difference to the last weights in each."""
    means = {start: statistics.mean(run[start] for run in runs) for start in STARTS}
    return {**means, "difference": {s: [run[s] - run["last"] for run in runs] for s in STARTS if s != "last"}}


def draw(runs: list[dict[str, dict[str, Any]]], path: Path) -> None:
    """Both curves of the first 100 steps: a line for each seed, and their mean."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    titles = ("training loss, nats per byte", "gradient norm before clipping")
    for axis, curve, title in zip(axes, ("loss", "grad_norm"), titles, strict=True):
        for start, (label, colour) in STARTS.items():
            lines = torch.tensor([run[start][curve][:100] for run in runs])
            for line in lines:
                axis.plot(range(1, 101), line, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(range(1, 101), lines.mean(0), color=colour, linewidth=1.6, label=label)
        axis.set(xlabel="step of the second stage", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def study(seed: int) -> dict[str, dict[str, Any]]:
    """The curves of one seed, by what the second stage began with."""
    found = {name: second_stage(seed, weights) for name, weights in first_stage(seed).items()}
    print(f"seed {seed}: {summary([found])}", flush=True)
    return found


def report(runs: list[dict[str, dict[str, Any]]]) -> None:
    """Draws and writes what was found."""
    draw(runs, RESULTS / "second_stage.png")
    figures = {"steps": [FIRST, SECOND], "learning_rate": RATE, "warmup": WARMUP, "seeds": len(runs)}
    print(write("second_stage", {**figures, "summary": summary(runs)}))


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    report([study(seed) for seed in range(seeds)])


if __name__ == "__main__":
    main()
