"""How well a merge at a constant learning rate tells what annealing would give, over forks that anneal.

    python benchmarks/forecast.py --cache FOLDER      # 20 minutes on one idle core; resumable

The demo's models, dense and mixtures of experts, train at a constant learning rate. At several steps the
weights are validated, merged in several ways from the snapshots so far, and a fork anneals from there: that
is what a forecast is compared with. Data go on in the fork as they would in the run. A run that is in the
cache is not trained again.

A rule is fitted without the run that it is judged on ("left out"), or on earlier forks of that run alone
("own").
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from forecast_rules import cases, draw, shares, table
from record import RESULTS, write
from torch import Tensor
from torch.optim import AdamW

from merge_callback.demo.crops import Batch, RandomCrops, cut
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.schedule import DecayShape, wsd_factor
from merge_callback.demo.text import load_corpus
from merge_callback.merging import merge_state_dicts

CONTEXT, BATCH, WARMUP = 64, 16, 100
STORED = 10
"""Steps between the snapshots that are kept; the callback's default window is every other one of ten."""

VALIDATED = 40
"""Steps between validations."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Trunk:
    """A run at a constant learning rate."""

    name: str
    seed: int
    learning_rate: float = 8e-3
    experts: int = 0
    width: int = 64

    @property
    def forks(self) -> list[Fork]:
        """Those that leave it: of a narrow model fewer."""
        return FORKS if self.width == 64 else FORKS_OF_NARROW


TRUNKS = [
    *(Trunk("dense", seed) for seed in range(3)),
    Trunk("experts, narrow", 0, experts=4, width=32),
    Trunk("dense, narrow", 0, width=32),
    Trunk("dense, narrow, half the learning rate", 1, 4e-3, width=32),
    Trunk("experts, narrow, half the learning rate", 1, 4e-3, experts=4, width=32),
]


@dataclass(frozen=True)
class Fork:
    """Where a fork leaves its trunk, and how it anneals."""

    step: int
    decay: int
    shape: DecayShape = "1-sqrt"


FORKS = [
    Fork(800, 200),
    Fork(1600, 400),
    Fork(2400, 600),
    Fork(2400, 240),
    Fork(2400, 1200),
    Fork(2400, 600, "linear"),
]
"""A quarter of the steps so far at three lengths; at the last one a tenth and a half, too, and a line."""

FORKS_OF_NARROW = [Fork(1200, 300), Fork(1600, 400), Fork(1600, 160)]


class Run:
    """A model, its optimizer and its data.

    Args:
        trunk: what to train.
    """

    def __init__(self, trunk: Trunk) -> None:
        torch.manual_seed(trunk.seed)
        self.trunk, self.step = trunk, 0
        self.model = GPT(GPTConfig(context=CONTEXT, width=trunk.width, experts=trunk.experts))
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, lr=trunk.learning_rate, betas=(0.9, 0.95), foreach=True)
        corpus = load_corpus()
        self.data = RandomCrops(corpus.train, BATCH, CONTEXT, 1, (trunk.seed, 0))
        starts = torch.linspace(0, len(corpus.validation) - CONTEXT - 1, 384, dtype=torch.float64).long()
        self.validation = [cut(corpus.validation, part, CONTEXT) for part in starts.split(32)]

    def train(self, steps: int, decay: int = 0, shape: DecayShape = "1-sqrt") -> Iterator[int]:
        """Trains for some steps, annealing over the last ``decay`` of them; yields after each."""
        stable = self.step + steps - decay - WARMUP
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.trunk.learning_rate * wsd_factor(self.step, WARMUP, stable, decay, shape)
            loss, _ = self._score(self.data.draw(self.step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.model.balance_experts()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            yield self.step

    @torch.no_grad()
    def scores(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """The validation's loss and accuracy, of the live weights or of others."""
        live = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(live if weights is None else weights)
        self.model.eval()
        found = torch.stack([torch.stack(self._score(batch)) for batch in self.validation]).mean(0)
        self.model.train()
        self.model.load_state_dict(live)
        return {"loss": float(found[0]), "accuracy": float(found[1])}

    def state(self) -> Any:
        """What ``restore`` needs."""
        return copy.deepcopy((self.step, self.model.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: Any) -> None:
        """Goes back."""
        step, model, optimizer = copy.deepcopy(state)
        self.step = step
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch["input_ids"]).flatten(0, 1)
        labels = batch["labels"].flatten()
        return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def merges(taken: Mapping[int, State], step: int) -> dict[str, State]:
    """Weights that may forecast what annealing gives, from the snapshots up to ``step``."""

    def merged(count: int, every: int, method: str = "sma", until: int = step) -> State:
        steps = [until - every * k for k in reversed(range(count))]
        return merge_state_dicts(
            [taken[s] for s in steps], method, steps=steps, positions=steps, exclude=["*.router_bias"]
        )

    mean, before, live = merged(10, 20), merged(10, 20, until=step - 200), taken[step]
    return {
        **{f"sma, {n} every 20": merged(n, 20) for n in (3, 5, 10, 15, 20)},
        **{f"sma, {n} every 10": merged(n, 10) for n in (10, 20)},
        **{f"{m}, {n} every 20": merged(n, 20, m) for m in ("wma", "wsm") for n in (10, 20)},
        **{f"on by {x} of the merges' distance": _beyond(before, mean, 1 + x) for x in (0.25, 0.5, 1.0)},
        **{f"from live to {x} times the merge's distance": _beyond(live, mean, x) for x in (1.5, 2.0)},
    }


def _beyond(origin: State, end: State, share: float) -> State:
    return {
        name: torch.lerp(origin[name], end[name], share) if end[name].is_floating_point() else end[name]
        for name in end
    }


def measured(trunk: Trunk) -> list[dict[str, Any]]:
    """What was known at each fork of a trunk, and what the forks reached."""
    run, taken = Run(trunk), dict[int, State]()
    found, forks = [], {fork.step: [f for f in trunk.forks if f.step == fork.step] for fork in trunk.forks}
    for step in run.train(max(forks)):
        if step % STORED == 0:
            taken[step] = copy.deepcopy(run.model.state_dict())
            taken.pop(step - 400, None)
        if step in forks:
            found.append(_known(run, taken, step) | {"forks": [_annealed(run, fork) for fork in forks[step]]})
    return found


def _known(run: Run, taken: Mapping[int, State], step: int) -> dict[str, Any]:
    validations = [step - VALIDATED * k for k in reversed(range(5))]
    windows = {s: [s - 20 * k for k in reversed(range(10))] for s in validations}
    means = {
        s: merge_state_dicts([taken[t] for t in window], "sma", exclude=["*.router_bias"])
        for s, window in windows.items()
    }
    return {
        "step": step,
        "live": [run.scores(taken[s]) for s in validations],
        "merged": [run.scores(means[s]) for s in validations],
        "others": {name: run.scores(weights) for name, weights in merges(taken, step).items()},
    }


def _annealed(run: Run, fork: Fork) -> dict[str, Any]:
    state = run.state()
    for _ in run.train(fork.decay, fork.decay, fork.shape):
        pass
    found = {**asdict(fork), "annealed": run.scores()}
    run.restore(state)
    return found


def all_measured(cache: Path) -> list[dict[str, Any]]:
    """The trunks' records, trained where the cache has none."""
    cache.mkdir(parents=True, exist_ok=True)
    records = []
    for i, trunk in enumerate(TRUNKS):
        file = cache / f"{i}.json"
        if not file.exists():
            half = file.with_suffix(".half")
            half.write_text(json.dumps({**asdict(trunk), "points": measured(trunk)}))
            os.replace(half, file)
            print(f"{i + 1} of {len(TRUNKS)}: {trunk}", flush=True)
        records.append(json.loads(file.read_text()))
    return records


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    torch.set_num_threads(1)
    records = all_measured(parser.parse_args().cache)
    forks = {metric: cases(records, metric) for metric in ("loss", "accuracy")}
    figures = {
        "rules": {metric: table(found) for metric, found in forks.items()},
        "shares": {metric: shares(found) for metric, found in forks.items()},
        "trunks": records,
    }
    print(write("forecast", figures))
    draw(forks["loss"], RESULTS / "forecast.png")


if __name__ == "__main__":
    main()
