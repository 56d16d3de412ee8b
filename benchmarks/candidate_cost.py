"""What five candidates and two running averages cost a run: steps, validations, and the background.

    python benchmarks/candidate_cost.py            # 5 minutes on two cores
    python benchmarks/candidate_cost.py --quick    # a minute

The demo's training, shortened, with its window, its interval and its validations: with the default method,
with five candidates besides, and with running averages, too. Quoted is the time inside our training
hooks over the time of all training steps, what the validations take, and what the background does meanwhile.
TensorBoard's file is read back: each candidate has to have its curve.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from overhead import HookTimes
from record import QUIET, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merge_callback import load_merge
from merge_callback.demo.crops import DemoData
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.merging import Ema, Sma, Wsm
from merge_callback.merging.running import PowerEma

EVERY, VALIDATE = 40, 200

FIVE = {
    "wsm": Wsm(),
    "wsm-reversed": Wsm(order="reversed"),
    "sma-5": Sma(last=5),
    "ema": Ema(),
    "ties": "ties",
}


TWO = [PowerEma(0.05), PowerEma(0.10)]


class Clock(Callback):
    """Times what is no validation."""

    def __init__(self) -> None:
        self.training = self.validating = 0.0
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        now = time.perf_counter()
        self.training, self._since = self.training + now - self._since, now

    def on_validation_end(self, *_: Any) -> None:
        now = time.perf_counter()
        self.validating, self._since = self.validating + now - self._since, now


def fit(folder: Path, steps: int, merging: HookTimes) -> dict[str, Any]:
    """Trains; what it took."""
    seed_everything(0, verbose=False)
    clock = Clock()
    logger = TensorBoardLogger(folder, name="logs", version="0")
    quiet = {**QUIET, "logger": logger}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=VALIDATE,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        callbacks=[merging, clock],
        gradient_clip_val=1.0,
        **quiet,
    )
    module = DemoModule(schedule=WSDSchedule(steps // 10, steps - steps // 10 - steps // 5, steps // 5))
    trainer.fit(module, datamodule=DemoData())
    found = {"training": clock.training, "validating": clock.validating}
    spent = sum(merging.steps) + sum(merging.micro_batches)
    found |= {"hooks": spent, "hooks_percent": 100 * spent / clock.training}
    events = [json.loads(line) for line in (folder / "merges/events.jsonl").read_text().splitlines()]
    found["background"] = sum(e["background"] for e in events if e["event"] == "snapshot")
    found["published"] = [e["method"] for e in events if e["event"] == "emission"]
    found["compared"] = [e["candidates"] for e in events if e["event"] == "validation" and e["candidates"]]
    curves = EventAccumulator(str(folder / "logs/0"))
    curves.Reload()
    found["curves"] = sorted(tag for tag in curves.Tags()["scalars"] if tag.startswith("merged/"))
    for pointer in ("latest", "best"):
        assert load_merge(folder / "merges", pointer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a third of the steps")
    options = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "merge_callback"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    steps = 200 if options.quick else 600
    figures: dict[str, Any] = {"steps": steps, "every": EVERY, "candidates": [*FIVE]}
    variants: dict[str, dict[str, Any]] = {
        "default method": {},
        "five candidates": {"candidates": FIVE},
        "five candidates, compared on 2 batches": {"candidates": FIVE, "evaluate_batches": 2},
        "five candidates, two running averages": {"candidates": FIVE, "running": TWO},
    }
    for name, chosen in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            place = {"dirpath": f"{folder}/merges", "every_n_steps": EVERY, "keep_last": 2}
            figures[name] = found = fit(Path(folder), steps, HookTimes(**place, **chosen))
        shown = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
        print(f"{name:40} {shown}", flush=True)
    print(write("candidate_cost", figures))


if __name__ == "__main__":
    main()
