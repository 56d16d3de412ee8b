"""Is a first rate that is raised by mistake told from a warm-up by what the loss does?

    python benchmarks/first_warmup.py            # judges the recorded losses
    python benchmarks/first_warmup.py --record   # trains for them again: ten minutes on one core

Small models train at a first rate for 150 or 400 steps; then it is multiplied by 2, 5, 25 or 200, up to rates
that are too high. Others climb five equal stairs. Both may be a warm-up or a mistake, and only the losses
tell which. They are in ``results/first_warmup.npz``.

A run went *well* if the median of its last 50 losses is below the threshold that the 128 losses before the
rise set (on stairs: within half of the lowest 50). Such a run may not be reported in its first warm-up.

The divergences of ``spike_detection.py`` are judged, too, as if their excessive rate were a first rise.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from healthy_tasks.sources import CLASSES, INPUTS, SYMBOLS, clusters, integers, normal, text, uniform, waves
from healthy_tasks.task import mlp
from record import RESULTS, write
from spike_detection import curves, recipes
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from merge_callback.demo.crops import DemoData
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.signals.baseline import Baseline
from merge_callback.signals.lr_phase import LRPhaseDetector, Warmup
from merge_callback.signals.spike_detector import SpikeDetector

CURVES = RESULTS / "first_warmup.npz"
AFTER = 300
"""Steps at the raised rate."""
STAIR, STAIRS = 150, 5

Task = Callable[[int], tuple[nn.Module, Callable[[int], Tensor]]]
"""Makes the model of a seed, and the function that computes the loss of a step."""


def drawn(seed: int, step: int) -> Generator:
    return Generator().manual_seed(99_991 * seed + step)


def classes(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    model = mlp(INPUTS, CLASSES)

    def loss(step: int) -> Tensor:
        x, labels = clusters(drawn(seed, step), 32)
        return F.cross_entropy(model(x), labels)

    return model, loss


def symbols(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    model = nn.Sequential(nn.Embedding(SYMBOLS, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, SYMBOLS))

    def loss(step: int) -> Tensor:
        seen = text(drawn(seed, step), 16, 12)
        return F.cross_entropy(model(seen[:, :-1]).flatten(0, 1), seen[:, 1:].flatten())

    return model, loss


def wave(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """The same batch in every step."""
    model = mlp(INPUTS, 1, 64)
    x, y = waves(Generator().manual_seed(seed), 256)
    return model, lambda step: F.mse_loss(model(x), y)


def gratings(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    down, right = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def loss(step: int) -> Tensor:
        g = drawn(seed, step)
        labels = integers(g, 4, 16)
        angle = labels[:, None, None] * torch.pi / 4
        phase = 2 * (down * torch.cos(angle) + right * torch.sin(angle)) + 6 * uniform(g, 16, 1, 1)
        return F.cross_entropy(model((torch.sin(phase) + 0.5 * normal(g, 16, 8, 8))[:, None]), labels)

    return model, loss


def crops(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    model = DemoModule(GPTConfig(context=16, width=32, qk_norm=False), WSDSchedule(1, 1, 0))
    data = DemoData(32, 16, seed)
    data.setup("fit")
    batches = data.train_dataloader()
    return model, lambda step: model._mean_loss(batches.draw(step))


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, betas=(0.9, 0.95))


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, momentum=0.9)


TASKS: dict[str, tuple[Task, Callable[[Any], Optimizer], list[float]]] = {
    "gpt": (crops, adamw, [1e-3, 4e-3, 8e-3, 2e-2, 5e-2, 0.2]),
    "clus_adam": (classes, Adam, [1e-3, 1e-2, 3e-2, 0.1, 0.5]),
    "clus_sgd": (classes, momentum, [1e-2, 0.05, 0.2, 0.6, 2.0]),
    "wave_gd": (wave, SGD, [0.05, 0.2, 0.4, 0.6, 1.0]),
    "wave_adam": (wave, Adam, [1e-3, 1e-2, 0.05, 0.2]),
    "markov": (symbols, Adam, [1e-3, 1e-2, 4e-2, 0.2]),
    "conv": (gratings, momentum, [1e-2, 0.1, 0.5, 2.0]),
}
"""Model, optimizer, and the rates that a first one is raised to: good, hot, and some that are too high."""

RISES = [*product([150], [2, 5, 25, 200]), *product([400], [5, 25])]
"""Steps at the first rate, and the factor by which it is raised."""


def schedules(top: float) -> Iterator[tuple[str, int, list[float]]]:
    """Name, seed and rates of every run up to a rate."""
    for steps, factor in RISES:
        yield f"{steps} steps, then {factor} times", 1, [top / factor] * steps + [top] * AFTER
    climb = [top * stair / STAIRS for stair in range(1, STAIRS + 1) for _ in range(STAIR)]
    yield "stairs", 2, climb + [top] * STAIR


def train(name: str, rates: list[float], seed: int) -> list[float]:
    """The losses of one run."""
    make, optimize, _ = TASKS[name]
    torch.manual_seed(seed)
    model, loss_of = make(seed)
    optimizer, losses = optimize(model.parameters()), []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        if name == "gpt":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def runs() -> Iterator[tuple[str, str, int, list[float]]]:
    """Task, name, seed and rates of every run."""
    for task, (_, _, tops) in TASKS.items():
        for top in tops:
            for how, seed, rates in schedules(top):
                yield task, f"{task} {top:g}: {how}", seed, rates


def went_well(losses: list[float], rates: list[float]) -> bool:
    """Whether the last losses are no worse than those before the rise."""
    end = statistics.median(losses[-50:])
    if len(set(rates)) > 2:
        lowest = min(statistics.median(losses[i : i + 50]) for i in range(0, len(losses) - 50, 25))
        return end <= 1.5 * lowest + 0.05
    rise = rates.index(rates[-1])
    level = statistics.median(map(abs, losses[:64]))
    return end <= Baseline(6.0, 0.05, losses[rise - 128 : rise]).limit(level)


def reported(losses: list[float], rates: list[float], total: int | None) -> int | None:
    """Steps from the rise to a spike of the first warm-up, if there is one."""
    phases, detector = LRPhaseDetector(total), SpikeDetector()
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True)):
        phases.observe([rate])
        event = detector.observe(step, loss, phases.warmup)
        if event and event.kind == "spike" and phases.warmup is Warmup.FIRST:
            return step - next(i for i, r in enumerate(rates) if r > rates[0])
    return None


def judge(recorded: dict[str, list[float]], length: float) -> dict[str, Any]:
    """What is reported of the runs, if they are told a length of so many times the real one, or none."""
    found: Counter[str] = Counter()
    delays, missed, wrong = [], [], []
    for _, name, _, rates in runs():
        losses = recorded[name]
        well = went_well(losses, rates)
        after = reported(losses, rates, int(length * len(rates)) or None)
        found[f"{'well' if well else 'badly'}{', reported' if after is not None else ''}"] += 1
        if well and after is not None:
            wrong.append(name)
        elif not well and after is None:
            missed.append(name)
        elif after is not None:
            delays.append(after)
    return {
        **found,
        "median delay": statistics.median(delays),
        "reported though well": wrong,
        "missed": missed,
    }


def judge_gpts() -> dict[str, int]:
    """How many divergences of ``spike_detection.py`` are reported if their excessive rate is a first rise."""
    lengths = {recipe.name: recipe.excess_steps for recipe in recipes()}
    found: Counter[str] = Counter()
    for name, kind, onset, losses in curves():
        if kind == "diverged" and onset is not None:
            rises, detector = range(onset, onset + lengths[name]), SpikeDetector()
            events = [
                detector.observe(step, loss, Warmup.FIRST if step in rises else Warmup.NONE)
                for step, loss in enumerate(losses)
            ]
            found["divergences"] += 1
            found["reported"] += any(event and event.kind == "spike" for event in events)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="train the runs again")
    if parser.parse_args().record:
        torch.set_num_threads(1)
        torch.backends.mkldnn.enabled = False  # matrices this small take longer with it
        losses = {name: np.float32(train(task, rates, seed)) for task, name, seed, rates in runs()}
        np.savez_compressed(CURVES, **losses)
    with np.load(CURVES) as file:
        recorded = {name: file[name].astype(float).tolist() for name in file.files}
    figures = {
        "length unknown": judge(recorded, 0),
        "four times as long a run": judge(recorded, 4),
        "gpts": judge_gpts(),
    }
    for what, verdict in figures.items():
        print(what, verdict)
    print(write("first_warmup", {"runs": len(recorded), **figures}))


if __name__ == "__main__":
    main()
