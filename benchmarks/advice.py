"""Every line of advice in 35 runs, and whether what came later bears it out.

    python benchmarks/advice.py --cache FOLDER      # six minutes on one idle core; resumable

A small model of the demo's kind trains on the demo's text under schedules of all sorts, in a plain loop with
a merger. It is validated live and merged every 40 steps, and its weights are copied every 10 steps, so that
other windows can be looked at afterwards. Each rule has a check on the validations after its line:

* ``fading``: in the rest of that phase the gains are on average smaller than the last three before it;
* ``spent``: none of them is more than a fifth of the largest before it, or 0.1 % of the loss;
* ``lagging``: fewer snapshots score better, then and at the next validation;
* ``few``: ten snapshots score better on average over the rest of that phase.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from merge_callback import CheckpointMerger
from merge_callback.demo.crops import Batch, RandomCrops, cut
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.schedule import wsd_factor
from merge_callback.demo.text import load_corpus
from merge_callback.merging import merge_state_dicts

STEPS, WARMUP, CONTEXT, VALIDATED = 1000, 60, 32, 40

Schedule = Callable[[int], float]


def warm(schedule: Schedule) -> Schedule:
    """With a linear warm-up before it."""
    return lambda step: min(1.0, (step + 1) / WARMUP) * schedule(max(0, step - WARMUP))


def constant(_: int) -> float:
    """The same learning rate throughout."""
    return 1.0


def wsd(decay: int, shape: Any = "1-sqrt", floor: float = 0.0, until: int = STEPS) -> Schedule:
    """A decay over the last steps, down to a floor."""
    return lambda step: max(floor, wsd_factor(step, WARMUP, until - WARMUP - decay, decay, shape))


def cosine(floor: float = 0.0, length: int = STEPS - WARMUP) -> Schedule:
    """A cosine; with a shorter length, one after the other (warm restarts)."""
    return lambda step: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step % length) / length))


def stairs(factor: float, at: Sequence[int]) -> Schedule:
    """Steps down."""
    return lambda step: factor ** sum(step >= s for s in at)


def cycles(stable: int, decay: int) -> Schedule:
    """A constant rate that decays to zero, again and again."""
    return lambda step: wsd_factor(step % (stable + decay), 0, stable, decay, "linear")


@dataclass(frozen=True)
class Plan:
    """A run: its schedule, and what differs from a batch of 16 at 8e-3 and ten snapshots, one in 10 steps."""

    name: str
    schedule: Schedule
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 8e-3
    seed: int = 0
    batch: Callable[[int], int] = lambda step: 16
    experts: int = 0
    sgd: bool = False


PLANS = [
    Plan("constant", warm(constant)),
    Plan("constant, another seed", warm(constant), seed=1),
    Plan("constant, no warm-up", constant, seed=2),
    Plan("constant, a quarter of the rate", warm(constant), learning_rate=2e-3),
    Plan("constant, 2.5 times the rate", warm(constant), learning_rate=2e-2),
    Plan("constant, SGD with momentum", warm(constant), learning_rate=0.3, sgd=True),
    Plan("constant, experts", warm(constant), experts=4),
    Plan("constant, three snapshots", warm(constant), {"window": 3}),
    Plan("constant, five snapshots", warm(constant), {"window": 5}, seed=1),
    Plan("constant, three distant snapshots", warm(constant), {"window": 3, "every_n_steps": 60}),
    Plan("constant, ten distant snapshots", warm(constant), {"every_n_steps": 60}),
    Plan("constant, twenty snapshots", warm(constant), {"window": 20}, seed=3),
    Plan("constant, a window of 30, a quarter of the rate", warm(constant), {"window": 30}, 2e-3),
    Plan("1-sqrt decay", wsd(250)),
    Plan("1-sqrt decay, another seed", wsd(250), seed=1),
    Plan("1-sqrt decay, experts", wsd(250), experts=4),
    Plan("1-sqrt decay, three snapshots", wsd(250), {"window": 3}, seed=2),
    Plan("linear decay", wsd(250, "linear")),
    Plan("long linear decay", wsd(650, "linear"), seed=1),
    Plan("cosine decay, to a tenth", wsd(400, "cosine", 0.1), seed=1),
    Plan("linear decay, to a third", wsd(400, "linear", 0.33), seed=2),
    Plan("decay to a tenth, then constant", wsd(200, "linear", 0.1, 700), seed=3),
    Plan("cosine", warm(cosine())),
    Plan("cosine, to a tenth", warm(cosine(0.1)), seed=1),
    Plan("linear from the start", warm(lambda step: 1 - step / STEPS)),
    Plan("warm restarts", warm(cosine(length=310))),
    Plan("three decays, one after the other", warm(cycles(220, 90)), seed=1),
    Plan("a tenth twice", warm(stairs(0.1, (500, 750)))),
    Plan("a half three times", warm(stairs(0.5, (350, 600, 850))), seed=1),
    Plan("inverse square root", warm(lambda step: (1 + step / WARMUP) ** -0.5)),
    Plan("exponential", warm(lambda step: math.exp(-step / 350))),
    Plan("the rate doubles half way", warm(lambda step: 1.0 if step < 500 else 2.0), seed=2),
    Plan("batch 8, then 32", warm(constant), batch=lambda step: 8 if step < 500 else 32),
    Plan(
        "batch 8, 16, 32, by tokens",
        warm(constant),
        {"every_n_tokens": 10 * 16 * CONTEXT},
        batch=lambda step: 8 << min(2, step // 350),
    ),
    Plan("batch grows, 1-sqrt decay", wsd(250), batch=lambda step: 8 if step < 350 else 24, seed=3),
]


class Lines(logging.Handler):
    """What the user is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line."""
        self.told.append(record.getMessage())


class Run:
    """A run of a plan, and all that is needed to judge what was said in it."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        corpus = load_corpus()
        self.plan, self.model = plan, GPT(GPTConfig(context=CONTEXT, width=32, experts=plan.experts))
        self.data = {
            size: RandomCrops(corpus.train, size, CONTEXT, 1, (plan.seed, size)) for size in (8, 16, 24, 32)
        }
        starts = torch.linspace(0, len(corpus.validation) - CONTEXT - 1, 256, dtype=torch.float64).long()
        self.validation = cut(corpus.validation, starts, CONTEXT)
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.validations: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []

    def train(self) -> None:
        """Trains, validates, and notes every line of advice."""
        optimizer, plan, told = self._optimizer(), self.plan, Lines()
        logging.getLogger("merge_callback").addHandler(told)
        interval = {} if "every_n_tokens" in plan.options else {"every_n_steps": 10}
        with (
            tempfile.TemporaryDirectory() as folder,
            CheckpointMerger(
                self.model,
                optimizer,
                total_steps=STEPS,
                dirpath=f"{folder}/merges",
                durable=False,
                emit_every=0,
                exclude=["*.router_bias"] if plan.experts else (),
                **{**interval, **plan.options},
            ) as merger,
        ):
            for step in range(1, STEPS + 1):
                size = plan.batch(step - 1)
                merger.step(loss=self._step(optimizer, size, step - 1), tokens=size * CONTEXT)
                assert merger._session is not None
                pipeline = merger._session.pipeline
                if step % 10 == 0:
                    self.weights[step] = copy.deepcopy(self.model.state_dict())
                if step % VALIDATED == 0:
                    self._validate(merger, step)
                self._note(pipeline.advice.given, told, step)
        self.closing = told.told[-1].replace(folder, "…")
        logging.getLogger("merge_callback").removeHandler(told)

    def _note(self, given: Sequence[str], told: Lines, step: int) -> None:
        for key in given[len(self.lines) :]:
            self.lines.append({"step": step, "rule": key.split()[0], "line": told.told[-1]})

    def _validate(self, merger: CheckpointMerger, step: int) -> None:
        live = self.loss()
        with merger.merged_weights() as merge:
            if merge is None:
                return
            merged = self.loss()
        merger.log_validation({"loss": live}, {"loss": merged})
        newest = merge.snapshots[-1]
        steps = [snapshot.step for snapshot in merge.snapshots]
        self.validations.append(
            {"step": step, "live": live, "gain": live - merged, "phase": newest.phase}
            | {"since": newest.since, "snapshots": steps}
        )

    def _step(self, optimizer: Optimizer, size: int, index: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * self.plan.schedule(index)
        loss = self._loss_of(self.data[size].draw(index))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.model.balance_experts()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def _optimizer(self) -> Optimizer:
        rate, parameters = self.plan.learning_rate, self.model.parameters()
        if self.plan.sgd:
            return SGD(parameters, lr=rate, momentum=0.9)
        return AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)

    def _loss_of(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    @torch.no_grad()
    def loss(self) -> float:
        """The validation loss of the weights that the model has."""
        self.model.eval()
        loss = float(self._loss_of(self.validation))
        self.model.train()
        return loss

    def loss_of_last(self, count: int, validation: dict[str, Any]) -> float:
        """The validation loss of the mean of the last snapshots of a validation's phase."""
        every = validation["snapshots"][-1] - validation["snapshots"][-2]
        last = validation["snapshots"][-1]
        first = max(last - every * (count - 1), validation["snapshots"][0] if count < 10 else 0)
        steps = [s for s in range(last, first - 1, -every) if s in self.weights][::-1]
        live = self.model.state_dict()
        self.model.load_state_dict(merge_state_dicts([self.weights[s] for s in steps], "sma"))
        loss = self.loss()
        self.model.load_state_dict(live)
        return loss

    def judged(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line with what another window would have scored, if it advises one."""
        counts = {"lagging": 3, "few": 10}
        if (count := counts.get(line["rule"])) is None:
            return line
        rest = following(line, self.validations, self.plan.schedule)[: 2 if count == 3 else None]
        other = [self.loss_of_last(count, v) for v in rest]
        return {**line, "later": {"loss advised": other, "loss": [v["live"] - v["gain"] for v in rest]}}


def following(
    line: Mapping[str, Any], validations: Sequence[Mapping[str, Any]], schedule: Schedule
) -> list[Mapping[str, Any]]:
    """The validations of the phase that a line was given in, from then on until the learning rate rises."""
    at = next(v for v in reversed(validations) if v["step"] <= line["step"])
    rest = [v for v in validations if v["step"] >= line["step"]]
    same = [v for v in rest if (v["phase"], v["since"]) == (at["phase"], at["since"])]
    rate = schedule(line["step"] - 1)
    return [*takewhile(lambda v: schedule(v["step"] - 1) <= rate, same)]


def with_verdict(
    line: dict[str, Any], validations: Sequence[Mapping[str, Any]], schedule: Schedule
) -> dict[str, Any]:
    """A line with what came later, and whether that bears it out; ``None`` if nothing came."""
    later, verdict = line.get("later", {}), None
    if line["rule"] in ("fading", "spent"):
        rest = following(line, validations, schedule)
        gains = [v["gain"] for v in rest]
        before = [v["gain"] for v in validations if v["step"] < line["step"] and v["phase"] == "stable"]
        later = {"gains before": before[-3:], "largest gain before": max(before), "gains": gains}
        if gains and line["rule"] == "spent":
            verdict = max(map(abs, gains)) <= max(max(before) / 5, rest[0]["live"] / 1000)
        elif gains:
            verdict = statistics.mean(gains) < statistics.mean(before[-3:])
    elif later["loss"]:
        pairs = [*zip(later["loss advised"], later["loss"], strict=True)]
        verdict = sum(a for a, _ in pairs) < sum(b for _, b in pairs)
        if line["rule"] == "lagging":
            verdict = all(a < b for a, b in pairs)
    return {**line, "later": later, "borne out": verdict}


def record_of(plan: Plan) -> dict[str, Any]:
    """Runs a plan."""
    seconds = -time.process_time()
    run = Run(plan)
    run.train()
    return {
        "name": plan.name,
        "seed": plan.seed,
        "lines": [run.judged(line) for line in run.lines],
        "closing": run.closing,
        "validations": run.validations,
        "seconds": seconds + time.process_time(),
    }


def main() -> None:
    """Runs all plans, prints every line, and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    cache: Path = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    records = []
    for i, plan in enumerate(PLANS):
        file = cache / f"{i}.json"
        if not file.exists():
            half = file.with_suffix(".half")
            half.write_text(json.dumps(record_of(plan)))
            os.replace(half, file)
        records.append(record := json.loads(file.read_text()))
        record["lines"] = [
            with_verdict(line, record["validations"], plan.schedule) for line in record["lines"]
        ]
        print(f"\n{record['name']} ({record['seconds']:.0f} s)")
        for line in record["lines"]:
            print(f"  {line['step']} {line['line']}\n    borne out: {line['borne out']} {line['later']}")
        print(f"  {record['closing']}", flush=True)
    print(write("advice", {"runs": records}))


if __name__ == "__main__":
    main()
