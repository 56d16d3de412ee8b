"""What each method's merge is worth: validation losses along the demo's run, by method and window.

    python benchmarks/methods.py                  # 15 minutes on one idle core
    python benchmarks/methods.py --seeds 1

The demo's model trains without a callback of ours, and its weights are copied every 40 steps. Afterwards the
last N copies of one phase are merged by every method with its defaults, and evaluated on the demo's
validation text. A gain is the live loss less the merge's: positive is better.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from record import QUIET, write
from torch import Tensor

from merge_callback.demo.crops import DemoData
from merge_callback.demo.module import DemoModule
from merge_callback.merging import METHODS, merge_state_dicts

EVERY = 40
POINTS = {"early": 600, "stable": 4200, "decay": 4800, "end": 5400}
"""Steps at which merges are made: in the stable phase, at its end, in the middle of the decay, at its end."""

FIRST = {"early": 200, "stable": 200, "decay": 4200, "end": 4200}
"""The last step before the phase that a merge may take snapshots of."""

WINDOWS = (3, 10)


class Copies(Callback):
    """Copies the weights every ``EVERY`` steps."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copies."""
        if trainer.global_step % EVERY == 0:
            state = pl_module.state_dict()
            self.weights[trainer.global_step] = {name: tensor.clone() for name, tensor in state.items()}


def study(seed: int) -> dict[str, dict[str, float]]:
    """The live loss at each point and the gain of each merge there, of one run."""
    seed_everything(seed, verbose=False)
    module, data, copies = DemoModule(), DemoData(seed=seed), Copies()
    trainer = Trainer(
        max_steps=module.schedule.steps,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[copies],
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    batches = list(data.val_dataloader())

    @torch.no_grad()
    def loss(weights: dict[str, Tensor]) -> float:
        module.load_state_dict(weights)
        return float(torch.stack([module._mean_loss(batch) for batch in batches]).mean())

    module.eval()
    found: dict[str, dict[str, float]] = {}
    for point, step in POINTS.items():
        taken = [s for s in copies.weights if FIRST[point] < s <= step]
        live = loss(copies.weights[step])
        found[point] = {"live": live}
        for count in WINDOWS:
            window = taken[-count:]
            for name in METHODS:
                if name == "weighted":
                    continue
                merged = merge_state_dicts([copies.weights[s] for s in window], name, steps=window)
                found[point][f"{name}, {count}"] = live - loss(merged)
        print(f"seed {seed}, {point}: {found[point]}", flush=True)
    return found


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, least and largest over the seeds."""
    return {
        point: {
            name: {
                "mean": statistics.mean(values := [run[point][name] for run in runs]),
                "least": min(values),
                "largest": max(values),
            }
            for name in runs[0][point]
        }
        for point in POINTS
    }


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    runs = [study(seed) for seed in range(seeds)]
    print(write("methods", {"steps": POINTS, "every": EVERY, "seeds": seeds, "gains": summary(runs)}))


if __name__ == "__main__":
    main()
