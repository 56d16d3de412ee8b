"""Does the detector see every real divergence, and nothing else? Against three published rules.

    python benchmarks/spike_detection.py            # judges the recorded loss curves
    python benchmarks/spike_detection.py --record   # trains for them again: half an hour on two cores

The curves are losses of real runs of the demo model, in ``results/loss_curves.npz``:

* *healthy*: warmup-stable-decay runs of several seeds, learning rates, batch sizes and shapes, dense and
  mixture of experts, trained with the callback on, which may not restore any of them (nor any of some more
  runs with warm restarts, whose curves are not kept: the other rules know nothing of learning rates);
* *diverged*: without qk-norm, the learning rate 15 to 30 times too high for a while or for good;
* *healing*: one to four corrupted batches, or an excessive learning rate for one step;
* *shift*: from some step on, other text (Python's documentation instead of its source);
* *one nan*: a healthy curve with one loss replaced by NaN, as a bad batch whose update is skipped leaves it;
* *nan*: a healthy curve that turns NaN for good, as weights that did leave it.

A rule has to raise an alarm within 100 steps of the onset of a divergence or a lasting NaN, and nowhere else.
Ours only asks then: a run is restored where the weights before the spike do clearly better on the same batch.

Then all rules replay ``results/public_losses.npz``: the training loss of every step of 35 public GPT runs of
124M to 1.5B parameters, read from the logs in the public repository KellerJordan/modded-nanogpt.
All of them went well, so every alarm is a false one.

The other rules are in ``spike_rules.py``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from record import QUIET, RESULTS, write
from recorders import Losses, on_one_quiet_thread
from spike_rules import RULES, WARMUP, Rule
from torch import Tensor

from merge_callback import CheckpointMergeCallback
from merge_callback.demo.crops import Batch, DemoData, RandomCrops, cut
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import ExcessiveSchedule, WSDSchedule, wsd_factor
from merge_callback.demo.spike import read_events

CURVES = RESULTS / "loss_curves.npz"
PUBLIC = RESULTS / "public_losses.npz"
NOTICED_WITHIN = 100
"""Steps from the onset of a divergence within which an alarm counts."""


@dataclass(frozen=True)
class Recipe:
    """How to train one run."""

    kind: str
    seed: int
    steps: int = 1000
    onset: int | None = None  # first step that is not as it should be
    learning_rate: float = 8e-3
    batch_size: int = 16
    moe: bool = False
    qk_norm: bool = True
    decay: int = 0
    shape: str = "1-sqrt"
    excess: float = 1.0
    excess_steps: int = 0
    corrupted: int = 0  # batches
    other_text: bool = False
    period: int = 0  # of warm restarts

    @property
    def name(self) -> str:
        size = f"b{self.batch_size}-lr{self.learning_rate:g}{'-moe' if self.moe else ''}"
        how = f"-x{self.excess:g}-{self.excess_steps}" if self.excess != 1 else f"-c{self.corrupted}"
        return f"{self.kind}-{size}-{self.shape}{self.decay}{how}-s{self.seed}"

    @property
    def schedule(self) -> WSDSchedule:
        if self.period:
            return Restarting(WARMUP, decay=self.period, shape="cosine")
        stable = self.steps - WARMUP - self.decay
        first = self.onset if self.onset is not None else 0
        return ExcessiveSchedule(
            WARMUP,
            stable,
            self.decay,
            self.shape,  # type: ignore[arg-type]
            excess=self.excess,
            excess_from=first,
            excess_steps=self.excess_steps,
        )


class Restarting(WSDSchedule):
    """Decays again and again, each time from the peak."""

    def factor(self, step: int) -> float:
        again = self.warmup + (step - self.warmup) % self.decay if step >= self.warmup else step
        return wsd_factor(again, self.warmup, 0, self.decay, self.shape)


def recipes() -> Iterator[Recipe]:
    """Every run that is recorded."""
    for seed in range(56):  # with every mix of the rest, the decay included
        yield Recipe(
            "healthy",
            seed,
            steps=1000,
            decay=250,
            learning_rate=(4e-3, 8e-3, 1.6e-2)[seed % 3],
            batch_size=(4, 16)[seed % 2],
            moe=seed % 4 == 3,
            qk_norm=seed % 5 != 4,
            shape=("1-sqrt", "linear", "cosine")[seed % 7 % 3],
        )
    for seed in range(8):
        yield Recipe(
            "restarts", seed, period=(150, 300, 450)[seed % 3], moe=seed % 4 == 3, qk_norm=seed % 2 == 0
        )
    for seed, (excess, length) in enumerate([(25, 40), (25, 40), (30, 80), (15, 400), (20, 400), (25, 20)]):
        broken = Recipe("diverged", seed, onset=600, qk_norm=False, excess=excess, excess_steps=length)
        yield broken
        yield replace(broken, moe=True)
    for seed in range(6):
        yield Recipe("healing", seed, onset=500, corrupted=1 + seed % 4, steps=700)
        yield Recipe("healing", seed, onset=500, qk_norm=False, excess=20, excess_steps=1, steps=700)
        yield Recipe("shift", seed, onset=500, other_text=True, steps=900, moe=seed % 2 == 1)


class OtherCrops(RandomCrops):
    """Crops whose bytes are noise, or from another text, from one batch on."""

    recipe: Recipe
    other: Tensor

    def draw(self, index: int) -> Batch:
        batch = super().draw(index)
        since = index - (self.recipe.onset or 0)
        generator = np.random.default_rng((*self.key, index, 1))
        if self.recipe.other_text and since >= 0:
            starts = generator.integers(len(self.other) - self.context, size=self.batch_size)
            return cut(self.other, torch.from_numpy(starts), self.context)
        if 0 <= since < self.recipe.corrupted:
            noise = torch.from_numpy(generator.integers(256, size=(self.batch_size, self.context + 1)))
            return {"input_ids": noise[:, :-1], "labels": noise[:, 1:]}
        return batch


class RecipeData(DemoData):
    """The demo's data, but for what the recipe changes."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.batch_size, seed=recipe.seed, epoch_batches=recipe.steps)
        self.recipe = recipe

    def train_dataloader(self) -> RandomCrops:
        crops = OtherCrops(self.corpus.train, self.batch_size, self.context, self.epoch_batches, (self.seed,))
        crops.recipe, crops.other = self.recipe, documentation()
        return crops


def documentation() -> Tensor:
    """The text of Python's language reference, as ``help()`` shows it."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values()).encode()
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def record(recipe: Recipe) -> tuple[Recipe, list[float], int]:
    """Trains one run; returns its losses and the callback's events: only healthy runs have the callback."""
    on_one_quiet_thread()
    seed_everything(recipe.seed, verbose=False)
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        merging = CheckpointMergeCallback(
            every_n_steps=40, dirpath=folder, evaluate=False, emit_every=0, durable=False
        )
        healthy = recipe.kind in ("healthy", "restarts")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=recipe.steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            callbacks=[merging, losses] if healthy else [losses],
            **QUIET,
        )
        gpt = GPTConfig(qk_norm=recipe.qk_norm, experts=4 if recipe.moe else 0)
        trainer.fit(DemoModule(gpt, recipe.schedule, recipe.learning_rate), datamodule=RecipeData(recipe))
        return recipe, losses.values, len(read_events(Path(folder)))


# --- the judgement ------------------------------------------------------------------------------------------


def curves() -> Iterator[tuple[str, str, int | None, list[float]]]:
    """Name, kind, onset and losses of every curve; the NaN ones are made of healthy ones."""
    with np.load(CURVES) as file:
        recorded = {name: file[name].astype(float).tolist() for name in file.files}
    for name, values in recorded.items():
        onset, losses = int(values[0]), values[1:]
        kind = name.split("-")[0]
        yield name, kind, onset if onset >= 0 else None, losses
        if kind == "healthy" and int(name.rsplit("-s", 1)[1]) < 6:
            yield f"{name}, one NaN", "one nan", 500, [*losses[:500], math.nan, *losses[501:]]
            yield f"{name}, NaN", "nan", 500, [*losses[:500], *[math.nan] * (len(losses) - 500)]


def judge(rule: Rule) -> dict[str, Any]:
    """What a rule made of all curves."""
    found: Counter[str] = Counter()
    delays, by_kind = [], {}
    for _, kind, onset, losses in curves():
        alarms = rule(losses)
        must_see = kind in ("diverged", "nan")
        # NaN or not, a loss that is NaN deserves one look: an alarm at that very step is no false one.
        excused = {onset} if kind == "one nan" else set()
        seen = [a for a in alarms if must_see and onset is not None and onset <= a <= onset + NOTICED_WITHIN]
        until = onset if must_see and onset is not None else len(losses)
        false = [a for a in alarms if a < until and a not in excused]
        found["curves to see"] += must_see
        found["seen"] += bool(seen)
        found["curves with false alarms"] += bool(false)
        found["false alarms"] += len(false)
        delays += [seen[0] - onset] if seen and onset is not None else []
        entry = by_kind.setdefault(kind, {"curves": 0, "with an alarm": 0, "alarms": 0})
        entry["curves"] += 1
        entry["with an alarm"] += bool(alarms)
        entry["alarms"] += len(alarms)
    seen_curves, wrong = found["seen"], found["curves with false alarms"]
    return {
        "precision": seen_curves / (seen_curves + wrong) if seen_curves + wrong else None,
        "recall": seen_curves / found["curves to see"],
        "median_delay_steps": statistics.median(delays) if delays else None,
        **found,
        "by_kind": by_kind,
    }


def replay(rule: Rule) -> dict[str, Any]:
    """The alarms that a rule raises in the public runs."""
    with np.load(PUBLIC) as file:
        runs = {name: file[name].astype(float).tolist() for name in file.files}
    alarms = {name: len([a for a in rule(losses) if a >= WARMUP]) for name, losses in runs.items()}
    steps, count = sum(map(len, runs.values())), sum(alarms.values())
    return {
        "runs": len(runs),
        "steps": steps,
        "runs_with_an_alarm": sum(map(bool, alarms.values())),
        "alarms": count,
        "alarms_per_100k_steps": 1e5 * count / steps,
    }


def record_all(workers: int) -> dict[str, int]:
    """Trains every recipe and keeps the losses; returns what the callback did in the healthy ones."""
    kept, runs, steps, events = {}, 0, 0, 0
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for recipe, losses, told in pool.map(record, recipes()):
            print(f"{recipe.name:48} last loss {statistics.median(losses[-25:]):.3f}", flush=True)
            onset = -1 if recipe.onset is None else recipe.onset
            if recipe.kind != "restarts":
                kept[recipe.name] = np.array([onset, *losses], dtype=np.float32)
            if recipe.kind in ("healthy", "restarts"):
                runs, steps, events = runs + 1, steps + len(losses), events + told
    RESULTS.mkdir(exist_ok=True)
    np.savez_compressed(CURVES, **kept)
    return {"healthy_runs": runs, "healthy_steps": steps, "events_in_healthy_runs": events}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="train the runs again")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    trained = record_all(options.workers) if options.record else {}
    verdicts = {name: judge(rule) for name, rule in RULES.items()}
    print(f"{'rule':12} precision  recall  median delay  false alarms (curves)")
    for name, v in verdicts.items():
        precision = "        –" if v["precision"] is None else f"{v['precision']:9.2f}"  # noqa: RUF001
        delay = "–" if v["median_delay_steps"] is None else f"{v['median_delay_steps']:.0f} steps"  # noqa: RUF001
        print(
            f"{name:12} {precision}  {v['recall']:6.2f}  {delay:>12}  "
            f"{v['false alarms']:5} ({v['curves with false alarms']})"
        )
    for kind in verdicts["ours"]["by_kind"]:
        counts = {name: v["by_kind"][kind] for name, v in verdicts.items()}
        alarmed = ", ".join(f"{name} {c['with an alarm']} ({c['alarms']})" for name, c in counts.items())
        print(f"{kind}: {counts['ours']['curves']} curves; with an alarm (alarms): {alarmed}")
    public = {name: replay(rule) for name, rule in RULES.items()}
    for name, found in public.items():
        print(f"public runs, {name}: {found}")
    figures = {"curves": len(list(curves())), **trained, "rules": verdicts, "public_runs": public}
    print(write("spike_detection", figures))


if __name__ == "__main__":
    main()
