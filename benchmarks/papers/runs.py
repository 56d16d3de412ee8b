"""Trains the runs, and keeps their snapshots, averages, curves and states in the cache."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from benchmarks.papers.spec import Kind, Snapshot, Spec, Weights, plain
from benchmarks.papers.text import batch
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.schedule import wsd_factor
from merge_callback.merging import merge_state_dicts

State = dict[str, Tensor]
Curve = npt.NDArray[np.float64]

AVERAGES: dict[Kind, float] = {"power.05": 16.97, "power.10": 6.94}
"""Exponents g of the running averages (EDM2): step t moves them by 1 - (1 - 1/t)^(g+1) of the difference."""

AVERAGED = 5
"""Of so many snapshots one has the running averages, too."""


class Run:
    """A run of the cache, trained as far as ``end``.

    Args:
        spec: what it is.
        cache: folder of all runs.
    """

    def __init__(self, spec: Spec, cache: Path) -> None:
        self.spec, self.cache, self.folder = spec, cache, cache / "runs" / spec.key

    @property
    def is_done(self) -> bool:
        """Whether all of it is there."""
        return self._state(self.spec.end).exists()

    @property
    def steps(self) -> range:
        """The steps whose snapshots are stored, ascending."""
        first = self.spec.begin + self.spec.every
        return range(first - first % self.spec.every, self.spec.end + 1, self.spec.every)

    @property
    def losses(self) -> Curve:
        """The training loss of each of its own steps, nats per byte."""
        return self._curve(0)

    @property
    def gradient_norms(self) -> Curve:
        """Before clipping, at each of its own steps."""
        return self._curve(1)

    @property
    def learning_rates(self) -> Curve:
        """The applied one at each of its own steps."""
        return self._curve(2)

    def weights(self, step: int, kind: Kind = "live") -> State:
        """A stored snapshot of this run itself, or a running average."""
        return load_file(self._snapshot(step, kind))

    def state(self, step: int) -> dict[str, Any]:
        """Weights, optimizer and averages, at a step that is a multiple of ``spec.stored`` or the last."""
        found: dict[str, Any] = torch.load(self._state(step), weights_only=False)
        return found

    def train(self, tell: Callable[[int], object] = lambda steps: None) -> Run:
        """Trains what is missing; the parents first. ``tell`` gets the number of steps just taken."""
        if not self.is_done:
            for needed in _needed(self.spec):
                Run(needed, self.cache).train(tell)
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                if not self.is_done:
                    (self.folder / "spec.json").write_text(json.dumps(plain(self.spec)))
                    self._train(tell)
        return self

    def _train(self, tell: Callable[[int], object]) -> None:
        spec = self.spec
        model = built(spec)
        optimizer = optimizer_of(model, spec)
        begin, averages = self._begin(model, optimizer)
        parameters = list(model.parameters())
        curves: list[tuple[float, float, float]] = []
        for step in range(begin, spec.end):
            rate = spec.learning_rate * _factor(spec, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = training_loss(model, spec, step)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, spec.clip)
            model.balance_experts()
            optimizer.step()
            optimizer.zero_grad()
            curves.append((loss.item(), norm.item(), rate))
            self._take(model, averages, step + 1)
            tell(1)
            if (step + 1) % spec.stored == 0 or step + 1 == spec.end:
                self._store(model, optimizer, averages, step + 1, curves)
                curves = []

    def _begin(self, model: GPT, optimizer: AdamW) -> tuple[int, dict[Kind, State]]:
        """Loads this run's last state, or else the parent's; returns the step and the running averages."""
        spec, own = self.spec, sorted(self.folder.glob("state-*.pt"))
        if own:
            state = torch.load(own[-1], weights_only=False)
        elif spec.parent is not None:
            state = Run(spec.parent.spec, self.cache).state(spec.parent.step)
        else:
            return 0, {kind: _copied(weights(model)) for kind in AVERAGES}
        load(model, state["weights"])
        if own or not spec.fresh:
            optimizer.load_state_dict(state["optimizer"])
        if not own and spec.weights:
            load(model, loaded(spec.weights, self.cache))
        return state["step"], state["averages"]

    def _take(self, model: GPT, averages: dict[Kind, State], step: int) -> None:
        live = weights(model)
        averaged = [name for name in live if not name.endswith("router_bias")]
        for kind, gamma in AVERAGES.items():
            share = 1 - (1 - 1 / step) ** (gamma + 1)
            torch._foreach_lerp_([averages[kind][n] for n in averaged], [live[n] for n in averaged], share)
            averages[kind].update({n: live[n].clone() for n in live.keys() - set(averaged)})
        if step % self.spec.every == 0:
            save_file(live, self._snapshot(step, "live"))
        if step % (self.spec.every * AVERAGED) == 0:
            for kind, average in averages.items():
                save_file(average, self._snapshot(step, kind))

    def _store(
        self, model: GPT, optimizer: AdamW, averages: Any, step: int, curves: list[tuple[float, float, float]]
    ) -> None:
        np.save(self.folder / f"curves-{step:06}.npy", np.array(curves).T)
        state = {"weights": weights(model), "optimizer": optimizer.state_dict(), "averages": averages}
        half = self._state(step).with_suffix(".half")
        torch.save({"step": step, **state}, half)
        os.replace(half, self._state(step))

    def _curve(self, row: int) -> Curve:
        return np.concatenate([np.load(path)[row] for path in sorted(self.folder.glob("curves-*.npy"))])

    def _snapshot(self, step: int, kind: Kind) -> Path:
        return self.folder / f"{kind}-{step:06}.safetensors"

    def _state(self, step: int) -> Path:
        return self.folder / f"state-{step:06}.pt"


def loaded(target: Weights, cache: Path) -> State:
    """The state dict of a snapshot, or of a merge, which is made."""
    if isinstance(target, Snapshot):
        return _snapshot_weights(target, cache)
    states = [_snapshot_weights(part, cache) for part in target.parts]
    steps = [part.step for part in target.parts]
    ascending = all(a < b for a, b in pairwise(steps))
    spaced = steps if ascending else None  # else it is no trajectory
    return merge_state_dicts(
        states,
        target.method,
        positions=spaced,
        steps=spaced,
        exclude=["*.router_bias"],
        **dict(target.options),
    )


def built(spec: Spec) -> GPT:
    """The run's model with its first weights."""
    torch.manual_seed(spec.seed)
    shape = {
        name: getattr(spec, name) for name in ("width", "layers", "heads", "experts", "qk_norm", "context")
    }
    return GPT(GPTConfig(**shape))


def weights(model: GPT) -> State:
    """The model's tensors by name, each one once: the output matrix is the embedding."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "head.weight"}


def load(model: GPT, found: State) -> None:
    """Loads what ``weights`` gave."""
    model.load_state_dict({**found, "head.weight": found["tokens.weight"]})


def _needed(spec: Spec) -> Iterator[Spec]:
    if spec.parent is not None:
        yield spec.parent.spec
    if spec.weights is not None:
        yield from dict.fromkeys(part.spec for part in spec.weights.parts)


@lru_cache(maxsize=500)
def _snapshot_weights(snapshot: Snapshot, cache: Path) -> State:
    """Small models: some hundred snapshots fit in memory."""
    return Run(snapshot.spec, cache).weights(snapshot.step, snapshot.kind)


def optimizer_of(model: GPT, spec: Spec) -> AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)


def _factor(spec: Spec, step: int) -> float:
    own, after = step - spec.begin, spec.steps - spec.warmup
    if spec.schedule == "constant":
        return wsd_factor(own, spec.warmup, after, 0)
    factor = wsd_factor(own, spec.warmup, 0, after, spec.schedule)
    return factor if own < spec.warmup else spec.floor + (1 - spec.floor) * factor


def training_loss(model: GPT, spec: Spec, step: int) -> Tensor:
    drawn = batch(spec.mix, spec.batch, spec.context, (spec.seed, spec.order), step)
    return F.cross_entropy(model(drawn["input_ids"]).flatten(0, 1), drawn["labels"].flatten())


def _copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process trains a run; another one waits for it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
