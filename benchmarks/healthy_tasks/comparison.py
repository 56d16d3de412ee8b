"""Trains a task with the callback and without it, and says where the two runs differ."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from record import QUIET
from recorders import Losses, on_one_quiet_thread

from healthy_tasks.catalogue import TASKS
from healthy_tasks.task import Healthy
from merge_callback import CheckpointMergeCallback, TrainingDivergedError
from merge_callback.demo.spike import read_events

LEARNED = 0.9
"""A healthy run's last score is at most this share of its first; a negative one is always better."""


@dataclass
class Run:
    """What became of one run."""

    weights: str  # hash of all its tensors
    start: float
    score: float
    steps: int
    seconds: float
    losses: list[float]
    ended: str = ""  # why it did not take all its steps
    error: str = ""  # of an error that has nothing to do with spikes: its kind and message
    events: list[dict[str, Any]] = field(default_factory=list)


def compare(name: str, seed: int) -> dict[str, Any]:
    """Trains a task twice, from the same seed."""
    on_one_quiet_thread()
    logging.getLogger("merge_callback").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        merged = train(name, seed, Path(folder))
    plain = train(name, seed, None)
    kinds = Counter(event["event"] for event in merged.events)
    return {
        "task": name,
        "hard": TASKS[name].hard,
        "seed": seed,
        "steps": plain.steps,
        "events": dict(kinds),
        "restores": kinds["restore"],
        "restored_at": [event["step"] for event in merged.events if event["event"] == "restore"],
        "ended": merged.ended,
        "steps_with_callback": merged.steps,
        "bitwise_equal": (merged.weights, merged.score) == (plain.weights, plain.score),
        "score": {"start": plain.start, "without": plain.score, "with": merged.score},
        "learned": plain.score <= LEARNED * plain.start,
        "seconds": {"without": plain.seconds, "with": merged.seconds},
        "error": plain.error or merged.error,
        "losses": plain.losses,
    }


def train(name: str, seed: int, folder: Path | None) -> Run:
    """Trains a task, with the callback if there is a folder for it."""
    seed_everything(seed, verbose=False)
    module = TASKS[name].build(seed)
    start = evaluate(module)
    seed_everything(seed, verbose=False)
    losses = Losses()
    callbacks: list[Callback] = [losses]
    if folder is not None:
        cheap: dict[str, Any] = {"durable": False, "evaluate": False, "emit_every": 0}
        options = {**cheap, **module.callback_options()}
        callbacks.append(CheckpointMergeCallback(every_n_steps=50, dirpath=folder, **options))
    own = module.trainer_options()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        **{"max_steps": module.steps, **own, "callbacks": [*own.get("callbacks", []), *callbacks], **QUIET},
    )
    ended = error = ""
    began = time.perf_counter()
    try:
        trainer.fit(module)
    except TrainingDivergedError as stop:
        ended = str(stop)
    except Exception as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - began
    return Run(
        fingerprint(module),
        start,
        evaluate(module),
        trainer.global_step,
        seconds,
        losses.values,
        ended,
        error,
        read_events(folder) if folder else [],
    )


def evaluate(module: Healthy) -> float:
    """The module's score."""
    module.eval()
    with torch.no_grad(), torch.random.fork_rng():
        score = module.score()
    module.train()
    return score


def fingerprint(module: Healthy) -> str:
    """A hash of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
