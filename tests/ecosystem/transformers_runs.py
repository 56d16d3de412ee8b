"""The three checks for libraries that train with a Hugging Face ``Trainer`` or a subclass of it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from merge_callback import load_merge
from merge_callback.transformers import CheckpointMergeTrainerCallback
from tests.ecosystem.comparison import (
    EVERY,
    MERGING,
    WINDOW,
    Findings,
    Weights,
    assert_emissions,
    assert_mean_weights,
    assert_metrics,
    assert_same_weights,
    merge_files,
)
from tests.support.training_runs import weights_of

ARGUMENTS = {
    "max_steps": 36, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2 * EVERY,
    "save_strategy": "steps", "save_steps": EVERY, "lr_scheduler_type": "constant", "learning_rate": 1e-3,
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0,
}  # fmt: skip
"""Of every trainer: a snapshot and a checkpoint every few steps, an evaluation half as often."""


class Probe(TrainerCallback):
    """Records the weights at each snapshot's step, and the merged metrics of each evaluation."""

    def __init__(self) -> None:
        self.weights: dict[int, Weights] = {}
        self.merged: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % EVERY == 0:
            self.weights[state.global_step] = weights_of(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        merged = {
            name.removeprefix("merged_"): v for name, v in metrics.items() if name.startswith("merged_")
        }
        self.merged = {name: value for name, value in merged.items() if "_per_second" not in name}


def checked(
    library: str, train: Callable, load: Callable, load_checkpoint: Callable | None = None
) -> Findings:
    """Trains with and without the callback and compares.

    Args:
        library: its name on PyPI.
        train: from a list of callbacks and a folder to the trainer that has trained, always from one seed.
        load: from the folder of an emission to the state dict of what the library loads from it.
        load_checkpoint: the same from a merge of the trainer's checkpoints; without one they are not merged.
    """
    findings = Findings(library, "transformers")
    root = Path(tempfile.mkdtemp(prefix="ecosystem-"))
    alone, probe = Probe(), Probe()
    train([alone], root / "alone")
    merging = CheckpointMergeTrainerCallback(dirpath=root / "merges", **MERGING)
    with findings.checking("trains bitwise as without", "weights at each snapshot"):
        trainer = train([merging, probe], root / "run")
        assert len(probe.weights) >= WINDOW, f"snapshots at {list(probe.weights)} only"
        for step, weights in alone.weights.items():
            assert_same_weights(probe.weights[step], weights)
    with findings.checking("merges load back", "merges are the mean of their snapshots"):
        assert_emissions(root / "merges", probe.weights, load_merge)
    with findings.checking("merges load back", "the library loads the latest"):
        assert_same_weights(load(root / "merges/latest"), load_merge(root / "merges/latest"))
    if load_checkpoint:
        with findings.checking("merges load back", "the trainer's checkpoints, merged"):
            merged = merge_files(root / "run", root / "merged")
            snapshots = [probe.weights[step] for step in sorted(probe.weights)[-WINDOW:]]
            assert_mean_weights(load_checkpoint(merged), snapshots)
    with findings.checking("merged metrics right", "the last evaluation"):
        logged = probe.merged  # a later evaluation calls the probe again
        trainer.model.load_state_dict(load_merge(root / "merges/latest"))
        expected = trainer.evaluate()
        print(f"by hand {expected}\nlogged {logged}")
        assert_metrics(logged, expected)
    return findings


def set_threads() -> None:
    """Models this small train ten times faster alone."""
    torch.set_num_threads(1)
