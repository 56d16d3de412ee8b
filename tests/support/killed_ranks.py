"""Runs of two ranks, one of which is killed at a chosen call; then the run is resumed, and not killed again.

A process of its own forks every attempt's ranks; see `live`.
"""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from distributed_worker import fork_ranks
from forked import Forked
from lightning.pytorch import Callback
from run_outcomes import damage
from sharded_runs import Steady, merged_fit, window_folder
from spiking_runs import Dies

from merge_callback.snapshots.safetensors_file import file_checksum

PATIENCE = 60
"""Seconds within which the ranks that are left have to end by themselves."""


class Saves(Callback):
    """Saves a checkpoint after each of these steps, where no snapshot is taken."""

    def __init__(self, folder, steps=(3, 7)):
        self.folder, self.steps = Path(folder), steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step:02d}.ckpt")
            trainer.strategy.barrier()


def attempt(strategy, folder, dies=None, **options):
    """Trains from the last checkpoint on, to the death of one rank or to the end."""
    saved = sorted(Path(folder).glob("step=*.ckpt"))
    if dies and int(os.environ["LOCAL_RANK"]) == dies["rank"]:
        Dies(dies["function"], dies["moment"], dies["nth"])
    trainer = {"ckpt_path": str(saved[-1]) if saved else None}
    return merged_fit(strategy, folder, Saves(folder), module=Steady(), trainer=trainer, **options)


def half_written(folder):
    """What is visible and not complete: emissions, and what the manifest names."""
    found = damage(Path(folder) / "merges")
    for path in window_folder(folder).glob("step=*/shards.json"):
        files = json.loads(path.read_text())["files"]
        for name, checksum in files.items():
            if not (path.parent / name).is_file() or file_checksum(path.parent / name) != checksum:
                found.append(f"{path.parent.name}/{name}")
    manifest = window_folder(folder) / "manifest.json"
    records = json.loads(manifest.read_text())["snapshots"] if manifest.is_file() else []
    lists = [(r, window_folder(folder) / r["file"] / "shards.json") for r in records]
    return found + [r["file"] for r, f in lists if not f.is_file() or file_checksum(f) != r["checksum"]]


def lived(case):
    """One case: its attempt with a kill, and one without; how they ended and what was there after each."""
    Path(case["folder"]).mkdir(parents=True)
    ends, seconds, torn, results = [], [], [], None
    for dies in (case["dies"], None) if case["dies"] else (None,):
        options = {**case, "dies": dies}
        with TemporaryDirectory() as place:
            run_case = options.pop("run", attempt)
            job = {"attempt": (run_case, options)}
            codes, took = fork_ranks(2, job, Path(place), patience=PATIENCE)
            logs = [log.read_text()[-2000:] for log in sorted(Path(place).glob("*.log"))]
            done = [Path(place, f"rank{rank}.pt") for rank in range(2)]
            if all(path.exists() for path in done):
                results = [torch.load(path, weights_only=False)["attempt"] for path in done]
        ends.append(codes)
        seconds.append(took)
        torn += half_written(case["folder"])
    return {"ends": ends, "seconds": seconds, "torn": torn, "results": results, "logs": logs}


def live(cases, timeout=500):
    """The outcomes of cases, by name: ``{"strategy": …, "folder": …, "dies": …, …}``; see ``attempt``.

    With ``"run"``, another function takes the place of ``attempt``.
    """
    with TemporaryDirectory() as folder:
        torch.save(cases, Path(folder, "cases"))
        worker = Forked(live_through, Path(folder))
        try:
            assert worker.wait(timeout) == 0
        finally:
            worker.kill()
        return torch.load(Path(folder, "results"), weights_only=False)


def live_through(place):
    """What the forked process does with the cases that lie in ``place``."""
    # One after another: the file system and two cores are shared.
    outcomes = {}
    for name, case in torch.load(place / "cases", weights_only=False).items():
        shutil.rmtree(case["folder"], ignore_errors=True)
        outcomes[name] = lived(case)
    torch.save(outcomes, place / "results")
